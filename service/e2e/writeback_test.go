// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bytes"
	"os"
	"path/filepath"
	"sync"
	"testing"
)

// With a writeback cache the guest's kernel knows best what size a file has. It agrees with the host also where one process truncates
// a file as it opens it while another writes to it.
func TestTruncatedWhileWritten(t *testing.T) {
	r := newRig(t, 0)
	r.host(",cache=always,writeback")
	r.start("transfused", "--server", r.address("h"), "--socket", "none", "--mount", "code="+r.mnt)
	r.mounted(r.mnt)
	name := filepath.Join(r.mnt, "f")
	write := func(flags, size int, at int64) {
		f, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|flags, 0o644)
		if err != nil {
			t.Error(err)
			return
		}
		if _, err := f.WriteAt(make([]byte, size), at); err != nil {
			t.Error(err)
		}
		if err := f.Close(); err != nil {
			t.Error(err)
		}
	}
	for i := 0; i < 500 && !t.Failed(); i++ {
		var both sync.WaitGroup
		both.Go(func() { write(os.O_TRUNC, 500, 0) })
		both.Go(func() { write(0, 2000, 1000) })
		both.Wait()
		guest, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		host, err := os.ReadFile(filepath.Join(r.export, "f"))
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(guest, host) {
			t.Errorf("turn %d: the guest has %d bytes, and the host %d", i, len(guest), len(host))
		}
	}
}
