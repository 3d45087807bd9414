// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"transfused.org/transfused/service/transport"
	"transfused.org/transfused/service/watchdog"
	"transfused.org/transfused/service/wire"
)

const (
	maxPending  = 64                    // connections that have not yet said what they are
	firstTime   = 10 * time.Second      // for them to say it
	refusedTime = time.Second           // between lines about connections that are refused
	argsTime    = 50 * time.Millisecond // for the rest of mount arguments (protocol-v1)
)

// allowed says why p may not dial this guest's socket: only its host may, of which server is the address.
func allowed(p transport.Peer, server transport.Addr, uid uint32) error {
	switch p.Family {
	case transport.Vsock:
		if server.Family != transport.Vsock || p.CID != server.CID {
			return fmt.Errorf("%w: only the host at %s may", unix.EACCES, server)
		}
		if p.CID == transport.CIDLocal && p.Port >= 1024 {
			// Every process of this machine has this CID, and only root such a port.
			return fmt.Errorf("%w: only a port below 1024 of this machine may", unix.EACCES)
		}
		return nil
	case transport.Unix:
		if p.UID != 0 && p.UID != uid {
			return fmt.Errorf("%w: only root and uid %d may", unix.EACCES, uid)
		}
		return nil
	}
	return fmt.Errorf("%w: it is not known who it is", unix.EACCES)
}

// acceptLoop takes the connections that the host dials, until ln is closed.
func (d *Daemon) acceptLoop(ctx context.Context, ln *transport.Listener) {
	var wg sync.WaitGroup
	defer wg.Wait()
	pending := make(chan struct{}, maxPending)
	// Any process of this machine may come here, as often as it likes: not each time is worth a line.
	var last time.Time
	left := 0
	refuse := func(conn *transport.Conn, err error) {
		defer conn.Close()
		if now := time.Now(); now.Sub(last) < refusedTime {
			left++
		} else {
			d.log.Warn("connection refused", "peer", conn.Peer(), "error", err, "left_out_before", left)
			last, left = now, 0
		}
	}
	var loop watchdog.Loop
	loop.Enter(watchdog.WaitPeer)
	defer d.c.Watchdog.Add("the host's socket", &loop)()
	for {
		loop.Enter(watchdog.WaitPeer)
		conn, err := ln.Accept()
		loop.Enter(watchdog.Running)
		if ctx.Err() != nil {
			if err == nil {
				conn.Close()
			}
			return
		}
		if err != nil {
			d.log.Error("accept", "socket", ln.Addr(), "error", err)
			var b backoff
			b.wait(ctx) // out of descriptors, most likely
			continue
		}
		if err := allowed(conn.Peer(), d.c.Server, uint32(os.Geteuid())); err != nil {
			refuse(conn, err)
			continue
		}
		select {
		case pending <- struct{}{}:
		default:
			refuse(conn, fmt.Errorf("%w: %d others have not said what they are", unix.EAGAIN, maxPending))
			continue
		}
		wg.Go(func() {
			stop := context.AfterFunc(ctx, func() { conn.Shutdown() })
			err := d.serveConn(ctx, conn, func() { stop(); <-pending })
			if err != nil && ctx.Err() == nil {
				d.log.Warn("connection ended", "peer", conn.Peer(), "error", err)
			}
		})
	}
}

// serveConn reads what a connection is and serves it. It owns conn; known is called once that is read, or on failure.
func (d *Daemon) serveConn(ctx context.Context, conn *transport.Conn, known func()) error {
	sub, args, err := d.subprotocol(conn)
	known()
	if err != nil {
		conn.Close()
		return err
	}
	if sub == wire.SubEvents {
		return d.pass(ctx, call{Op: opEvents1}, conn)
	}
	return d.mount1(ctx, conn, args)
}

// subprotocol reads the first byte, answers a proof, and reads the arguments of a mount.
func (d *Daemon) subprotocol(conn *transport.Conn) (sub byte, args []byte, err error) {
	// Deadlines of a connection in the poller can be set.
	_ = conn.SetDeadline(time.Now().Add(firstTime))
	first := make([]byte, 1)
	for range 2 {
		if _, err := io.ReadFull(conn, first); err != nil {
			return 0, nil, fmt.Errorf("read the subprotocol: %w", err)
		}
		switch first[0] {
		case wire.SubProof:
			nonce := make([]byte, wire.NonceLen)
			if _, err := io.ReadFull(conn, nonce); err != nil {
				return 0, nil, fmt.Errorf("read a nonce: %w", err)
			}
			proof := wire.Proof(d.c.Token, nonce)
			if _, err := conn.Write(proof[:]); err != nil {
				return 0, nil, fmt.Errorf("answer a nonce: %w", err)
			}
			continue
		case wire.SubMount:
			args, err = readMountArgs(conn)
		case wire.SubEvents:
		default:
			return 0, nil, fmt.Errorf("%w: subprotocol %q is not known", wire.ErrProtocol, first[0])
		}
		_ = conn.SetDeadline(time.Time{})
		return first[0], args, err
	}
	return 0, nil, fmt.Errorf("%w: a second nonce", wire.ErrProtocol)
}

// readMountArgs takes what one read gives, as the original does; more only where that holds no whole mount point.
func readMountArgs(conn *transport.Conn) ([]byte, error) {
	buf := make([]byte, wire.MaxMountArgs+1)
	n := 0
	for n < len(buf) {
		k, err := conn.Read(buf[n:])
		n += k
		if n == 0 && err != nil {
			return nil, fmt.Errorf("read mount arguments: %w", err)
		}
		if _, _, perr := wire.ParseMountArgs(buf[:n]); !errors.Is(perr, wire.ErrIncomplete) || err != nil {
			return buf[:n], perr
		}
		_ = conn.SetReadDeadline(time.Now().Add(argsTime))
	}
	return buf, nil // too long: its parser says so
}

// mount1 is a mount of version 1: conn becomes its stream.
func (d *Daemon) mount1(ctx context.Context, conn *transport.Conn, args []byte) error {
	options, dir, err := wire.ParseMountArgs(args)
	var o MountOptions
	if err == nil {
		if o, err = ParseMountOptions(options); err == nil {
			err = d.mayAsk(o)
		}
	}
	if err != nil {
		conn.Close()
		return fmt.Errorf("mount %s: %w", dir, err)
	}
	e, err := d.want(MountSpec{Dir: dir, Options: options}, false, false)
	if err != nil {
		conn.Close()
		return err
	}
	var m *mount
	sock, err := dupNonblocking(conn)
	conn.Close()
	if err == nil {
		m, _, err = d.mount(ctx, e, mountAsk{options: o, socks: []int{sock}, version: wire.Version1})
	}
	if err != nil {
		d.unlist(e)
		return err
	}
	d.unlistAfter(e, m)
	d.wg.Go(func() {
		if err := d.notify1(m.ctx, m); err != nil && m.ctx.Err() == nil {
			d.log.Warn("notify channel", "dir", m.dir, "error", err)
		}
	})
	return nil
}

func (d *Daemon) notify1(ctx context.Context, m *mount) error {
	conn, err := transport.Dial(ctx, d.c.Server)
	if err != nil {
		return err
	}
	// Deadlines of a connection in the poller can be set. The helper has its own.
	_ = conn.SetWriteDeadline(time.Now().Add(handshakeTime))
	if err := wire.Write(conn, &wire.NotifyOpen{Dir: m.dir}); err != nil {
		conn.Close()
		return err
	}
	return d.passNotify(ctx, m, conn)
}

// mayAsk says whether the host may ask for a mount with o.
func (d *Daemon) mayAsk(o MountOptions) error {
	if o.Suid && !d.c.AllowSuid {
		return fmt.Errorf("%w: option suid is not allowed to the host (--allow-suid)", unix.EPERM)
	}
	if o.Dev && !d.c.AllowDev {
		return fmt.Errorf("%w: option dev is not allowed to the host (--allow-dev)", unix.EPERM)
	}
	return nil
}
