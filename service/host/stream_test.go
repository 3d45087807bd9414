// SPDX-License-Identifier: Apache-2.0

package host

import (
	"testing"
	"time"

	"transfused.org/transfused/service/transport"
	"transfused.org/transfused/service/wire"
)

// A guest that does not read its stream stops no goroutine of the parent, whose duplicate of the stream blocks as soon as the
// worker has its own: the worker answers StreamOpen.
func TestStreamThatIsNotRead(t *testing.T) {
	h := startHost(t, Config{Exports: []Export{exportDir(t, "code")}})
	g := newGuest(t, h.addr, 1).connect()
	id := g.request("code").MountID
	ours, theirs, err := transport.Pair()
	if err != nil {
		t.Fatal(err)
	}
	defer ours.Close()
	defer theirs.Close()
	// As a guest on vsock that grants no credit has it.
	theirs.SetWriteDeadline(time.Now().Add(100 * time.Millisecond))
	for err == nil {
		_, err = theirs.Write(make([]byte, 1<<16))
	}
	h.s.mu.Lock()
	var ss *session
	for ss = range h.s.sessions {
	}
	h.s.mu.Unlock()
	done := make(chan error, 1)
	go func() { done <- ss.openStream(theirs, &wire.StreamOpen{SessionID: g.id, MountID: id}) }()
	select {
	case err := <-done:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(5 * time.Second):
		t.Error("the parent waits for the guest to read")
		ours.Close()
		<-done
	}
}
