// SPDX-License-Identifier: Apache-2.0

package passthrough

import (
	"fmt"
	"io"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"transfused.org/transfused/service/fuse"
)

// caller sends requests one by one and allocates nothing.
type caller struct {
	tb testing.TB
	c  *os.File
	in []byte
	b  []byte
}

func newCaller(tb testing.TB, dir string) *caller {
	tb.Helper()
	fs := newFS(tb, dir, Config{RootAs: RootTrust})
	k := &caller{tb: tb, c: serve(tb, fs), b: make([]byte, maxRequest)}
	k.call(fuse.OpInit, 0, initBody())
	return k
}

func (k *caller) call(op fuse.Opcode, node uint64, body []byte) []byte {
	k.in = fuse.Append(k.in[:0], &fuse.InHeader{Len: uint32(fuse.InHeaderSize + len(body)), Opcode: op, Unique: 2, NodeID: node})
	k.in = append(k.in, body...)
	if _, err := k.c.Write(k.in); err != nil {
		k.tb.Fatal(err)
	}
	if op.NoReply() {
		return nil
	}
	h, n, err := readReply(k.c, k.b)
	if err != nil && err != io.EOF || h.Error != 0 {
		k.tb.Fatalf("%v: %v, error %d", op, err, h.Error)
	}
	return k.b[fuse.OutHeaderSize:n]
}

func (k *caller) lookup(name string) uint64 {
	var out fuse.EntryOut
	fuse.Decode(&out, k.call(fuse.OpLookup, 1, []byte(name+"\x00")))
	return out.NodeID
}

func (k *caller) open(op fuse.Opcode, node uint64, flags uint32) uint64 {
	var out fuse.OpenOut
	fuse.Decode(&out, k.call(op, node, fuse.Append(nil, &fuse.OpenIn{Flags: flags})))
	return out.Fh
}

// requests are those that must not allocate, each with what makes its body.
func (k *caller) requests(dir string) map[string]func() {
	if err := os.WriteFile(filepath.Join(dir, "file"), make([]byte, 2<<20), 0o644); err != nil {
		k.tb.Fatal(err)
	}
	node := k.lookup("file")
	fh := k.open(fuse.OpOpen, node, unix.O_RDWR)
	read := func(size uint32) []byte { return fuse.Append(nil, &fuse.ReadIn{Fh: fh, Size: size}) }
	write := func(size uint32) []byte {
		return append(fuse.Append(nil, &fuse.WriteIn{Fh: fh, Size: size}), make([]byte, size)...)
	}
	r := map[string]func(){}
	for name, c := range map[string]struct {
		op   fuse.Opcode
		node uint64
		body []byte
	}{
		"getattr":  {fuse.OpGetattr, node, fuse.Append(nil, &fuse.GetattrIn{})},
		"lookup":   {fuse.OpLookup, 1, []byte("file\x00")},
		"read 4k":  {fuse.OpRead, node, read(4 << 10)},
		"read 1M":  {fuse.OpRead, node, read(1 << 20)},
		"write 4k": {fuse.OpWrite, node, write(4 << 10)},
		"write 1M": {fuse.OpWrite, node, write(1 << 20)},
		"setattr":  {fuse.OpSetattr, node, fuse.Append(nil, &fuse.SetattrIn{Valid: fuse.FATTR_MODE, Mode: 0o600})},
		"flush":    {fuse.OpFlush, node, fuse.Append(nil, &fuse.FlushIn{Fh: fh})},
	} {
		r[name] = func() { k.call(c.op, c.node, c.body) }
	}
	return r
}

func TestNoAllocation(t *testing.T) {
	dir := tmpfs(t)
	k := newCaller(t, dir)
	for name, f := range k.requests(dir) {
		// The runtime's own (a timer, a thread) are less than one a request.
		if n := testing.AllocsPerRun(200, f); n >= 1 {
			t.Errorf("%s: %v allocations", name, n)
		}
	}
}

func BenchmarkRequest(b *testing.B) {
	dir := tmpfs(b)
	k := newCaller(b, dir)
	for name, f := range k.requests(dir) {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				f()
			}
		})
	}
}

// BenchmarkCold is what a name costs that was not known: LOOKUP, OPEN, RELEASE, FORGET.
func BenchmarkCold(b *testing.B) {
	dir := tmpfs(b)
	k := newCaller(b, dir)
	name := filepath.Join(dir, "file")
	if err := os.WriteFile(name, nil, 0o644); err != nil {
		b.Fatal(err)
	}
	forget := fuse.Append(nil, &fuse.ForgetIn{Nlookup: 1})
	b.Run("stat", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			k.call(fuse.OpForget, k.lookup("file"), forget)
		}
	})
	b.Run("open", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			node := k.lookup("file")
			fh := k.open(fuse.OpOpen, node, unix.O_RDONLY)
			k.call(fuse.OpRelease, node, fuse.Append(nil, &fuse.ReleaseIn{Fh: fh}))
			k.call(fuse.OpForget, node, forget)
		}
	})
	b.Run("create and unlink", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			rest := k.call(fuse.OpCreate, 1, append(fuse.Append(nil, &fuse.CreateIn{Flags: unix.O_RDWR | unix.O_CREAT, Mode: 0o644}), "new\x00"...))
			var e fuse.EntryOut
			var o fuse.OpenOut
			rest, _ = fuse.Decode(&e, rest)
			fuse.Decode(&o, rest)
			k.call(fuse.OpRelease, e.NodeID, fuse.Append(nil, &fuse.ReleaseIn{Fh: o.Fh}))
			k.call(fuse.OpUnlink, 1, []byte("new\x00"))
			k.call(fuse.OpForget, e.NodeID, forget)
		}
	})
}

func BenchmarkReaddir(b *testing.B) {
	dir := tmpfs(b)
	k := newCaller(b, dir)
	const entries = 1000
	for i := range entries {
		if err := os.WriteFile(filepath.Join(dir, fmt.Sprintf("file%08d", i)), nil, 0o644); err != nil {
			b.Fatal(err)
		}
	}
	fh := k.open(fuse.OpOpendir, 1, 0)
	for name, op := range map[string]fuse.Opcode{"plain": fuse.OpReaddir, "plus": fuse.OpReaddirplus} {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				off := uint64(0)
				for {
					rest := k.call(op, 1, fuse.Append(nil, &fuse.ReadIn{Fh: fh, Offset: off, Size: 128 << 10}))
					if len(rest) == 0 {
						break
					}
					for len(rest) > 0 {
						if op == fuse.OpReaddirplus {
							rest = rest[fuse.EntryOutSize:]
						}
						var d fuse.Dirent
						d, _, rest, _ = fuse.NextDirent(rest)
						off = d.Off
					}
				}
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/entries, "ns/entry")
		})
	}
}
