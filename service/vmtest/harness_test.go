// SPDX-License-Identifier: Apache-2.0

//go:build vm

package vmtest

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// testHarness is about the VM alone: a failure here is not one of transfused.
func testHarness(t *testing.T, l *lab) {
	t.Run("status and output", func(t *testing.T) {
		for _, c := range []struct {
			script, out string
			ok          bool
		}{
			{"echo out; echo err >&2", "out\nerr\n", true},
			{"exit 3", "", false},
			{"false; echo not reached", "", false},
			{"cat; printf '\\0'", "\x00", true},
			{"sleep 600 & echo done", "done\n", true},
		} {
			out, err := l.vm.Run(t.Context(), c.script)
			if out != c.out || err == nil != c.ok {
				t.Errorf("%s: %q, %v", c.script, out, err)
			}
		}
	})
	// Both directions of the vsock device, with more than any buffer of it holds.
	data := make([]byte, 8<<20)
	rand.NewChaCha8([32]byte{}).Read(data)
	sum := fmt.Sprintf("%x", sha256.Sum256(data))
	t.Run("host to guest", func(t *testing.T) {
		file := filepath.Join(t.TempDir(), "data")
		if err := os.WriteFile(file, data, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := l.vm.Push(t.Context(), file, "/root/data"); err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(sum+"  /root/data", l.guest(t, "sha256sum /root/data")); diff != "" {
			t.Error(diff)
		}
	})
	t.Run("guest to host", func(t *testing.T) {
		ln, err := net.Listen("unix", l.vm.Socket()+"_9000")
		if err != nil {
			t.Fatal(err)
		}
		defer ln.Close()
		got := make(chan []byte, 1)
		go func() {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			defer c.Close()
			all, _ := io.ReadAll(c) // what is missing shows
			got <- all
		}()
		l.guest(t, "socat -u -b 262144 OPEN:/root/data VSOCK-CONNECT:2:9000")
		if !bytes.Equal(data, <-got) {
			t.Error("other bytes arrived than were sent")
		}
	})
}
