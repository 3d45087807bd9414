// SPDX-License-Identifier: Apache-2.0

package transport

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/mdlayher/vsock"
	"golang.org/x/sys/unix"
)

// Listener waits for connections. It owns its socket, and the socket's file
// if Listen made it.
type Listener struct {
	ln    net.Listener // *net.UnixListener or *vsock.Listener
	addr  Addr
	close func() error
}

// Listen listens on a. The file of a Unix or hybrid address is made with mode
// 0600; one that a dead process left is replaced, one that is listened on is
// an error that is unix.EADDRINUSE.
func Listen(a Addr) (*Listener, error) {
	l, err := listen(a)
	if err != nil {
		return nil, fmt.Errorf("listen %s: %w", a, explain(opListen, a, err))
	}
	return l, nil
}

func listen(a Addr) (*Listener, error) {
	switch a.Family {
	case Vsock:
		ln, err := vsock.ListenContextID(a.CID, a.Port, nil)
		if err != nil {
			return nil, err
		}
		return newVsockListener(ln), nil
	case Hybrid, Unix:
		path := a.socketPath()
		if err := checkPath(path); err != nil {
			return nil, err
		}
		ln, made, err := listenUnix(path)
		if err != nil {
			return nil, err
		}
		return newListener(ln, a, func() { removeSame(path, made) }), nil
	}
	return nil, errors.New("no address")
}

func newListener(ln net.Listener, a Addr, cleanup func()) *Listener {
	return &Listener{ln: ln, addr: a, close: sync.OnceValue(func() error {
		// While the socket is open its file's inode can't be another's.
		cleanup()
		return ln.Close()
	})}
}

func newVsockListener(ln *vsock.Listener) *Listener {
	a := ln.Addr().(*vsock.Addr)
	return newListener(ln, Addr{Family: Vsock, CID: a.ContextID, Port: a.Port}, func() {})
}

// FromFile makes a Listener of an inherited listening socket, vsock or Unix,
// and closes f, whether or not it fails. The socket's file is not removed by
// Close. A socket at a path of hybrid vsock can't be told from others: it is
// Unix.
func FromFile(f *os.File) (*Listener, error) {
	defer f.Close()
	l, err := fromFile(f)
	if err != nil {
		return nil, fmt.Errorf("inherited socket %s: %w", f.Name(), err)
	}
	return l, nil
}

// HybridFromFile is FromFile for a socket at which a VMM with hybrid vsock
// connects: a Unix socket at PATH_PORT.
func HybridFromFile(f *os.File) (*Listener, error) {
	l, err := FromFile(f)
	if err != nil {
		return nil, err
	}
	at := strings.LastIndexByte(l.addr.Path, '_')
	n, err := strconv.ParseUint(l.addr.Path[at+1:], 10, 32)
	if l.addr.Family != Unix || at <= 0 || err != nil {
		l.Close()
		return nil, fmt.Errorf("inherited socket %s: %s is no socket of hybrid vsock; use ListenStream=PATH_PORT, PATH being the VMM's", f.Name(), l.addr)
	}
	l.addr = Addr{Family: Hybrid, Path: l.addr.Path[:at], Port: uint32(n)}
	return l, nil
}

func fromFile(f *os.File) (*Listener, error) {
	raw, err := f.SyscallConn()
	if err != nil {
		return nil, err
	}
	var domain, typ, accepts int
	err = control(raw, func(fd int) (err error) {
		for opt, v := range map[int]*int{unix.SO_DOMAIN: &domain, unix.SO_TYPE: &typ, unix.SO_ACCEPTCONN: &accepts} {
			if *v, err = unix.GetsockoptInt(fd, unix.SOL_SOCKET, opt); err != nil {
				return os.NewSyscallError("getsockopt", err)
			}
		}
		return nil
	})
	switch {
	case errors.Is(err, unix.ENOTSOCK):
		return nil, &reason{"it is no socket; pass a listening stream socket", err}
	case err != nil:
		return nil, err
	case domain != unix.AF_VSOCK && domain != unix.AF_UNIX:
		return nil, fmt.Errorf("its address family is %d, neither vsock (%d) nor Unix (%d)", domain, unix.AF_VSOCK, unix.AF_UNIX)
	case typ != unix.SOCK_STREAM || accepts == 0:
		return nil, errors.New("it is no listening stream socket; use ListenStream= and Accept=no")
	}
	if domain == unix.AF_VSOCK {
		ln, err := vsock.FileListener(f)
		if err != nil {
			return nil, err
		}
		return newVsockListener(ln), nil
	}
	ln, err := net.FileListener(f)
	if err != nil {
		return nil, err
	}
	a := Addr{Family: Unix, Path: ln.Addr().String()}
	if err := checkPath(a.Path); err != nil {
		ln.Close()
		return nil, err
	}
	return newListener(ln, a, func() {}), nil
}

// Accept waits for a connection; its buffers are raised. The error is
// net.ErrClosed after Close; any other is this process's (EMFILE): waiting a
// little before the next Accept is wise.
func (l *Listener) Accept() (*Conn, error) {
	nc, err := l.ln.Accept()
	if errors.Is(err, unix.EBADF) {
		err = net.ErrClosed // in mdlayher/socket's words
	}
	if err != nil {
		return nil, fmt.Errorf("accept on %s: %w", l.addr, err)
	}
	c, err := adopt(nc, l.addr)
	if err != nil {
		return nil, fmt.Errorf("accept on %s: %w", l.addr, err)
	}
	return c, nil
}

// Addr is the address listened on, with the port that the kernel chose.
func (l *Listener) Addr() Addr { return l.addr }

// Close wakes Accept and removes the socket's file if Listen made it and it
// is still the same. Accepted connections stay.
func (l *Listener) Close() error { return l.close() }

// listenUnix listens at path and returns what identifies the file it made.
func listenUnix(path string) (net.Listener, fs.FileInfo, error) {
	defer lockDir(filepath.Dir(path))()
	ln, err := bindUnix(path)
	if errors.Is(err, unix.EADDRINUSE) {
		if err := removeStale(path); err != nil {
			return nil, nil, err
		}
		ln, err = bindUnix(path)
	}
	if err != nil {
		return nil, nil, err
	}
	made, err := os.Lstat(path)
	if err != nil {
		ln.Close()
		return nil, nil, err
	}
	return ln, made, nil
}

// bindUnix binds and listens. bind(2) gives the file the mode of the socket,
// so that it is never open to others, not even for a moment.
func bindUnix(path string) (net.Listener, error) {
	lc := net.ListenConfig{Control: func(_, _ string, raw syscall.RawConn) error {
		return control(raw, func(fd int) error { return os.NewSyscallError("fchmod", unix.Fchmod(fd, 0o600)) })
	}}
	ln, err := lc.Listen(context.Background(), "unix", path)
	if err != nil {
		return nil, err
	}
	// It would remove whatever is at path then, ours or not.
	ln.(*net.UnixListener).SetUnlinkOnClose(false)
	return ln, nil
}

// removeStale removes the socket at path if nobody listens on it.
func removeStale(path string) error {
	info, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if info.Mode().Type() != fs.ModeSocket {
		return &reason{"a file that is no socket is in the way; remove it or choose another path", unix.EADDRINUSE}
	}
	c, err := net.DialTimeout("unix", path, time.Second)
	if err == nil {
		c.Close()
	}
	if !errors.Is(err, unix.ECONNREFUSED) {
		return unix.EADDRINUSE
	}
	removeSame(path, info)
	return nil
}

// removeSame removes path if it still is that file. It tells no error: a file
// left behind is found stale by the next Listen.
func removeSame(path string, file fs.FileInfo) {
	if now, err := os.Lstat(path); err == nil && os.SameFile(now, file) {
		_ = os.Remove(path)
	}
}

// lockDir makes the processes that bind sockets in dir take turns, so that
// none finds the fresh socket of another stale, between its bind and listen.
// A lock that cannot be had within a second is done without: whoever holds it
// is not one of us.
func lockDir(dir string) (unlock func()) {
	d, err := os.Open(dir)
	if err != nil {
		return func() {} // bind tells the reason, or needs no reading here
	}
	for range 100 {
		if unix.Flock(int(d.Fd()), unix.LOCK_EX|unix.LOCK_NB) == nil {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	return func() { d.Close() }
}
