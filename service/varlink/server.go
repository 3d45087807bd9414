// SPDX-License-Identifier: Apache-2.0

package varlink

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"strings"
	"sync"
	"time"

	"transfused.org/transfused/service/transport"
)

// Bounds of a server.
const (
	maxConns     = 256 // of root and the server's own user together
	maxOthers    = 128 // of all other users
	maxUser      = 32  // of one of them
	maxQueued    = 8   // calls of a connection that wait for the one before them
	writeTimeout = 10 * time.Second
	closeTimeout = time.Second // for a reply that is being written when the server ends
)

// Method serves a call. It replies with Call.Reply, Call.Continue, or by an error: an *Error as it is, any other as one without a name of
// its own (Failed of the interface). Where it returns nil without a reply, the reply is empty. ctx ends when the client has gone or the
// server ends; then a method should return soon.
type Method func(ctx context.Context, c *Call) error

// Interface is what a server offers under a name.
type Interface struct {
	Name        string
	Description string // in varlink's language
	Methods     map[string]Method
}

// Server offers interfaces. Its fields are not changed while it serves.
type Server struct {
	Info       Info // Interfaces are filled in
	Interfaces []Interface
	Log        *slog.Logger // of the server's own failures; nil for none
}

// Privileged tells whether a peer is root or this process's own user.
func Privileged(p transport.Peer) bool {
	return p.Family == transport.Unix && (p.UID == 0 || p.UID == uint32(os.Geteuid()))
}

// Call is a call that is being served.
type Call struct {
	Method string // without its interface
	More   bool   // Continue may be called
	OneWay bool   // replies are not sent
	Peer   transport.Peer
	// Files came beside it. They are closed when the method returns.
	Files []*os.File

	parameters json.RawMessage
	stream     *stream
	ending     context.Context // of the connection
	replied    bool
	gone       error // the connection has failed: there is nobody to reply to
}

// Decode decodes the parameters into v, a pointer to a struct. The error is for the caller: return it.
func (c *Call) Decode(v any) error { return decodeParameters(c.parameters, v) }

// Reply sends the last reply, with duplicates of files beside it. Parameters encode to a JSON object; nil is an empty one.
func (c *Call) Reply(parameters any, files ...*os.File) error {
	if c.replied {
		return errors.New("varlink: a second reply to one call")
	}
	b, err := object(parameters)
	if err != nil {
		return err
	}
	if err := c.send(reply{Parameters: b}, files); err != nil {
		return err
	}
	c.replied = true
	return nil
}

// Continue sends a reply that is not the last. Where the caller has not asked for more the error says that to it: return it.
func (c *Call) Continue(parameters any) error {
	if !c.More {
		return NewError(ExpectedMore, nil)
	}
	b, err := object(parameters)
	if err != nil {
		return err
	}
	return c.send(reply{Parameters: b, Continues: true}, nil)
}

func (c *Call) send(r reply, files []*os.File) error {
	if c.OneWay {
		return nil
	}
	timeout := writeTimeout
	if c.ending.Err() != nil {
		timeout = closeTimeout
	}
	c.stream.conn.SetWriteDeadline(time.Now().Add(timeout))
	err := c.stream.send(r, MaxReply, files)
	if err != nil && !errors.Is(err, errTooLong) {
		c.gone = err
	}
	return err
}

// fail sends an error as the last reply.
func (c *Call) fail(failed string, err error) error {
	var e *Error
	if !errors.As(err, &e) {
		e = NewError(failed, map[string]string{"text": err.Error()})
	}
	return c.send(reply{Error: e.Name, Parameters: e.Parameters}, nil)
}

// Serve accepts and serves connections until ctx ends, and then closes l and waits for the calls to end. It owns l. Several listeners may
// be served at once.
func (s *Server) Serve(ctx context.Context, l *transport.Listener) error {
	var wg sync.WaitGroup
	defer wg.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer l.Close()
	defer context.AfterFunc(ctx, func() { l.Close() })()
	g := gate{users: map[uint32]int{}}
	for {
		c, err := l.Accept()
		if ctx.Err() != nil {
			if err == nil {
				c.Close()
			}
			return nil
		}
		if err != nil {
			if errors.Is(err, net.ErrClosed) {
				return err
			}
			// Out of descriptors, most likely: others may be closed soon.
			if s.Log != nil {
				s.Log.Warn("control socket", "err", err)
			}
			select {
			case <-time.After(100 * time.Millisecond):
			case <-ctx.Done():
			}
			continue
		}
		wg.Go(func() { s.conn(ctx, &g, c) })
	}
}

// conn serves a connection and closes it.
func (s *Server) conn(ctx context.Context, g *gate, c *transport.Conn) {
	defer c.Close()
	st, err := newStream(c, MaxCall, Privileged(c.Peer()))
	if err != nil {
		return
	}
	if err := g.enter(c.Peer()); err != nil {
		c.SetWriteDeadline(time.Now().Add(closeTimeout))
		e := NewError(PermissionDenied, map[string]string{"text": err.Error()})
		_ = st.send(reply{Error: e.Name, Parameters: e.Parameters}, MaxReply, nil)
		return
	}
	defer g.leave(c.Peer())
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	// The end of the server ends what is read, and soon what is written.
	defer context.AfterFunc(ctx, func() {
		c.SetReadDeadline(time.Now())
		c.SetWriteDeadline(time.Now().Add(closeTimeout))
	})()
	calls := make(chan *Call, maxQueued)
	var wg sync.WaitGroup
	wg.Go(func() {
		defer close(calls)
		defer cancel()
		read(ctx, st, calls)
	})
	for call := range calls {
		if err == nil {
			err = s.serve(ctx, call)
			if err != nil {
				c.Close() // wakes the reader
			}
		}
		closeAll(call.Files)
	}
	wg.Wait()
	st.drop()
}

// read reads calls until the client is gone or breaks the protocol: then the last call only says why.
func read(ctx context.Context, st *stream, calls chan<- *Call) {
	refuse := func(err error) {
		var e *Error
		if !errors.As(err, &e) {
			e = invalid("", err.Error())
		}
		// A client that pipelined more than may wait is not served the rest.
		select {
		case calls <- &Call{stream: st, ending: ctx, parameters: e.Parameters}:
		default:
		}
	}
	for {
		b, files, err := st.next()
		if err != nil {
			if !errors.Is(err, io.EOF) && !errors.Is(err, os.ErrDeadlineExceeded) && !errors.Is(err, os.ErrClosed) {
				refuse(err)
			}
			return
		}
		c, err := decodeCall(b)
		if err != nil {
			closeAll(files)
			refuse(err)
			return
		}
		call := &Call{Method: c.Method, More: c.More, OneWay: c.OneWay, Peer: st.conn.Peer(), Files: files, parameters: c.Parameters, stream: st, ending: ctx}
		select {
		case calls <- call:
		default:
			closeAll(files)
			return
		}
	}
}

// serve serves a call. An error ends the connection.
func (s *Server) serve(ctx context.Context, c *Call) error {
	if c.Method == "" {
		if err := c.send(reply{Error: InvalidParameter, Parameters: c.parameters}, nil); err != nil {
			return err
		}
		return errors.New("varlink: the protocol was broken")
	}
	dot := strings.LastIndexByte(c.Method, '.')
	full, name := c.Method, c.Method[:dot]
	i, ok := s.find(name)
	if !ok {
		return c.fail("", NewError(InterfaceNotFound, map[string]string{"interface": name}))
	}
	c.Method = full[dot+1:]
	method, ok := i.Methods[c.Method]
	if !ok {
		return c.fail("", NewError(MethodNotFound, map[string]string{"method": full}))
	}
	err := method(ctx, c)
	switch {
	case c.gone != nil:
		return c.gone
	case c.replied:
		return nil
	case err != nil:
		return c.fail(name+".Failed", err)
	}
	return c.Reply(nil)
}

func (s *Server) find(name string) (Interface, bool) {
	if name == service {
		return s.info(), true
	}
	for _, i := range s.Interfaces {
		if i.Name == name {
			return i, true
		}
	}
	return Interface{}, false
}

// gate counts the connections of a listener.
type gate struct {
	mu         sync.Mutex
	users      map[uint32]int
	privileged int
	others     int
}

func (g *gate) enter(p transport.Peer) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	if Privileged(p) {
		if g.privileged >= maxConns {
			return fmt.Errorf("there are %d connections of root already: end some", maxConns)
		}
		g.privileged++
		return nil
	}
	if g.users[p.UID] >= maxUser {
		return fmt.Errorf("uid %d has %d connections already: end some", p.UID, maxUser)
	}
	if g.others >= maxOthers {
		return fmt.Errorf("there are %d connections of users already: try again", maxOthers)
	}
	g.others++
	g.users[p.UID]++
	return nil
}

func (g *gate) leave(p transport.Peer) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if Privileged(p) {
		g.privileged--
		return
	}
	g.others--
	if g.users[p.UID]--; g.users[p.UID] == 0 {
		delete(g.users, p.UID)
	}
}
