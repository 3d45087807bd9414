// SPDX-License-Identifier: Apache-2.0

package varlink

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"transfused.org/transfused/service/transport"
)

const testInterface = "org.transfused.Test"

// wait bounds what a test waits for.
const wait = 10 * time.Second

// testServer serves testInterface and returns the path of its socket. At the test's end it must have left nothing.
func testServer(t *testing.T, methods map[string]Method) string {
	t.Helper()
	before := openFiles(t)
	goroutines := runtime.NumGoroutine()
	dir, err := os.MkdirTemp("", "vl")
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "s")
	l, err := transport.Listen(transport.Addr{Family: transport.Unix, Path: path})
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range []string{dir, path} {
		if err := os.Chmod(p, 0o777); err != nil {
			t.Fatal(err)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	s := &Server{
		Info:       Info{Vendor: "v", Product: "p", Version: "1", URL: "u"},
		Interfaces: []Interface{{Name: testInterface, Description: "interface " + testInterface, Methods: methods}},
	}
	done := make(chan error, 1)
	go func() { done <- s.Serve(ctx, l) }()
	t.Cleanup(func() {
		cancel()
		select {
		case err := <-done:
			if err != nil {
				t.Errorf("Serve: %v", err)
			}
		case <-time.After(wait):
			t.Fatal("Serve does not end")
		}
		os.RemoveAll(dir)
		for deadline := time.Now().Add(wait); ; time.Sleep(time.Millisecond) {
			extra := slices.DeleteFunc(openFiles(t), func(f string) bool { return slices.Contains(before, f) })
			if len(extra) == 0 && runtime.NumGoroutine() <= goroutines {
				return
			}
			if time.Now().After(deadline) {
				stacks := make([]byte, 1<<20)
				t.Fatalf("left: descriptors %q, %d goroutines where %d were\n%s", extra, runtime.NumGoroutine(), goroutines, stacks[:runtime.Stack(stacks, true)])
			}
		}
	})
	return path
}

// openFiles lists this process's descriptors, without those of the runtime's poller.
func openFiles(t *testing.T) (files []string) {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		to, err := os.Readlink("/proc/self/fd/" + e.Name())
		if err == nil && !strings.HasPrefix(to, "anon_inode:[event") {
			files = append(files, e.Name()+" "+to)
		}
	}
	return files
}

func dial(t *testing.T, path string) *Client {
	t.Helper()
	c, err := Dial(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// raw is a connection on which anything can be sent.
func raw(t *testing.T, path string) *net.UnixConn {
	t.Helper()
	c, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(wait))
	return c.(*net.UnixConn)
}

// messages reads n messages, or all until the end where n is negative.
func messages(t *testing.T, r io.Reader, n int) (got []string) {
	t.Helper()
	var buf []byte
	b := make([]byte, 1)
	for len(got) != n {
		if _, err := io.ReadFull(r, b); err != nil {
			if n < 0 && (errors.Is(err, io.EOF) || errors.Is(err, unix.ECONNRESET)) {
				return got
			}
			t.Fatalf("after %q %q: %v", got, buf, err)
		}
		if b[0] != 0 {
			buf = append(buf, b[0])
			continue
		}
		got, buf = append(got, string(buf)), nil
	}
	return got
}

type echo struct {
	Text string `json:"text"`
	N    int    `json:"n"`
}

var echoMethods = map[string]Method{
	"Echo": func(_ context.Context, c *Call) error {
		var p echo
		if err := c.Decode(&p); err != nil {
			return err
		}
		return c.Reply(p)
	},
	"Count": func(_ context.Context, c *Call) error {
		var p echo
		if err := c.Decode(&p); err != nil {
			return err
		}
		for i := range p.N {
			if err := c.Continue(echo{N: i}); err != nil {
				return err
			}
		}
		return c.Reply(echo{N: p.N})
	},
	"Files": func(_ context.Context, c *Call) error {
		// Each file's content comes back by a pipe of its own.
		var texts []string
		for _, f := range c.Files {
			b, err := io.ReadAll(f)
			if err != nil {
				return err
			}
			texts = append(texts, string(b))
		}
		r, w, err := os.Pipe()
		if err != nil {
			return err
		}
		defer r.Close()
		fmt.Fprint(w, strings.Join(texts, "+"))
		w.Close()
		return c.Reply(nil, r)
	},
	"Fail": func(context.Context, *Call) error { return errors.New("as it was asked for") },
	"Nothing": func(context.Context, *Call) error {
		return nil
	},
	"Large": func(_ context.Context, c *Call) error {
		var p echo
		if err := c.Decode(&p); err != nil {
			return err
		}
		return c.Reply(echo{Text: strings.Repeat("x", p.N)})
	},
}

func TestCalls(t *testing.T) {
	c := dial(t, testServer(t, echoMethods))
	for range 2 {
		var out echo
		if _, err := c.Call(t.Context(), testInterface+".Echo", echo{"a\x00b", 2}, &out); err != nil {
			t.Fatal(err)
		}
		if out != (echo{"a\x00b", 2}) {
			t.Errorf("Echo gave %+v", out)
		}
	}
	if _, err := c.Call(t.Context(), testInterface+".Nothing", nil, &struct{}{}); err != nil {
		t.Error(err)
	}
	var got []int
	err := c.More(t.Context(), testInterface+".Count", echo{N: 3}, func(b json.RawMessage) error {
		var p echo
		err := json.Unmarshal(b, &p)
		got = append(got, p.N)
		return err
	})
	if diff := cmp.Diff([]int{0, 1, 2, 3}, got); err != nil || diff != "" {
		t.Errorf("More: %v %s", err, diff)
	}
	if p := c.Peer(); int(p.PID) != os.Getpid() || int(p.UID) != os.Geteuid() {
		t.Errorf("the peer is %s", p)
	}
}

func TestErrors(t *testing.T) {
	c := dial(t, testServer(t, echoMethods))
	for _, tt := range []struct {
		method     string
		parameters any
		name, text string
	}{
		{testInterface + ".Fail", nil, testInterface + ".Failed", "as it was asked for"},
		{testInterface + ".Absent", nil, MethodNotFound, `there is no method "org.transfused.Test.Absent"`},
		{"org.example.Absent", nil, InterfaceNotFound, `there is no interface "org.example"`},
		{"Echo", nil, InvalidParameter, `method "Echo" has no interface: call INTERFACE.METHOD`},
		{testInterface + ".Echo", map[string]any{"txet": ""}, InvalidParameter, `parameter "txet" is not known`},
		{testInterface + ".Echo", map[string]any{"n": "1"}, InvalidParameter, `parameter "n" can't be a string`},
		{testInterface + ".Count", echo{N: 1}, ExpectedMore, "this method has more than one reply: call it with more"},
		{testInterface + ".Large", echo{N: MaxReply}, testInterface + ".Failed", fmt.Sprintf("the message is too long: %d bytes and 0 descriptors, the limit is 1048576 and 16", MaxReply+len(`{"parameters":{"text":"","n":0}}`))},
	} {
		if tt.method == "Echo" {
			c = dial(t, c.Peer().Local.Path) // it ends its connection
		}
		_, err := c.Call(t.Context(), tt.method, tt.parameters, nil)
		var e *Error
		if !errors.As(err, &e) {
			t.Fatalf("%s: %v", tt.method, err)
		}
		if diff := cmp.Diff([]string{tt.name, tt.text}, []string{e.Name, e.Error()}); diff != "" {
			t.Errorf("%s:\n%s", tt.method, diff)
		}
		if tt.method == "Echo" {
			c = dial(t, c.Peer().Local.Path)
		}
	}
	if _, err := c.Call(t.Context(), testInterface+".Echo", echo{Text: strings.Repeat("x", MaxCall)}, nil); !errors.Is(err, errTooLong) {
		t.Errorf("a call that is too long: %v", err)
	}
}

// What varlink says byte by byte, as varlinkctl and systemd send and read it.
func TestWire(t *testing.T) {
	path := testServer(t, echoMethods)
	c := raw(t, path)
	io.WriteString(c, `{"method":"org.transfused.Test.Count","parameters":{"n":1},"more":true}`+"\x00"+
		`{"method":"org.transfused.Test.Echo","oneway":true}`+"\x00"+
		`{"method":"org.transfused.Test.Echo","parameters":null,"extra":1}`+"\x00"+
		`{"method":"org.varlink.service.GetInfo"}`+"\x00"+
		`{"method":"org.varlink.service.GetInterfaceDescription","parameters":{"interface":"org.transfused.Test"}}`+"\x00"+
		`{"method":"org.varlink.service.GetInterfaceDescription","parameters":{"interface":"org.example"}}`+"\x00"+
		`{"method":"org.transfused.Test.Echo","upgrade":true}`+"\x00")
	want := []string{
		`{"parameters":{"text":"","n":0},"continues":true}`,
		`{"parameters":{"text":"","n":1}}`,
		`{"parameters":{"text":"","n":0}}`,
		`{"parameters":{"vendor":"v","product":"p","version":"1","url":"u","interfaces":["org.varlink.service","org.transfused.Test"]}}`,
		`{"parameters":{"description":"interface org.transfused.Test"}}`,
		`{"parameters":{"interface":"org.example"},"error":"org.varlink.service.InterfaceNotFound"}`,
		`{"parameters":{"parameter":"upgrade","text":"no method of this service upgrades its connection"},"error":"org.varlink.service.InvalidParameter"}`,
	}
	if diff := cmp.Diff(want, messages(t, c, -1)); diff != "" {
		t.Error(diff)
	}
}

// Each of these gets one reply that says why, and the end of its connection. Others are served.
func TestBadMessages(t *testing.T) {
	path := testServer(t, echoMethods)
	for _, tt := range []struct{ name, sent, text string }{
		{"text", "GET / HTTP/1.1\r\n\r\n\x00", "no JSON object"},
		{"empty", "\x00", "no JSON object"},
		{"array", "[]\x00", "no JSON object"},
		{"number as method", `{"method":1}` + "\x00", "no JSON object"},
		{"no method", `{}` + "\x00", `method \"\" has no interface`},
		{"parameters of another kind", `{"method":"a.b","parameters":[1]}` + "\x00", "must be a JSON object"},
		{"deep", strings.Repeat("[", MaxCall) + "\x00", "no JSON object"},
		{"long", strings.Repeat("x", MaxCall+1), "the message is too long"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := raw(t, path)
			io.WriteString(c, tt.sent)
			got := messages(t, c, -1)
			if len(got) != 1 || !strings.Contains(got[0], tt.text) || !strings.Contains(got[0], `"error":`) {
				t.Errorf("the replies are %q", got)
			}
		})
	}
	if _, err := dial(t, path).Call(t.Context(), testInterface+".Echo", nil, nil); err != nil {
		t.Error(err)
	}
}

func TestLargest(t *testing.T) {
	c := dial(t, testServer(t, echoMethods))
	overhead := len(`{"method":"org.transfused.Test.Echo","parameters":{"text":"","n":0}}`)
	in := echo{Text: strings.Repeat("x", MaxCall-overhead)}
	var out echo
	if _, err := c.Call(t.Context(), testInterface+".Echo", in, &out); err != nil || out != in {
		t.Errorf("a call of the largest size: %v, %d bytes came back", err, len(out.Text))
	}
	n := MaxReply - len(`{"parameters":{"text":"","n":0}}`)
	if _, err := c.Call(t.Context(), testInterface+".Large", echo{N: n}, &out); err != nil || len(out.Text) != n {
		t.Errorf("a reply of the largest size: %v, %d bytes came", err, len(out.Text))
	}
}

// pipeWith returns the reading end of a pipe that holds text.
func pipeWith(t *testing.T, text string) *os.File {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	io.WriteString(w, text)
	w.Close()
	t.Cleanup(func() { r.Close() })
	return r
}

func TestFiles(t *testing.T) {
	c := dial(t, testServer(t, echoMethods))
	for range 3 {
		got, err := c.Call(t.Context(), testInterface+".Files", nil, nil, pipeWith(t, "a"), pipeWith(t, "b"))
		if err != nil || len(got) != 1 {
			t.Fatalf("%d files, %v", len(got), err)
		}
		b, err := io.ReadAll(got[0])
		got[0].Close()
		if string(b) != "a+b" || err != nil {
			t.Errorf("they hold %q, %v", b, err)
		}
	}
	// What comes with a reply that is not wanted, or goes to a method that has no use for it, is closed: the check for what is left sees it.
	if _, err := c.Call(t.Context(), testInterface+".Echo", nil, nil, pipeWith(t, "c")); err != nil {
		t.Error(err)
	}
	var many []*os.File
	for range MaxFiles + 1 {
		many = append(many, pipeWith(t, ""))
	}
	if _, err := c.Call(t.Context(), testInterface+".Files", nil, nil, many...); !errors.Is(err, errTooLong) {
		t.Errorf("%d files: %v", len(many), err)
	}
}

// Descriptors belong to the message that they were sent with, also where the kernel gives them together with bytes of others.
func TestFilesOfPipelinedCalls(t *testing.T) {
	path := testServer(t, map[string]Method{"Files": echoMethods["Files"], "Count": func(_ context.Context, c *Call) error {
		return c.Reply(echo{N: len(c.Files)})
	}})
	c := raw(t, path)
	count, files := `{"method":"org.transfused.Test.Count"}`+"\x00", `{"method":"org.transfused.Test.Files"}`+"\x00"
	send := func(b string, f ...*os.File) {
		t.Helper()
		var fds []int
		for _, f := range f {
			fds = append(fds, int(f.Fd()))
		}
		if _, _, err := c.WriteMsgUnix([]byte(b), unix.UnixRights(fds...), nil); err != nil {
			t.Fatal(err)
		}
	}
	io.WriteString(c, count)
	send(count, pipeWith(t, ""), pipeWith(t, ""))
	io.WriteString(c, count+files[:5])
	io.WriteString(c, files[5:]+count[:7])
	send(count[7:], pipeWith(t, ""))
	io.WriteString(c, count)
	got := messages(t, c, 6)
	var n []string
	for _, m := range got {
		n = append(n, strings.TrimSuffix(strings.TrimPrefix(m, `{"parameters":`), `}`))
	}
	want := []string{`{"text":"","n":0}`, `{"text":"","n":2}`, `{"text":"","n":0}`, `{}`, `{"text":"","n":1}`, `{"text":"","n":0}`}
	if diff := cmp.Diff(want, n); diff != "" {
		t.Error(diff)
	}
}

// More descriptors than a message may have, sent beside many parts of it, end the connection and are closed.
func TestTooManyFiles(t *testing.T) {
	path := testServer(t, echoMethods)
	c := raw(t, path)
	f := pipeWith(t, "")
	for range MaxFiles + 1 {
		if _, _, err := c.WriteMsgUnix([]byte(" "), unix.UnixRights(int(f.Fd())), nil); err != nil {
			break
		}
	}
	if got := messages(t, c, -1); len(got) != 1 || !strings.Contains(got[0], "more descriptors than can be taken") {
		t.Errorf("the replies are %q", got)
	}
}

// A call ends when its client goes away, at once and with others waiting behind it.
func TestClientGoesAway(t *testing.T) {
	started, ended := make(chan bool, 1), make(chan error, 1)
	path := testServer(t, map[string]Method{"Wait": func(ctx context.Context, c *Call) error {
		started <- true
		<-ctx.Done()
		ended <- ctx.Err()
		return ctx.Err()
	}})
	wait1 := `{"method":"org.transfused.Test.Wait","more":true}` + "\x00"
	for name, leave := range map[string]func(){
		"closed": func() {
			c := raw(t, path)
			io.WriteString(c, wait1)
			<-started
			c.Close()
		},
		"too many calls": func() {
			c := raw(t, path)
			io.WriteString(c, wait1)
			<-started
			io.WriteString(c, strings.Repeat(wait1, maxQueued+1))
			<-ended
			for range maxQueued {
				<-started
				<-ended
			}
			ended <- context.Canceled
			c.Close()
		},
		"context": func() {
			ctx, cancel := context.WithCancel(t.Context())
			c := dial(t, path)
			go func() { <-started; cancel() }()
			if err := c.More(ctx, testInterface+".Wait", nil, nil); !errors.Is(err, context.Canceled) {
				t.Errorf("the client's error is %v", err)
			}
			if _, err := c.Call(t.Context(), testInterface+".Wait", nil, nil); err == nil {
				t.Error("a connection is used again after a call of it was left")
			}
			c.Close()
		},
	} {
		t.Run(name, func(t *testing.T) {
			leave()
			select {
			case err := <-ended:
				if !errors.Is(err, context.Canceled) {
					t.Errorf("the method ended with %v", err)
				}
			case <-time.After(wait):
				t.Fatal("the method goes on")
			}
		})
	}
}

// A client that does not read holds up nobody, and the server's end.
func TestClientDoesNotRead(t *testing.T) {
	blocked := make(chan error, 1)
	path := testServer(t, map[string]Method{"Echo": echoMethods["Echo"], "Flood": func(ctx context.Context, c *Call) error {
		for {
			if err := c.Continue(echo{Text: strings.Repeat("x", 1<<19)}); err != nil {
				blocked <- err
				return err
			}
		}
	}})
	c := raw(t, path)
	io.WriteString(c, `{"method":"org.transfused.Test.Flood","more":true}`+"\x00")
	if _, err := dial(t, path).Call(t.Context(), testInterface+".Echo", nil, nil); err != nil {
		t.Error(err)
	}
	// testServer's cleanup ends it within closeTimeout, while c is still open.
	t.Cleanup(func() {
		if err := <-blocked; !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("the flood ended with %v", err)
		}
	})
}

// onThread calls f on a thread that ends with it, and is not the main one, whose state /proc/self shows.
func onThread(f func()) {
	done := make(chan bool)
	go func() {
		defer close(done)
		runtime.LockOSThread() // and not unlocked: what f did to the thread ends with this goroutine
		if unix.Gettid() != unix.Getpid() {
			f()
			return
		}
		onThread(f) // this goroutine has the main thread meanwhile
		runtime.UnlockOSThread()
	}()
	<-done
}

// asNobody calls f as another user.
func asNobody(t *testing.T, f func()) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Fatal("only root can become another user: run this test as root")
	}
	var errno unix.Errno
	onThread(func() {
		if _, _, errno = unix.RawSyscall(unix.SYS_SETRESUID, 65534, 65534, 65534); errno == 0 {
			f()
		}
	})
	if errno != 0 {
		t.Fatal(errno)
	}
}

// One user's idle connections keep neither other users nor root out; it is told so. Its descriptors are not taken.
func TestOthersAreBounded(t *testing.T) {
	path := testServer(t, map[string]Method{"Who": func(_ context.Context, c *Call) error {
		return c.Reply(echo{N: int(c.Peer.UID), Text: fmt.Sprint(Privileged(c.Peer))})
	}, "Files": func(_ context.Context, c *Call) error {
		return c.Reply(echo{N: len(c.Files)})
	}})
	root := dial(t, path)
	asNobody(t, func() {
		var first *Client
		for i := range maxUser {
			c, err := Dial(t.Context(), path)
			if err != nil {
				t.Error(err)
				return
			}
			defer c.Close()
			if i == 0 {
				first = c
			}
			var who echo
			if _, err := c.Call(t.Context(), testInterface+".Who", nil, &who); err != nil || who != (echo{"false", 65534}) {
				t.Errorf("connection %d: %+v, %v", i, who, err)
				return
			}
		}
		more, err := Dial(t.Context(), path)
		if err != nil {
			t.Error(err)
			return
		}
		defer more.Close()
		if _, err := more.Call(t.Context(), testInterface+".Who", nil, nil); err == nil || err.Error() != "uid 65534 has 32 connections already: end some" {
			t.Errorf("one connection too many: %v", err)
		}
		var files echo
		if _, err = first.Call(t.Context(), testInterface+".Files", nil, &files, pipeWith(t, "")); err != nil || files.N != 0 {
			t.Errorf("descriptors of another user: %d, %v", files.N, err)
		}
	})
	var who echo
	var files echo
	if _, err := root.Call(t.Context(), testInterface+".Files", nil, &files, pipeWith(t, "")); err != nil || files.N != 1 {
		t.Errorf("descriptors of root: %d, %v", files.N, err)
	}
	if _, err := root.Call(t.Context(), testInterface+".Who", nil, &who); err != nil || who != (echo{"true", 0}) {
		t.Errorf("root: %+v, %v", who, err)
	}
}

// FuzzCall feeds a stream in pieces: no input panics, messages are what stands between the NULs, and a call that is understood is the same when
// it is sent again.
func FuzzCall(f *testing.F) {
	f.Add([]byte(`{"method":"a.b","parameters":{"c":[1,{}]},"more":true}`+"\x00\x00{}\x00"), uint16(7))
	f.Add([]byte("\x00\xff{\"method\":\"\\u0000.\"}\x00"), uint16(1))
	f.Fuzz(func(t *testing.T, in []byte, piece uint16) {
		if len(in) > MaxCall {
			return
		}
		a, b, err := transport.Pair()
		if err != nil {
			t.Skip("no descriptors: ", err)
		}
		defer a.Close()
		go func() {
			defer b.Close()
			for p := range slices.Chunk(in, int(piece)+1) {
				if _, err := b.Write(p); err != nil {
					return
				}
			}
		}()
		s, err := newStream(a, MaxCall, true)
		if err != nil {
			t.Fatal(err)
		}
		parts := bytes.Split(in, []byte{0})
		for i := 0; ; i++ {
			msg, _, err := s.next()
			if err != nil {
				if i != len(parts)-1 || (err == io.EOF) != (len(parts[i]) == 0) {
					t.Fatalf("after %d of %d messages: %v", i, len(parts)-1, err)
				}
				return
			}
			if !bytes.Equal(msg, parts[i]) {
				t.Fatalf("message %d is %q, %q was sent", i, msg, parts[i])
			}
			c, err := decodeCall(msg)
			if err != nil {
				if err.Error() == "" {
					t.Fatal("an error without text")
				}
				continue
			}
			again, err := json.Marshal(c)
			if err != nil {
				t.Fatal(err)
			}
			c2, err := decodeCall(again)
			if err != nil {
				t.Fatal(err)
			}
			third, err := json.Marshal(c2)
			if err != nil || !bytes.Equal(again, third) {
				t.Fatalf("%s became %s, %v", again, third, err)
			}
			_ = decodeParameters(c.Parameters, &echo{})
		}
	})
}
