// SPDX-License-Identifier: Apache-2.0

package passthrough

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"transfused.org/transfused/service/fuse"
)

// What is told ahead precedes the reply, and is what the directory is after the change.
func TestTellAhead(t *testing.T) {
	g := newGuest(t, func(c *Config) { c.Ahead = true })
	told := func(op fuse.Opcode, b []byte, want fuse.Errno) {
		t.Helper()
		unique := g.send(op, 1, b)
		head := make([]byte, fuse.OutHeaderSize)
		if want == 0 {
			b := make([]byte, fuse.OutHeaderSize+fuse.AheadOutSize)
			if err := read(g, b); err != nil {
				t.Fatal(err)
			}
			var h fuse.OutHeader
			var a fuse.AheadOut
			body, _ := fuse.Decode(&h, b)
			fuse.Decode(&a, body)
			if h.Unique != 0 || h.Error != fuse.AheadCode || int(h.Len) != len(b) || a.Unique != unique || a.NodeID != 1 {
				t.Fatalf("%v: told %+v %+v", op, h, a)
			}
			st := g.stat(".")
			if a.Attr.Attr.Mtime != uint64(st.Mtim.Sec) || a.Attr.Attr.Mtimensec != uint32(st.Mtim.Nsec) || a.Attr.Attr.Nlink != uint32(st.Nlink) || a.Attr.AttrValid == 0 {
				t.Errorf("%v: told %+v, the directory is %+v", op, a.Attr, st)
			}
		}
		if err := read(g, head); err != nil {
			t.Fatal(err)
		}
		var h fuse.OutHeader
		if fuse.Decode(&h, head); h.Unique != unique || h.Error != -int32(want) {
			t.Fatalf("%v: reply %+v, want errno %v and nothing before it", op, h, want)
		}
		if err := read(g, make([]byte, int(h.Len)-len(head))); err != nil {
			t.Fatal(err)
		}
	}
	told(fuse.OpMkdir, body(fuse.MkdirIn{Mode: 0o755}, []byte("d\x00")), 0)
	told(fuse.OpMkdir, body(fuse.MkdirIn{Mode: 0o755}, []byte("d\x00")), unix.EEXIST)
	told(fuse.OpRename, body(fuse.RenameIn{Newdir: 1}, []byte("d\x00e\x00")), 0)
	told(fuse.OpRmdir, []byte("e\x00"), 0)
	told(fuse.OpUnlink, []byte("e\x00"), unix.ENOENT)
}

// The end of a directory is told before the reply with its last entries, and before no other.
func TestTellEnd(t *testing.T) {
	g := newGuest(t, func(c *Config) { c.Ahead = true })
	const files = 20
	for i := range files {
		g.write0(fmt.Sprint("file", i), "", 0o644)
	}
	o, _ := out[fuse.OpenOut](g, g.call(fuse.OpOpendir, 1, body(fuse.OpenIn{})))
	for _, op := range []fuse.Opcode{fuse.OpReaddir, fuse.OpReaddirplus} {
		entries, off, ended := 0, uint64(0), false
		for round := 0; ; round++ {
			unique := g.send(op, 1, body(fuse.ReadIn{Fh: o.Fh, Offset: off, Size: 4096}))
			var h fuse.OutHeader
			head := make([]byte, fuse.OutHeaderSize)
			must(t, read(g, head))
			fuse.Decode(&h, head)
			var end fuse.EndOut
			told := h.Unique == 0
			if told {
				b := make([]byte, fuse.EndOutSize)
				must(t, read(g, b))
				if fuse.Decode(&end, b); h.Error != fuse.EndCode || int(h.Len) != len(head)+len(b) || end.NodeID != 1 {
					t.Fatalf("%v: told %+v %+v", op, h, end)
				}
				must(t, read(g, head))
				fuse.Decode(&h, head)
			}
			if h.Unique != unique || h.Error != 0 {
				t.Fatalf("%v: reply %+v", op, h)
			}
			b := make([]byte, int(h.Len)-len(head))
			must(t, read(g, b))
			if len(b) == 0 {
				if told || !ended || round < 2 && op == fuse.OpReaddirplus {
					t.Errorf("%v: round %d: nothing more; told with it: %v, before it: %v", op, round, told, ended)
				}
				break
			}
			if ended {
				t.Fatalf("%v: entries after the end was told", op)
			}
			for len(b) > 0 {
				if op == fuse.OpReaddirplus {
					b = b[fuse.EntryOutSize:]
				}
				d, _, rest, ok := fuse.NextDirent(b)
				if !ok {
					t.Fatalf("%v: no entry in % x", op, b)
				}
				off, b = d.Off, rest
				entries++
			}
			if ended = told; told && end.Offset != off {
				t.Errorf("%v: the end is told at %d, the last entry has %d", op, end.Offset, off)
			}
		}
		if entries < files {
			t.Errorf("%v: %d entries", op, entries)
		}
	}
	g.want(0, g.call(fuse.OpReleasedir, 1, body(fuse.ReleaseIn{Fh: o.Fh})))
}

func read(g *guest, b []byte) error {
	for n := 0; n < len(b); {
		m, err := g.c.Read(b[n:])
		if err != nil {
			return err
		}
		n += m
	}
	return nil
}

func TestNothingToldAhead(t *testing.T) {
	g := newGuest(t, nil) // whose reader knows nothing of it
	g.want(0, g.call(fuse.OpMkdir, 1, body(fuse.MkdirIn{Mode: 0o755}, []byte("d\x00"))))
}

func TestNoFlush(t *testing.T) {
	for _, tt := range []struct {
		dir       string
		submounts SubmountPolicy
		want      bool
	}{{tmpfs(t), SubmountsHide, true}, {tmpfs(t), SubmountsFollow, false}, {"/proc", SubmountsHide, false}} {
		f, err := os.OpenFile(tt.dir, unix.O_PATH, 0)
		if err != nil {
			t.Fatal(err)
		}
		if got := NoFlush(f, tt.submounts); got != tt.want {
			t.Errorf("%s, %v: %v, want %v", tt.dir, tt.submounts, got, tt.want)
		}
		f.Close()
	}
}

// What is left of a removed file that nobody has open: attributes, and no descriptor.
func TestRemovedFiles(t *testing.T) {
	g := newGuest(t, nil)
	const n = 200
	var nodes []uint64
	for i := range n {
		e, fh := g.create(1, fmt.Sprint(i), 0o644)
		g.release(e.NodeID, fh)
		nodes = append(nodes, e.NodeID)
	}
	before := descriptors()
	for i := range n {
		g.want(0, g.call(fuse.OpUnlink, 1, append(fmt.Append(nil, i), 0)))
	}
	if after := descriptors(); after > before {
		t.Errorf("%d descriptors for %d removed files", after-before, n)
	}
	for _, id := range nodes {
		a, _ := out[fuse.AttrOut](g, g.call(fuse.OpGetattr, id, body(fuse.GetattrIn{})))
		if a.Attr.Nlink != 0 || a.Attr.Mode != unix.S_IFREG|0o644 {
			t.Fatalf("a removed file is %+v", a.Attr)
		}
	}
	g.want(unix.ENOENT, g.call(fuse.OpOpen, nodes[0], body(fuse.OpenIn{})))
	// A new file under an old name, perhaps with an old number, is another node.
	e, _ := g.create(1, "0", 0o600)
	for _, id := range nodes {
		if e.NodeID == id {
			t.Errorf("node %d is a removed one", id)
		}
	}
}

// A file that another is put in the place of can be opened by who has looked it up before.
func TestReplacedFile(t *testing.T) {
	g := newGuest(t, nil)
	e, fh := g.create(1, "a", 0o644)
	g.release(e.NodeID, fh)
	b, fh := g.create(1, "b", 0o644)
	g.release(b.NodeID, fh)
	g.want(0, g.call(fuse.OpRename, 1, body(fuse.RenameIn{Newdir: 1}, []byte("b\x00a\x00"))))
	g.want(0, g.call(fuse.OpOpen, e.NodeID, body(fuse.OpenIn{})))
}

// A removed file, as a program of the guest sees it.
func TestRemovedFileOnAMount(t *testing.T) {
	mnt := mount(t, tmpfs(t), Config{})
	name := filepath.Join(mnt, "file")
	must(t, os.WriteFile(name, []byte("x"), 0o644))
	fd, err := unix.Open(name, unix.O_PATH|unix.O_CLOEXEC, 0)
	must(t, err)
	defer unix.Close(fd)
	must(t, unix.Unlink(name))
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil || st.Nlink != 0 || st.Size != 1 {
		t.Errorf("fstat: %v, %+v", err, st)
	}
}
