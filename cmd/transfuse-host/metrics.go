// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"strings"
	"time"

	"transfused.org/transfused/service/transport"
)

// listen opens what is listened on beside the guests' addresses. The control socket is the passed one, if there is one.
func (s *settings) listen(passed *transport.Listener) (control *transport.Listener, metrics net.Listener, err error) {
	control = passed
	if control == nil && s.control != (transport.Addr{}) {
		if control, err = transport.Listen(s.control); err != nil {
			return nil, nil, err
		}
	}
	if s.metrics != "" {
		if metrics, err = listenMetrics(s.metrics); err != nil {
			if control != nil {
				control.Close()
			}
			return nil, nil, err
		}
	}
	return control, metrics, nil
}

// checkMetrics finds what is no address for metrics.
func checkMetrics(addr string) error {
	if strings.HasPrefix(addr, "unix:") {
		_, err := transport.Parse(addr)
		return err
	}
	if _, port, err := net.SplitHostPort(addr); err != nil || port == "" {
		return fmt.Errorf("%q is no address: give HOST:PORT, such as localhost:9124, or unix:PATH", addr)
	}
	return nil
}

func listenMetrics(addr string) (net.Listener, error) {
	if !strings.HasPrefix(addr, "unix:") {
		ln, err := net.Listen("tcp", addr)
		if err != nil {
			return nil, fmt.Errorf("metrics: %w", err)
		}
		return ln, nil
	}
	a, err := transport.Parse(addr)
	if err != nil {
		return nil, err
	}
	l, err := transport.Listen(a)
	if err != nil {
		return nil, fmt.Errorf("metrics: %w", err)
	}
	return listener{l}, nil
}

// serveMetrics serves h at /metrics until ctx ends.
func serveMetrics(ctx context.Context, ln net.Listener, h http.Handler) error {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", h)
	srv := &http.Server{Handler: mux, ReadHeaderTimeout: 5 * time.Second, WriteTimeout: 30 * time.Second, IdleTimeout: time.Minute, MaxHeaderBytes: 8 << 10}
	done := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(done)
		late, cancel := context.WithTimeout(context.Background(), 2*time.Second)
		defer cancel()
		if srv.Shutdown(late) != nil {
			srv.Close()
		}
	})
	err := srv.Serve(ln)
	if stop() {
		return err
	}
	<-done
	return nil
}

// listener has a socket of ours accept what net/http takes.
type listener struct{ *transport.Listener }

func (l listener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return conn{c}, nil
}

func (l listener) Addr() net.Addr { return addr(l.Listener.Addr().String()) }

type conn struct{ *transport.Conn }

func (c conn) LocalAddr() net.Addr  { return addr(c.Peer().Local.String()) }
func (c conn) RemoteAddr() net.Addr { return addr(c.Peer().String()) }

// addr is an address for net/http to show.
type addr string

func (addr) Network() string  { return "unix" }
func (a addr) String() string { return string(a) }
