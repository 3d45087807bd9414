// SPDX-License-Identifier: Apache-2.0

package varlink

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"transfused.org/transfused/service/transport"
)

// Client is a connection to a service. Calls take turns. A call whose context ends, or which fails otherwise than by an *Error, leaves the
// connection of no use: varlink can't take a call back.
type Client struct {
	mu     sync.Mutex // serializes calls
	stream *stream
	broken error
}

// Dial connects to the service at the Unix socket path.
func Dial(ctx context.Context, path string) (*Client, error) {
	c, err := transport.Dial(ctx, transport.Addr{Family: transport.Unix, Path: path})
	if err != nil {
		return nil, err
	}
	st, err := newStream(c, MaxReply, true)
	if err != nil {
		c.Close()
		return nil, err
	}
	return &Client{stream: st}, nil
}

// Peer is who listens, at the time of its listen(2): with socket activation PID 1.
func (c *Client) Peer() transport.Peer { return c.stream.conn.Peer() }

// Close ends the connection, and with it a call that is under way.
func (c *Client) Close() error {
	err := c.stream.close()
	c.mu.Lock()
	defer c.mu.Unlock()
	c.stream.drop()
	return err
}

// Call calls a method, named with its interface, and decodes the reply's parameters into out unless that is nil. Duplicates of files go
// beside the call. The files that came with the reply are the caller's. A failure that the service tells is an *Error.
func (c *Client) Call(ctx context.Context, method string, in, out any, files ...*os.File) (got []*os.File, err error) {
	err = c.do(ctx, call{Method: method}, in, files, func(b json.RawMessage, f []*os.File) error {
		got = f
		if out == nil {
			return nil
		}
		return json.Unmarshal(b, out)
	})
	if err != nil {
		closeAll(got)
		got = nil
	}
	return got, err
}

// More calls a method that has more than one reply, and f with the parameters of each, until the last one, an error of f or the end of ctx.
func (c *Client) More(ctx context.Context, method string, in any, f func(parameters json.RawMessage) error) error {
	return c.do(ctx, call{Method: method, More: true}, in, nil, func(b json.RawMessage, files []*os.File) error {
		closeAll(files) // no method has them here
		return f(b)
	})
}

func (c *Client) do(ctx context.Context, call call, in any, files []*os.File, f func(json.RawMessage, []*os.File) error) (err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.broken != nil {
		return c.broken
	}
	if call.Parameters, err = object(in); err != nil {
		return err
	}
	defer context.AfterFunc(ctx, func() { c.stream.conn.SetDeadline(time.Unix(1, 0)) })()
	ended := func(err error) error {
		c.broken = fmt.Errorf("an earlier call on this connection failed: %w", err)
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
			return fmt.Errorf("%s: the service has ended the connection: %w", call.Method, io.ErrUnexpectedEOF)
		}
		return fmt.Errorf("%s: %w", call.Method, err)
	}
	// A service that refuses the connection may have said so and gone before it reads.
	if err := c.stream.send(call, MaxCall, files); err != nil && !errors.Is(err, unix.EPIPE) {
		return ended(err)
	}
	for {
		b, files, err := c.stream.next()
		if err != nil {
			return ended(err)
		}
		var r reply
		if err := json.Unmarshal(b, &r); err != nil {
			closeAll(files)
			return ended(err)
		}
		if r.Error != "" {
			closeAll(files)
			return &Error{Name: r.Error, Parameters: r.Parameters}
		}
		if len(r.Parameters) == 0 {
			r.Parameters = json.RawMessage("{}")
		}
		if r.Continues && !call.More {
			closeAll(files)
			return ended(errors.New("the service's reply continues, which was not asked for"))
		}
		if err := f(r.Parameters, files); err != nil {
			c.broken = fmt.Errorf("an earlier call on this connection was left: %w", err)
			return err
		}
		if !r.Continues {
			return nil
		}
	}
}
