// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"errors"
	"os"
	"testing"
	"time"
)

// deafen asks until nothing more goes through to the daemon, and reads no answer.
func (h *v1host) deafen() {
	h.t.Helper()
	asks := make([]byte, 0, 1<<16)
	for range 1000 {
		asks = append(asks, "\x0a\x00\x00\x00\x03\x00\x01\x00/x"...) // START_PERFSTAT_REQUEST of nothing
	}
	for {
		h.control.SetWriteDeadline(time.Now().Add(300 * time.Millisecond))
		if _, err := h.control.Write(asks); errors.Is(err, os.ErrDeadlineExceeded) {
			return
		} else if err != nil {
			h.t.Fatal(err)
		}
	}
}

// A host that reads nothing keeps the daemon neither from ending nor from connecting again.
func TestDeafHost(t *testing.T) {
	t.Run("ends", func(t *testing.T) {
		h := startV1(t, nil)
		h.deafen()
	})
	t.Run("connects", func(t *testing.T) {
		h := startV1(t, nil)
		h.deafen()
		h.control.Close()
		h.control = h.accept()
		h.read(h.control, 6)
	})
}
