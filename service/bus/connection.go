// SPDX-License-Identifier: Apache-2.0

package bus

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"runtime/debug"
	"strings"
	"sync"
	"time"

	"github.com/godbus/dbus/v5"

	"transfused.org/transfused/service/api"
)

// callTime is how long a call may wait for the daemon: less than the 25 s after which callers give up by default.
const callTime = 20 * time.Second

// maxCalls is how many calls of one peer are served at once, of those that may wait for the daemon or polkit.
const maxCalls = 16

// ownPeer is what calls of org.freedesktop.DBus.Peer are renamed to on their way in: godbus answers those itself, and
// has another idea of the machine's id.
const ownPeer = "org.transfused.Peer"

// connection is a connection to the bus, from its beginning to its end.
type connection struct {
	c      Config
	served *served
	log    *slog.Logger
	socket net.Conn
	bus    *dbus.Conn
	ctx    context.Context // ends with the connection
	calls  calls
	denied limiter

	changes <-chan struct{} // of the daemon

	mu      sync.Mutex // held to look at the daemon, and to tell of what was seen
	objects map[dbus.ObjectPath]object
}

func newConnection(s *Service, socket net.Conn) (*connection, error) {
	c := &connection{c: s.c, served: s.served, log: s.c.Log, socket: socket}
	c.calls.of = map[string]int{}
	// A transport that knows no descriptors: what is sent with some is refused by the bus.
	bus, err := dbus.NewConn(newWire(socket, c.log), dbus.WithHandler(handler{c}), dbus.WithSignalHandler(c), dbus.WithIncomingInterceptor(toOwnPeer))
	if err != nil {
		return nil, err
	}
	c.bus, c.ctx = bus, bus.Context()
	return c, nil
}

// begin puts the daemon on the bus. It is not bounded in time: closing the socket ends it. After an error end must be called.
func (c *connection) begin() error {
	if err := c.bus.Auth(nil); err != nil {
		return fmt.Errorf("authentication: %w", err)
	}
	if err := c.bus.Hello(); err != nil {
		return fmt.Errorf("Hello: %w", err)
	}
	c.changes = c.served.watch(c.ctx)
	c.mu.Lock()
	c.look()
	c.mu.Unlock()
	reply, err := c.bus.RequestName(c.served.name, 0)
	if err != nil {
		return fmt.Errorf("the bus does not give this process the name %s: %w: is its policy, %s.conf, in /usr/share/dbus-1/system.d?", c.served.name, err, c.served.name)
	}
	if reply == dbus.RequestNameReplyInQueue {
		c.log.Warn("the name on D-Bus is taken: it is ours when its owner ends", "name", c.served.name, "owner", c.owner())
	}
	return nil
}

// owner says who has the name.
func (c *connection) owner() string {
	var owner string
	var pid, uid uint32
	ask := func(method, name string, to any) error {
		return c.bus.BusObject().CallWithContext(c.ctx, "org.freedesktop.DBus."+method, 0, name).Store(to)
	}
	if err := errors.Join(ask("GetNameOwner", c.served.name, &owner), ask("GetConnectionUnixProcessID", c.served.name, &pid),
		ask("GetConnectionUnixUser", c.served.name, &uid)); err != nil {
		return err.Error()
	}
	// Without it the numbers do.
	comm, _ := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid))
	return fmt.Sprintf("%s, process %d (%s), uid %d", owner, pid, text(strings.TrimSpace(string(comm))), uid)
}

// run serves until the connection or ctx ends.
func (c *connection) run(ctx context.Context) {
	stop := context.AfterFunc(ctx, func() { c.socket.Close() })
	defer stop()
	defer c.end()
	for {
		select {
		case <-c.ctx.Done():
			return
		case _, ok := <-c.changes:
			if !ok {
				c.changes = nil // the daemon ends
				continue
			}
			c.update()
		}
	}
}

// end closes the connection and waits for what goes on there.
func (c *connection) end() {
	c.socket.Close() // first, so that no write is waited for
	c.bus.Close()
	for c.changes != nil {
		if _, ok := <-c.changes; !ok {
			break
		}
	}
	c.calls.end()
}

// DeliverSignal is called by godbus for each signal, in their order.
func (c *connection) DeliverSignal(iface, member string, s *dbus.Signal) {
	if s.Sender == "org.freedesktop.DBus" && member == "NameAcquired" && len(s.Body) == 1 && s.Body[0] == c.served.name {
		c.log.Info("on D-Bus", "name", c.served.name)
	}
}

func toOwnPeer(m *dbus.Message) {
	if m.Type == dbus.TypeMethodCall && m.Headers[dbus.FieldInterface].Value() == peerName {
		m.Headers[dbus.FieldInterface] = dbus.MakeVariant(ownPeer)
	}
}

// call is a method call that is being served.
type call struct {
	conn        *connection
	ctx         context.Context // ends with the connection
	sender      string          // its unique name
	path        dbus.ObjectPath
	interactive bool // the caller waits while somebody is asked for a password
	args        []any
}

// answer serves a call and sends the reply.
func (c *connection) answer(msg *dbus.Message) {
	sender, _ := msg.Headers[dbus.FieldSender].Value().(string)
	quiet := msg.Flags&dbus.FlagNoReplyExpected != 0
	msg.Flags |= dbus.FlagNoReplyExpected // godbus has nothing to reply
	if !c.calls.begin() {
		return // the connection ends
	}
	defer c.calls.done()
	c.mu.Lock()
	m, err := c.find(msg)
	if err == nil && m.locked {
		defer c.mu.Unlock()
	} else {
		c.mu.Unlock()
	}
	if err == nil && !m.locked {
		if c.calls.take(sender) {
			defer c.calls.give(sender)
		} else {
			err = standard("LimitsExceeded", "%d calls of %s are being served: wait for one to end", maxCalls, sender)
		}
	}
	var out []any
	if err == nil {
		out, err = c.do(m, &call{conn: c, ctx: c.ctx, sender: sender, path: msg.Headers[dbus.FieldPath].Value().(dbus.ObjectPath),
			interactive: msg.Flags&dbus.FlagAllowInteractiveAuthorization != 0, args: msg.Body})
	}
	if !quiet {
		c.reply(msg, out, err)
	}
}

// find returns the method that msg calls. Precondition: c.mu is held.
func (c *connection) find(msg *dbus.Message) (*method, error) {
	path := msg.Headers[dbus.FieldPath].Value().(dbus.ObjectPath)
	name, _ := msg.Headers[dbus.FieldInterface].Value().(string)
	member := msg.Headers[dbus.FieldMember].Value().(string)
	there := c.interfaces(path)
	if name == ownPeer {
		name, there = peerName, everywhere // it is about the process, whatever the path
	}
	if there == nil {
		return nil, standard("UnknownObject", "there is no object %s", path)
	}
	known := name == ""
	for _, i := range there {
		if name != "" && name != i.name {
			continue
		}
		known = true
		for k := range i.methods {
			m := &i.methods[k]
			if m.name != member {
				continue
			}
			sig, _ := msg.Headers[dbus.FieldSignature].Value().(dbus.Signature)
			if want := types(m.in); sig.String() != want {
				return nil, standard("InvalidArgs", "%s.%s has arguments of the types %q, not %q", i.name, member, want, sig)
			}
			return m, nil
		}
	}
	if !known {
		return nil, standard("UnknownInterface", "%s has no interface %s", path, name)
	}
	return nil, standard("UnknownMethod", "%s has no method %s", path, member)
}

func types(as []arg) string {
	var b strings.Builder
	for _, a := range as {
		b.WriteString(a.typ)
	}
	return b.String()
}

// do calls m. A mistake in it is an error for its caller, and not the end of the process.
func (c *connection) do(m *method, call *call) (out []any, err error) {
	defer func() {
		if p := recover(); p != nil {
			c.log.Error("D-Bus method", "method", m.name, "path", call.path, "panic", p, "stack", string(debug.Stack()))
			out, err = nil, api.Errorf(api.Internal, "%s failed by a mistake in the program: its log says more", m.name)
		}
	}()
	return m.call(call)
}

// reply sends what a call returned. There is nobody to tell if that fails.
func (c *connection) reply(to *dbus.Message, out []any, err error) {
	msg := &dbus.Message{Type: dbus.TypeMethodReply, Body: out, Headers: map[dbus.HeaderField]dbus.Variant{
		dbus.FieldReplySerial: dbus.MakeVariant(to.Serial()),
		dbus.FieldDestination: to.Headers[dbus.FieldSender],
	}}
	if err != nil {
		var e *dbus.Error
		if !errors.As(err, &e) {
			e = c.errorOf(err)
		}
		msg.Type, msg.Body = dbus.TypeError, e.Body
		msg.Headers[dbus.FieldErrorName] = dbus.MakeVariant(e.Name)
	}
	if len(msg.Body) > 0 {
		msg.Headers[dbus.FieldSignature] = dbus.MakeVariant(dbus.SignatureOf(msg.Body...))
	}
	c.bus.Send(msg, nil)
}

// errorOf is err in D-Bus's form: the name says the kind.
func (c *connection) errorOf(err error) *dbus.Error {
	e := api.AsError(err)
	if e.Kind == api.Internal && errors.Is(err, context.DeadlineExceeded) {
		e = api.Errorf(api.Unreachable, "no answer for %v: %w", c.c.callTime, err)
	}
	return dbus.NewError(c.served.name+".Error."+string(e.Kind), []any{text(e.Text)})
}

// handler is what godbus wants to find objects, interfaces and methods by. It leads every call to answer.
type handler struct{ c *connection }

var (
	_ dbus.Handler         = handler{}
	_ dbus.ArgumentDecoder = handler{}
)

func (h handler) LookupObject(dbus.ObjectPath) (dbus.ServerObject, bool) { return h, true }
func (h handler) LookupInterface(string) (dbus.Interface, bool)          { return h, true }
func (h handler) LookupMethod(string) (dbus.Method, bool)                { return h, true }
func (h handler) NumArguments() int                                      { return 0 }
func (h handler) NumReturns() int                                        { return 0 }
func (h handler) ArgumentValue(int) any                                  { return nil }
func (h handler) ReturnValue(int) any                                    { return nil }

// DecodeArguments makes the message the argument of Call.
func (h handler) DecodeArguments(_ *dbus.Conn, _ string, msg *dbus.Message, _ []any) ([]any, error) {
	return []any{msg}, nil
}

// Call is called in a goroutine of its own.
func (h handler) Call(args ...any) ([]any, error) {
	h.c.answer(args[0].(*dbus.Message))
	return nil, nil
}

// calls are the calls that are being served.
type calls struct {
	wg sync.WaitGroup

	mu    sync.Mutex // guards the rest
	of    map[string]int
	ended bool
}

// begin says whether one more may be served; then done must follow.
func (c *calls) begin() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.ended {
		c.wg.Add(1)
	}
	return !c.ended
}

func (c *calls) done() { c.wg.Done() }

// take says whether one that may wait is served for sender; then give must follow.
func (c *calls) take(sender string) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.of[sender] == maxCalls {
		return false
	}
	c.of[sender]++
	return true
}

func (c *calls) give(sender string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.of[sender]--; c.of[sender] == 0 {
		delete(c.of, sender)
	}
}

// end lets none begin, and waits for all.
func (c *calls) end() {
	c.mu.Lock()
	c.ended = true
	c.mu.Unlock()
	c.wg.Wait()
}
