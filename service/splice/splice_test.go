// SPDX-License-Identifier: Apache-2.0

package splice

import (
	"bytes"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"transfused.org/transfused/service/fstest"
)

func socketPair(t *testing.T) [2]int {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fds[0]); unix.Close(fds[1]) })
	return fds
}

func newPipe(t *testing.T) *Pipe {
	t.Helper()
	p, err := New()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.Close)
	return p
}

// A file's data go through two pipes and a socket into another file, at places of their own in both.
func TestFileToFile(t *testing.T) {
	fstest.Leaks(t)
	want := make([]byte, MaxData)
	rand.NewChaCha8([32]byte{1}).Read(want)
	dir := t.TempDir()
	from, err := os.Create(filepath.Join(dir, "from"))
	if err != nil {
		t.Fatal(err)
	}
	defer from.Close()
	to, err := os.Create(filepath.Join(dir, "to"))
	if err != nil {
		t.Fatal(err)
	}
	defer to.Close()
	if _, err := from.WriteAt(want, 5000); err != nil {
		t.Fatal(err)
	}
	a, b, s := newPipe(t), newPipe(t), socketPair(t)
	head := []byte("header")
	if err := a.Write(head); err != nil {
		t.Fatal(err)
	}
	off := int64(5000)
	for in := 0; in < MaxData; {
		n, err := a.Take(int(from.Fd()), &off, MaxData-in)
		if err != nil {
			t.Fatalf("%d bytes are in the pipe: %v", in, err)
		}
		in += n
	}
	toOff := int64(3)
	for sent, got, headed := 0, 0, false; got < MaxData; {
		if sent < len(head)+MaxData {
			n, err := a.Give(s[0], nil, len(head)+MaxData-sent)
			if err != nil && err != unix.EAGAIN {
				t.Fatal(err)
			}
			sent += n
		}
		if !headed {
			n, err := b.Take(s[1], nil, len(head))
			if n != len(head) {
				t.Fatal(n, err)
			}
			h := make([]byte, n)
			if err := b.Read(h); err != nil || !bytes.Equal(h, head) {
				t.Fatalf("%q: %v", h, err)
			}
			headed = true
		}
		n, err := b.Take(s[1], nil, MaxData-got)
		if err != nil && err != unix.EAGAIN {
			t.Fatal(err)
		}
		for n > 0 {
			m, err := b.Give(int(to.Fd()), &toOff, n)
			if err != nil {
				t.Fatal(err)
			}
			n, got = n-m, got+m
		}
	}
	got := make([]byte, MaxData)
	if _, err := to.ReadAt(got, 3); err != nil || !bytes.Equal(got, want) {
		t.Errorf("not the same data: %v", err)
	}
}

// Many small pieces fill a pipe long before so many bytes would.
func TestFull(t *testing.T) {
	fstest.Leaks(t)
	p, s := newPipe(t), socketPair(t)
	sent, got := 0, 0
	for !p.Full() {
		if sent > 4096 {
			t.Fatalf("%d pieces, and it is not full", sent)
		}
		if _, err := unix.Write(s[0], []byte{byte(sent)}); err != nil {
			t.Fatal(err)
		}
		sent++
		n, err := p.Take(s[1], nil, 100)
		if err != nil {
			t.Fatal(err)
		}
		got += n
	}
	if n, err := p.Take(s[1], nil, 1); n != 0 || err != unix.EAGAIN {
		t.Errorf("took %d of a full pipe: %v", n, err)
	}
	b := make([]byte, got)
	if err := p.Read(b); err != nil {
		t.Fatal(err)
	}
	for i := range b {
		if b[i] != byte(i) {
			t.Fatalf("byte %d is %d", i, b[i])
		}
	}
	if p.Full() {
		t.Error("full, with nothing in it")
	}
	if n, err := p.Take(s[1], nil, 1); n != 0 || err != unix.EAGAIN {
		t.Errorf("took %d of an empty socket: %v", n, err)
	}
}

func TestSaves(t *testing.T) {
	fstest.Leaks(t)
	if s := socketPair(t); !Saves(s[0]) {
		t.Error("not a Unix socket?")
	}
	inet, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(inet)
	if Saves(inet) {
		t.Error("a socket of the Internet")
	}
	p := newPipe(t)
	if Saves(p.r) {
		t.Error("a pipe")
	}
}
