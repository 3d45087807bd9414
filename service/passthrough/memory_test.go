// SPDX-License-Identifier: Apache-2.0

package passthrough

import (
	"fmt"
	"os"
	"runtime"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Nodes cost so much, and it is given back when the guest forgets them.
func TestNodeMemory(t *testing.T) {
	root, err := os.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	fs, err := New(Config{Root: root})
	if err != nil {
		t.Fatal(err)
	}
	defer fs.Close()
	const nodes = 300_000
	heap := func() int {
		var m runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&m)
		return int(m.HeapAlloc)
	}
	before := heap()
	first := fs.lastID + 1
	for i := range nodes {
		st := unix.Statx_t{Ino: 1<<40 + uint64(i), Mode: unix.S_IFREG}
		if _, e := fs.enter(fs.root, append(fmt.Appendf(nil, "file%06d", i), 0), &st); e != 0 {
			t.Fatal(e)
		}
	}
	if size := unsafe.Sizeof(node{}); size != 208 { // a size class of the runtime
		t.Errorf("a node has %d bytes", size)
	}
	grown := heap() - before
	t.Logf("%d bytes each", grown/nodes)
	if grown/nodes > 400 {
		t.Errorf("a node costs %d bytes", grown/nodes)
	}
	for i := range uint64(nodes) {
		fs.forget(first+i, 1)
	}
	if left := heap() - before; left > grown/10 {
		t.Errorf("%d bytes are left of %d", left, grown)
	}
}
