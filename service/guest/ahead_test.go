// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"transfused.org/transfused/service/fstest"
	"transfused.org/transfused/service/fuse"
)

// dialogue drives shortcuts as the pump does.
type dialogue struct {
	shortcuts
	unique uint64
}

func newDialogue(noFlush bool) *dialogue {
	return &dialogue{shortcuts: shortcuts{noFlush: noFlush, locked: map[uint64]struct{}{}, releasing: map[uint64]struct{}{}}}
}

// ask sends a request; ok tells whether it was answered here.
func (d *dialogue) ask(op fuse.Opcode, node uint64, body ...byte) (unique uint64, ok bool) {
	d.unique += 2
	if op == fuse.OpGetattr && body == nil {
		body = make([]byte, 16)
	}
	answer := d.request(&fuse.InHeader{Opcode: op, Unique: d.unique, NodeID: node}, body)
	if answer != nil {
		var h fuse.OutHeader
		if fuse.Decode(&h, answer); int(h.Len) != len(answer) || h.Unique != d.unique || h.Error != 0 && op != fuse.OpGetxattr {
			panic("a malformed answer")
		}
	}
	return d.unique, answer != nil
}

// ahead tells attributes ahead.
func (d *dialogue) ahead(a fuse.AheadOut) {
	if !d.told(fuse.Append(fuse.Append(nil, &fuse.OutHeader{Error: fuse.AheadCode}), &a)) {
		panic("not taken for what it is")
	}
}

// done is a request with its reply.
func (d *dialogue) done(op fuse.Opcode, node uint64, body ...byte) {
	if u, ok := d.ask(op, node, body...); !ok {
		d.replied(message(u, 0, nil))
	}
}

// change is a change with what is told ahead of its reply.
func (d *dialogue) change(op fuse.Opcode, node uint64) {
	u, _ := d.ask(op, node)
	d.ahead(fuse.AheadOut{Unique: u, NodeID: node})
	d.replied(message(u, 0, nil))
}

func (d *dialogue) getattr(node uint64) bool {
	u, ok := d.ask(fuse.OpGetattr, node)
	if !ok {
		d.replied(message(u, 0, nil))
	}
	return ok
}

func TestAttributesAhead(t *testing.T) {
	const dir, other = 5, 6
	for _, tt := range []struct {
		name string
		do   func(d *dialogue)
		want bool // GETATTR of dir is answered here
	}{
		{"nothing told", func(d *dialogue) {}, false},
		{"told", func(d *dialogue) { d.change(fuse.OpUnlink, dir) }, true},
		{"asked already", func(d *dialogue) { d.change(fuse.OpUnlink, dir); d.getattr(dir) }, false},
		{"of another directory", func(d *dialogue) { d.change(fuse.OpUnlink, other) }, false},
		{"too late", func(d *dialogue) { d.change(fuse.OpUnlink, dir); d.until = time.Now() }, false},
		{"no change told", func(d *dialogue) { d.done(fuse.OpUnlink, dir) }, false},
		{"told of another request", func(d *dialogue) {
			u, _ := d.ask(fuse.OpUnlink, dir)
			d.ahead(fuse.AheadOut{Unique: u + 2, NodeID: dir})
			d.replied(message(u, 0, nil))
		}, false},
		{"told of another node", func(d *dialogue) {
			u, _ := d.ask(fuse.OpUnlink, other)
			d.ahead(fuse.AheadOut{Unique: u, NodeID: dir})
			d.replied(message(u, 0, nil))
		}, false},
		{"told unasked", func(d *dialogue) { d.ahead(fuse.AheadOut{NodeID: dir}) }, false},
		{"told, and then what does not change it", func(d *dialogue) {
			d.change(fuse.OpCreate, dir)
			d.done(fuse.OpLookup, dir)
			d.done(fuse.OpWrite, other)
			d.done(fuse.OpSetattr, other)
			d.done(fuse.OpFlush, other)
			d.ask(fuse.OpForget, other)
			d.ask(fuse.OpRelease, other)
		}, true},
		{"told, and then another change", func(d *dialogue) { d.change(fuse.OpCreate, dir); d.done(fuse.OpMkdir, other) }, false},
		{"told, and then its own attributes set", func(d *dialogue) { d.change(fuse.OpCreate, dir); d.done(fuse.OpSetattr, dir) }, false},
		{"told, and then read", func(d *dialogue) { d.change(fuse.OpCreate, dir); d.done(fuse.OpReaddir, dir) }, false},
		{"another request was at the host", func(d *dialogue) {
			d.ask(fuse.OpWrite, other)
			d.change(fuse.OpUnlink, dir)
		}, false},
		{"a release was at the host", func(d *dialogue) {
			u, _ := d.ask(fuse.OpRelease, other)
			d.change(fuse.OpUnlink, dir)
			d.replied(message(u, 0, nil))
		}, true},
		{"a release came back, and another request did not", func(d *dialogue) {
			d.ask(fuse.OpWrite, other)
			u, _ := d.ask(fuse.OpRelease, other)
			d.replied(message(u, 0, nil))
			d.change(fuse.OpUnlink, dir)
		}, false},
		{"an interrupt was at the host", func(d *dialogue) {
			d.ask(fuse.OpInterrupt, other)
			d.replied(message(d.unique|1, 0, nil))
			d.change(fuse.OpUnlink, dir)
		}, true},
		// Two changes at once: the host may have done them, and told of them, in any order.
		{"two, the first told first", func(d *dialogue) {
			a, _ := d.ask(fuse.OpUnlink, dir)
			b, _ := d.ask(fuse.OpMkdir, dir)
			d.ahead(fuse.AheadOut{Unique: a, NodeID: dir})
			d.replied(message(a, 0, nil))
			d.ahead(fuse.AheadOut{Unique: b, NodeID: dir})
			d.replied(message(b, 0, nil))
		}, false},
		{"two, the second told first", func(d *dialogue) {
			a, _ := d.ask(fuse.OpUnlink, dir)
			b, _ := d.ask(fuse.OpMkdir, dir)
			d.ahead(fuse.AheadOut{Unique: b, NodeID: dir})
			d.replied(message(b, 0, nil))
			d.ahead(fuse.AheadOut{Unique: a, NodeID: dir})
			d.replied(message(a, 0, nil))
		}, false},
		{"two, the second asked between telling and asking", func(d *dialogue) {
			a, _ := d.ask(fuse.OpUnlink, dir)
			d.ahead(fuse.AheadOut{Unique: a, NodeID: dir})
			d.ask(fuse.OpMkdir, dir)
			d.replied(message(a, 0, nil))
		}, false},
		{"one after two", func(d *dialogue) {
			a, _ := d.ask(fuse.OpUnlink, dir)
			b, _ := d.ask(fuse.OpMkdir, dir)
			d.replied(message(b, 0, nil))
			d.replied(message(a, 0, nil))
			d.change(fuse.OpRmdir, dir)
		}, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			d := newDialogue(false)
			if tt.do(d); d.getattr(dir) != tt.want {
				t.Errorf("answered here: %v, want %v", !tt.want, tt.want)
			}
		})
	}
	t.Run("of a file handle", func(t *testing.T) {
		d := newDialogue(false)
		d.change(fuse.OpUnlink, dir)
		if _, ok := d.ask(fuse.OpGetattr, dir, append([]byte{fuse.GETATTR_FH}, make([]byte, 15)...)...); ok {
			t.Error("answered here")
		}
	})
}

func TestFlushWithoutTheHost(t *testing.T) {
	flushed := func(d *dialogue, node uint64) bool { _, ok := d.ask(fuse.OpFlush, node, []byte{1, 7: 0}...); return ok }
	if flushed(newDialogue(false), 5) {
		t.Error("answered here, without no_flush")
	}
	d := newDialogue(true)
	if !flushed(d, 5) {
		t.Error("not answered here")
	}
	if _, ok := d.ask(fuse.OpFlush, 5, make([]byte, 8)...); ok {
		t.Error("answered here, for a file that was not opened: the kernel would ask each time")
	}
	d.done(fuse.OpSetlk, 5)
	d.done(fuse.OpSetlkw, 6)
	if flushed(d, 5) || flushed(d, 6) || !flushed(d, 7) {
		t.Error("a FLUSH of a locked file must go to the host, and of no other")
	}
	for node := uint64(10); node < 10+maxLocked; node++ {
		d.done(fuse.OpSetlk, node)
	}
	if flushed(d, 7) || len(d.locked) > maxLocked {
		t.Errorf("with %d locked files each FLUSH must go to the host", len(d.locked))
	}
}

// The end of a directory is told with its last entries, and is the answer to the next question alone.
func TestEndOfDirectory(t *testing.T) {
	const dir, other, end = 5, 6, 1 << 40
	readdir := func(d *dialogue, op fuse.Opcode, node, off uint64) bool {
		u, ok := d.ask(op, node, fuse.Append(nil, &fuse.ReadIn{Offset: off, Size: 4096})...)
		if !ok {
			d.replied(message(u, 0, nil))
		}
		return ok
	}
	read := func(d *dialogue, node uint64) {
		readdir(d, fuse.OpReaddirplus, node, 0)
		if !d.told(fuse.Append(fuse.Append(nil, &fuse.OutHeader{Error: fuse.EndCode}), &fuse.EndOut{NodeID: node, Offset: end})) {
			panic("not taken for what it is")
		}
	}
	for _, tt := range []struct {
		name string
		do   func(d *dialogue)
		op   fuse.Opcode
		off  uint64
		want bool // answered here
	}{
		{"told", func(d *dialogue) { read(d, dir) }, fuse.OpReaddir, end, true},
		{"told, with attributes", func(d *dialogue) { read(d, dir) }, fuse.OpReaddirplus, end, true},
		{"told, and others asked", func(d *dialogue) { read(d, dir); d.done(fuse.OpLookup, dir); d.done(fuse.OpWrite, other) }, fuse.OpReaddir, end, true},
		{"not told", func(d *dialogue) { readdir(d, fuse.OpReaddirplus, dir, 0) }, fuse.OpReaddir, end, false},
		{"the beginning", func(d *dialogue) { read(d, dir) }, fuse.OpReaddir, 0, false},
		{"somewhere else", func(d *dialogue) { read(d, dir) }, fuse.OpReaddir, end - 1, false},
		{"of another", func(d *dialogue) { read(d, other) }, fuse.OpReaddir, end, false},
		{"asked already", func(d *dialogue) { read(d, dir); readdir(d, fuse.OpReaddir, dir, end) }, fuse.OpReaddir, end, false},
		{"too late", func(d *dialogue) { read(d, dir); d.endUntil = time.Now() }, fuse.OpReaddir, end, false},
		{"a name was made", func(d *dialogue) { read(d, dir); d.done(fuse.OpMkdir, dir) }, fuse.OpReaddir, end, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			d := newDialogue(false)
			tt.do(d)
			if ok := readdir(d, tt.op, dir, tt.off); ok != tt.want {
				t.Errorf("answered here: %v, want %v", ok, tt.want)
			}
		})
	}
	for _, msg := range [][]byte{
		fuse.Append(nil, &fuse.OutHeader{Error: fuse.EndCode}),
		append(fuse.Append(fuse.Append(nil, &fuse.OutHeader{Error: fuse.EndCode}), &fuse.EndOut{}), 0),
		fuse.Append(fuse.Append(nil, &fuse.OutHeader{Error: fuse.AheadCode}), &fuse.EndOut{}),
		fuse.Append(fuse.Append(nil, &fuse.OutHeader{Error: fuse.EndCode + 1}), &fuse.EndOut{}),
	} {
		if newDialogue(false).told(msg) {
			t.Errorf("% x was taken for something else", msg)
		}
	}
}

// What was just made has no capabilities, and nothing else of it is known here.
func TestNewFileHasNoCapabilities(t *testing.T) {
	const dir, node = 5, 6
	excl := binary.LittleEndian.AppendUint32(nil, unix.O_CREAT|unix.O_EXCL)
	create := func(d *dialogue, flags []byte, errno fuse.Errno) {
		u, _ := d.ask(fuse.OpCreate, dir, flags...)
		d.replied(message(u, errno, fuse.Append(nil, &fuse.EntryOut{NodeID: node})))
	}
	name := func(s string) []byte { return append(make([]byte, 8), s+"\x00"...) }
	for _, tt := range []struct {
		what string
		do   func(d *dialogue)
		node uint64
		name string
		want bool // GETXATTR is answered here
	}{
		{"made", func(d *dialogue) { create(d, excl, 0) }, node, "security.capability", true},
		{"made, and its attributes asked", func(d *dialogue) { create(d, excl, 0); d.getattr(node) }, node, "security.capability", true},
		{"made, and another written", func(d *dialogue) { create(d, excl, 0); d.done(fuse.OpWrite, 9) }, node, "security.capability", true},
		{"another attribute", func(d *dialogue) { create(d, excl, 0) }, node, "security.capabilities", false},
		{"of another node", func(d *dialogue) { create(d, excl, 0) }, 9, "security.capability", false},
		{"of the directory", func(d *dialogue) { create(d, excl, 0) }, dir, "security.capability", false},
		{"perhaps not new", func(d *dialogue) { create(d, excl[:0:0], 0); create(d, make([]byte, 4), 0) }, node, "security.capability", false},
		{"not made", func(d *dialogue) { create(d, excl, unix.EEXIST) }, node, "security.capability", false},
		{"too late", func(d *dialogue) { create(d, excl, 0); d.createdEnd = time.Now() }, node, "security.capability", false},
		{"given some", func(d *dialogue) { create(d, excl, 0); d.done(fuse.OpSetxattr, node) }, node, "security.capability", false},
		{"asked before", func(d *dialogue) {
			create(d, excl, 0)
			d.ask(fuse.OpGetxattr, node, name("security.capability")...)
		}, node, "security.capability", false},
		{"another made", func(d *dialogue) {
			create(d, excl, 0)
			u, _ := d.ask(fuse.OpCreate, dir, excl...)
			d.replied(message(u, 0, fuse.Append(nil, &fuse.EntryOut{NodeID: 9})))
		}, node, "security.capability", false},
	} {
		t.Run(tt.what, func(t *testing.T) {
			d := newDialogue(false)
			tt.do(d)
			if _, ok := d.ask(fuse.OpGetxattr, tt.node, name(tt.name)...); ok != tt.want {
				t.Errorf("answered here: %v, want %v", ok, tt.want)
			}
		})
	}
}

// pumpWith is pumpTo with options, and a kernel that checks permissions.
func pumpWith(t *testing.T, s *tinyFS, o PumpOptions) (dir string, p *Pump, stop func() error) {
	t.Helper()
	needRoot(t)
	dir = t.TempDir()
	dev, err := Mount(dir, MountOptions{Source: "tiny", DefaultPermissions: true})
	if err != nil {
		t.Fatal(err)
	}
	a, b := streamPair(t)
	if p, err = NewPump(dev, a, o); err != nil {
		t.Fatal(err)
	}
	served, ran := make(chan struct{}), make(chan error, 1)
	go func() { defer close(served); s.serve(b); b.Close() }()
	go func() { ran <- p.Run() }()
	return dir, p, func() error {
		unix.Unmount(dir, unix.MNT_DETACH)
		err := <-ran
		<-served
		return err
	}
}

// mkdirs is a server that makes directories, tells their parent's attributes ahead, and counts the GETATTRs that reach it.
func mkdirs(getattrs *atomic.Int64, extra int) *tinyFS {
	s := &tinyFS{}
	s.handle = func(h fuse.InHeader, body []byte) []byte {
		switch h.Opcode {
		case fuse.OpGetattr:
			getattrs.Add(1)
		case fuse.OpMkdir:
			ahead := fuse.AheadOut{Unique: h.Unique, NodeID: h.NodeID, Attr: fuse.AttrOut{AttrValid: 100, Attr: s.attr(h.NodeID)}}
			ahead.Attr.Attr.Mtime = 4711
			msg := fuse.Append(nil, &fuse.OutHeader{Len: uint32(fuse.OutHeaderSize + fuse.AheadOutSize + extra), Error: fuse.AheadCode})
			msg = append(fuse.Append(msg, &ahead), make([]byte, extra)...)
			return append(msg, message(h.Unique, 0, fuse.Append(nil, &fuse.EntryOut{NodeID: h.Unique, EntryValid: 100, AttrValid: 100, Attr: s.attr(1)}))...)
		}
		return nil
	}
	return s
}

func TestPumpTellsAttributesAhead(t *testing.T) {
	fstest.Leaks(t)
	var getattrs atomic.Int64
	dir, p, stop := pumpWith(t, mkdirs(&getattrs, 0), PumpOptions{Ahead: true})
	if err := unix.Mkdir(filepath.Join(dir, "first"), 0o755); err != nil {
		t.Fatal(err)
	}
	before := getattrs.Load()
	var st unix.Stat_t
	if err := unix.Stat(dir, &st); err != nil || st.Mtim.Sec != 4711 {
		t.Errorf("the directory's mtime is %d, want what was told ahead, 4711; %v", st.Mtim.Sec, err)
	}
	if n := getattrs.Load() - before; n != 0 || p.Stats().Answered == 0 {
		t.Errorf("%d GETATTR went to the host, %d were answered here", n, p.Stats().Answered)
	}
	if err := stop(); err != nil {
		t.Error(err)
	}
}

func TestPumpRefusesWhatWasNotAgreed(t *testing.T) {
	for _, tt := range []struct {
		name  string
		o     PumpOptions
		extra int
	}{{"version 1", PumpOptions{}, 0}, {"too long", PumpOptions{Ahead: true}, 8}} {
		t.Run(tt.name, func(t *testing.T) {
			fstest.Leaks(t)
			var getattrs atomic.Int64
			dir, p, stop := pumpWith(t, mkdirs(&getattrs, tt.extra), tt.o)
			if err := unix.Mkdir(filepath.Join(dir, "first"), 0o755); err == nil {
				t.Error("mkdir succeeded")
			}
			<-p.Done()
			if err := stop(); !errors.Is(err, ErrProtocol) {
				t.Errorf("Run: %v, want %v", err, ErrProtocol)
			}
		})
	}
}

func TestPumpAnswersFlush(t *testing.T) {
	fstest.Leaks(t)
	var flushes atomic.Int64
	s := &tinyFS{initOut: fuse.InitOut{Major: 7, Minor: fuse.Minor, MaxReadahead: 1 << 17, MaxWrite: MaxData, TimeGran: 1, Flags: uint32(fuse.POSIX_LOCKS)}}
	s.handle = func(h fuse.InHeader, body []byte) []byte {
		switch h.Opcode {
		case fuse.OpFlush:
			flushes.Add(1)
		case fuse.OpSetlk:
			return message(h.Unique, 0, nil)
		}
		return nil
	}
	dir, _, stop := pumpWith(t, s, PumpOptions{NoFlush: true})
	name := filepath.Join(dir, "hello")
	if err := writeFile(name, 10); err != nil || flushes.Load() != 0 {
		t.Errorf("%v; %d FLUSHes reached the host", err, flushes.Load())
	}
	fd, err := unix.Open(name, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	lk := unix.Flock_t{Type: unix.F_WRLCK, Whence: unix.SEEK_SET}
	if err := unix.FcntlFlock(uintptr(fd), unix.F_SETLK, &lk); err != nil {
		t.Error(os.NewSyscallError("lock", err))
	}
	unix.Close(fd)
	if flushes.Load() != 1 {
		t.Errorf("%d FLUSHes of a locked file reached the host, want 1", flushes.Load())
	}
	if err := stop(); err != nil {
		t.Error(err)
	}
}

// A host that reads nothing more until it has been read from gets all the same what it needs: neither end waits for the other.
func TestPumpWritesAndReadsAtOnce(t *testing.T) {
	dev, kernel := fakeDevice(t)
	a, b := streamPair(t)
	p, err := NewPump(dev, a, PumpOptions{})
	if err != nil {
		t.Fatal(err)
	}
	ran := make(chan error, 1)
	go func() { ran <- p.Run() }()
	// More of both than the buffers of the sockets hold.
	const requests, size, replies = 64, 100 << 10, 64
	unix.SetsockoptInt(kernel, unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, 16<<20)
	if err := unix.SetNonblock(kernel, false); err != nil {
		t.Fatal(err)
	}
	request := make([]byte, size)
	fuse.Put(request, &fuse.InHeader{Len: size, Opcode: fuse.OpWrite, Unique: 2})
	sent := make(chan error, 1)
	go func() {
		for range requests {
			if _, err := unix.Write(kernel, request); err != nil {
				sent <- err
				return
			}
		}
		sent <- nil
	}()
	go func() { // the kernel's side takes replies
		buf := make([]byte, size)
		for {
			if n, err := unix.Read(kernel, buf); n <= 0 || err != nil {
				return
			}
		}
	}()
	// The host writes all its replies before it reads a single request.
	reply := message(4, 0, make([]byte, size-fuse.OutHeaderSize))
	b.SetDeadline(time.Now().Add(30 * time.Second))
	for range replies {
		if _, err := b.Write(reply); err != nil {
			t.Fatalf("the pump does not take replies while it waits to write: %v", err)
		}
	}
	buf := make([]byte, size)
	for got := 0; got < requests*size; {
		n, err := b.Read(buf)
		if err != nil {
			t.Fatal(err)
		}
		got += n
	}
	if err := <-sent; err != nil {
		t.Error(err)
	}
	p.Close()
	if err := <-ran; !errors.Is(err, os.ErrClosed) {
		t.Error(err)
	}
	unix.Shutdown(kernel, unix.SHUT_RDWR)
}
