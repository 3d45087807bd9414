// SPDX-License-Identifier: Apache-2.0

package transport

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// dialTimeout bounds a Dial whose context has no nearer deadline: a VMM or a
// vsock transport may simply never answer.
const dialTimeout = 10 * time.Second

// Dial connects to a, within the time of ctx and ten seconds. Once connected,
// the end of ctx means nothing to the Conn.
//
// A vsock connection comes from a source port below 1024 if the process may
// bind one. A hybrid one is returned when the VMM has said OK, and nothing
// behind that line is lost.
func Dial(ctx context.Context, a Addr) (*Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	var (
		c   *Conn
		err error
	)
	switch a.Family {
	case Vsock:
		c, err = dialVsock(ctx, a)
	case Hybrid:
		c, err = dialHybrid(ctx, a)
	case Unix:
		c, err = dialUnix(ctx, a)
	default:
		err = errors.New("no address")
	}
	if err != nil {
		return nil, fmt.Errorf("dial %s: %w", a, explain(opDial, a, err))
	}
	return c, nil
}

// dialUnix connects to a.Path, the socket of a Unix or hybrid address.
func dialUnix(ctx context.Context, a Addr) (*Conn, error) {
	var d net.Dialer
	nc, err := d.DialContext(ctx, "unix", a.Path)
	if err != nil {
		return nil, err
	}
	return adopt(nc, a)
}

// adopt moves the descriptor of nc, a connection over Unix or vsock by way of
// local, into a Conn, raises its buffers and closes nc.
func adopt(nc net.Conn, local Addr) (*Conn, error) {
	defer nc.Close()
	f, err := dup(nc.(syscall.Conn), local.String())
	if err != nil {
		return nil, err
	}
	SetBuffers(f)
	peer, err := peerOf(f, nc.RemoteAddr(), local)
	if err != nil {
		f.Close()
		return nil, err
	}
	return NewConn(f, peer), nil
}

func dialHybrid(ctx context.Context, a Addr) (*Conn, error) {
	c, err := dialUnix(ctx, a)
	if err != nil {
		return nil, err
	}
	stop := context.AfterFunc(ctx, func() { c.SetDeadline(time.Unix(1, 0)) })
	err = connectLine(c, a.Port)
	if !stop() {
		err = ctx.Err()
	}
	if err != nil {
		c.Close()
		return nil, err
	}
	return c, nil
}

// maxLine bounds the VMM's answer; "OK 4294967295\n" needs 14 bytes.
const maxLine = 32

// connectLine asks a VMM for the guest's port and reads its answer,
// "OK port\n" (the port that the VMM chose on its side), byte by byte: what
// comes behind it belongs to the stream.
func connectLine(rw io.ReadWriter, port uint32) error {
	refused := func(err error) error {
		if errors.Is(err, io.EOF) || errors.Is(err, unix.ECONNRESET) || errors.Is(err, unix.EPIPE) {
			return &reason{fmt.Sprintf("the VMM hung up: nothing in the guest listens on port %d; "+
				"start it there or check the port", port), unix.ECONNREFUSED}
		}
		return err
	}
	if _, err := fmt.Fprintf(rw, "CONNECT %d\n", port); err != nil {
		return refused(err)
	}
	line := make([]byte, 0, maxLine)
	for {
		n, err := rw.Read(line[len(line) : len(line)+1])
		line = line[:len(line)+n]
		if n == 1 && line[len(line)-1] == '\n' {
			break
		}
		if err != nil {
			return refused(err)
		}
		if len(line) == maxLine {
			return notVMM(line)
		}
	}
	number, ok := strings.CutPrefix(string(line[:len(line)-1]), "OK ")
	if !ok {
		return notVMM(line)
	}
	if _, err := strconv.ParseUint(number, 10, 32); err != nil {
		return notVMM(line)
	}
	return nil
}

func notVMM(line []byte) error {
	return fmt.Errorf("answered %q to CONNECT, not \"OK PORT\": give the VMM's vsock socket", line)
}
