// SPDX-License-Identifier: Apache-2.0

package wire

import (
	"bytes"
	"encoding/hex"
	"errors"
	"reflect"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

// samples are one message of each kind with all fields set and each list of one.
func samples() []Message {
	id := [16]byte{1, 15: 16}
	token := []byte("token")
	return []Message{
		&Init{Version: 2, MinVersion: 1, Features: 1 << 63, MaxMessage: MaxControl, MaxWrite: 1 << 20, FuseMinor: 45, MaxStreams: 4,
			Window: 4096, BootID: id, SessionID: id, Token: token, Kernel: "6.18", Software: "t 1", Socket: "vsock:any:1525"},
		&SuitabilityRequest{ID: 1, Paths: []string{"/a"}},
		&SuitabilityRequest{Export: true, ID: 1, Paths: []string{"/a"}},
		&SuitabilityReply{ID: 2, Paths: []string{"/a"}},
		&PerfstatRequest{ID: 3, Dir: "/m"},
		&PerfstatRequest{Stop: true, ID: 3, Dir: "/m"},
		&PerfstatReply{ID: 3, Now: 4, Entries: []PerfEntry{{Unique: 5, Start: 6, Stop: 7}}},
		&ErrorReply{ID: 3, Text: "text"},
		&LogError{Text: "text"},
		&LogNotice{Text: "text"},
		&Pong{},
		&NotifyOpen{Dir: "/m"},
		&Refused{Errno: syscall.EACCES, Text: "text"},
		&Ping{ID: 1},
		&Alive{ID: 1},
		&ExportsRequest{ID: 1},
		&ExportsReply{ID: 1, More: true, Exports: []ExportInfo{{Tag: "tag", ReadOnly: true, Text: "text"}}},
		&MountRequest{ID: 1, Tag: "tag", Dir: "/m", Options: []string{"ro"}},
		&MountReply{ID: 1, Errno: syscall.ENOENT, Text: "text", MountID: 2, ReadOnly: true, MaxWrite: 1 << 17, Streams: 1, Source: "source", NoFlush: true},
		&MountAsk{ID: 1, Tag: "tag", Dir: "/m", Options: []string{"ro"}},
		&MountResult{ID: 1, MountID: 2, Errno: syscall.ENOTEMPTY, Text: "text"},
		&Unmounted{MountID: 2, Reason: ReasonStreamLost, Text: "text"},
		&UnmountAsk{ID: 1, MountID: 2, Reason: ReasonShutdown, Text: "text"},
		&UnmountReply{ID: 1, Errno: syscall.EBUSY, Text: "text"},
		&StreamOpen{SessionID: id, Token: token, MountID: 1, Index: 2, Received: 3, Sent: 4},
		&NotifyOpen2{SessionID: id, Token: token, MountID: 1},
		&EventOpen{SessionID: id, Token: token, ThreadID: 1},
		&OpenReply{Errno: syscall.ESTALE, Text: "text", Received: 1, Sent: 2},
		&Event{Number: 1, MountID: 2, Action: ActionRename, Mode: 0o100644, Path: "a", NewPath: "b"},
		&EventDone{Number: 1, Errno: syscall.ENOENT},
		&Ack{MountID: 1, Stream: 2, Count: 3},
	}
}

// name is a message's type, with what the body doesn't say.
func name(m Message) string {
	n := reflect.TypeOf(m).Elem().Name()
	switch m := m.(type) {
	case *SuitabilityRequest:
		if m.Export {
			n += "/export"
		}
	case *PerfstatRequest:
		if m.Stop {
			n += "/stop"
		}
	}
	return n
}

// decoders are the directions that m's type has.
func decoders(m Message) (ds []func(Type, []byte) (Message, error)) {
	for _, k := range kinds {
		if k.t == m.Type() && reflect.TypeOf(k.new()) == reflect.TypeOf(m) {
			if k.d&toHost != 0 {
				ds = append(ds, ToHost)
			}
			if k.d&toGuest != 0 {
				ds = append(ds, ToGuest)
			}
		}
	}
	return ds
}

func body(t testing.TB, m Message) []byte {
	t.Helper()
	b, err := Append(nil, m)
	if err != nil {
		t.Fatal(err)
	}
	return b[headerLen:]
}

func TestSamplesAreComplete(t *testing.T) {
	all := samples()
	for _, k := range kinds {
		if !slices.ContainsFunc(all, func(m Message) bool { return name(m) == name(k.new()) }) {
			t.Errorf("no sample of %s", name(k.new()))
		}
	}
	for _, m := range all {
		v := reflect.ValueOf(m).Elem()
		for i := range v.NumField() {
			if f := v.Type().Field(i).Name; v.Field(i).IsZero() && f != "Export" && f != "Stop" {
				t.Errorf("%s of %s is not set", f, name(m))
			}
		}
	}
}

func TestMessages(t *testing.T) {
	// To their end: these have no length of their own in the body.
	open := []string{"LogError", "LogNotice", "ErrorReply", "NotifyOpen", "PerfstatRequest", "PerfstatRequest/stop"}
	for _, m := range samples() {
		t.Run(name(m), func(t *testing.T) {
			b := body(t, m)
			ds := decoders(m)
			if len(ds) == 0 {
				t.Fatal("nobody reads it")
			}
			for _, decode := range ds {
				got, err := decode(m.Type(), b)
				if err != nil {
					t.Fatal(err)
				}
				if diff := cmp.Diff(m, got); diff != "" {
					t.Errorf("(-want +got)\n%s", diff)
				}
				if slices.Contains(open, name(m)) {
					continue
				}
				for n := range b {
					switch got, err := decode(m.Type(), b[:n]); {
					case err == nil && !bytes.Equal(body(t, got), b[:n]):
						t.Errorf("%d of %d bytes decode as %+v", n, len(b), got)
					case err != nil && !errors.Is(err, ErrProtocol):
						t.Errorf("%d of %d bytes: %v, want ErrProtocol", n, len(b), err)
					case err == nil && !slices.Contains([]string{"Init", "SuitabilityReply", "SuitabilityRequest", "SuitabilityRequest/export", "PerfstatReply"}, name(m)):
						t.Errorf("%d of %d bytes decode", n, len(b))
					}
				}
				_, err = decode(m.Type(), append(slices.Clone(b), 0))
				if refused := errors.Is(err, ErrProtocol); refused == (name(m) == "Init") {
					t.Errorf("with a byte more: %v", err)
				}
			}
		})
	}
}

func TestWrongWay(t *testing.T) {
	for _, m := range samples() {
		if m.Type() < TypeRefused {
			continue // another message has this number the other way
		}
		ways := 0
		for _, decode := range []func(Type, []byte) (Message, error){ToHost, ToGuest} {
			if _, err := decode(m.Type(), body(t, m)); err == nil {
				ways++
			}
		}
		if ways != len(decoders(m)) {
			t.Errorf("%s goes %d ways, want %d", name(m), ways, len(decoders(m)))
		}
	}
	for _, typ := range []Type{8, 63, 83, 0x8000, 0xffff} {
		if m, err := ToHost(typ, nil); !errors.Is(err, ErrProtocol) {
			t.Errorf("type %d: %v %v", typ, m, err)
		}
	}
	for _, typ := range []Type{TypeNotifyOpen, TypePerfstatReply, TypeErrorReply} {
		if m, err := ToGuest(typ, []byte("/m")); !errors.Is(err, ErrProtocol) {
			t.Errorf("type %d to the guest: %v %v", typ, m, err)
		}
	}
}

func long(n int) string { return strings.Repeat("x", n) }

func many[T any](n int, v T) []T { return slices.Repeat([]T{v}, n) }

// TestBounds encodes what just fits and what doesn't.
func TestBounds(t *testing.T) {
	tests := []struct {
		name string
		good Message // nil: there is no such
		bad  Message
	}{
		{"token", &Init{Version: 2, Token: make([]byte, MaxToken)}, &Init{Version: 2, Token: make([]byte, MaxToken+1)}},
		{"software", &Init{Version: 2, Software: long(MaxName)}, &Init{Version: 2, Software: long(MaxName + 1)}},
		{"string over 64 KiB", nil, &Init{Version: 2, Socket: long(1<<16 + 3)}},
		{"tag", &MountRequest{Tag: long(MaxTag)}, &MountRequest{Tag: long(MaxTag + 1)}},
		{"empty tag", nil, &MountRequest{Dir: "/m"}},
		{"empty tag of an export", nil, &ExportsReply{Exports: []ExportInfo{{}}}},
		{"NUL in a tag", nil, &MountRequest{Tag: "a\x00b"}},
		{"NUL in a path", nil, &MountAsk{Tag: "t", Dir: "/mnt\x00/etc"}},
		{"NUL in an option", nil, &MountAsk{Tag: "t", Options: []string{"a\x00"}}},
		{"dir", &MountAsk{Tag: "t", Dir: long(MaxPath)}, &MountAsk{Tag: "t", Dir: long(MaxPath + 1)}},
		{"options", &MountAsk{Tag: "t", Options: many(MaxOptions, "o")}, &MountAsk{Tag: "t", Options: many(MaxOptions+1, "o")}},
		{"option", &MountAsk{Tag: "t", Options: []string{long(MaxOption)}}, &MountAsk{Tag: "t", Options: []string{long(MaxOption + 1)}}},
		{"options, all", nil, &MountAsk{Tag: "t", Options: many(MaxOptions, long(MaxOption))}},
		{"exports", &ExportsReply{Exports: many(MaxExports, ExportInfo{Tag: "t"})}, &ExportsReply{Exports: many(MaxExports+1, ExportInfo{Tag: "t"})}},
		{"exports over a u16", nil, &ExportsReply{Exports: many(1<<16+1, ExportInfo{Tag: "t"})}},
		{"errno", &Refused{Errno: MaxErrno}, &Refused{Errno: MaxErrno + 1}},
		{"errno over 32 bits", nil, &Refused{Errno: 1 << 32}},
		{"event", &Event{Path: long(MaxPath), NewPath: long(MaxPath)}, &Event{Path: long(MaxPath + 1)}},
		{"suitability path", &SuitabilityRequest{Paths: []string{long(MaxPath)}}, &SuitabilityRequest{Paths: []string{long(MaxPath + 1)}}},
		{"suitability", &SuitabilityReply{Paths: many(15, long(MaxPath))}, &SuitabilityReply{Paths: many(16, long(MaxPath))}},
		{"perfstat", &PerfstatReply{Entries: make([]PerfEntry, MaxPerfEntries)}, &PerfstatReply{Entries: make([]PerfEntry, MaxPerfEntries+1)}},
		{"perfstat dir", &PerfstatRequest{Dir: long(MaxPath)}, &PerfstatRequest{Dir: long(MaxPath + 1)}},
		{"notify", &NotifyOpen{Dir: long(MaxPath)}, &NotifyOpen{Dir: long(MaxPath + 1)}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if tt.good != nil {
				var w onceWriter
				if err := Write(&w, tt.good); err != nil || len(w) != 1 {
					t.Fatalf("%d writes: %v", len(w), err)
				}
				typ, b, err := NewReader(bytes.NewReader(w[0]), MaxControl).Next()
				if err != nil {
					t.Fatal(err)
				}
				if _, err := decoders(tt.good)[0](typ, b); err != nil {
					t.Error(err)
				}
			}
			var w onceWriter
			if err := Write(&w, tt.bad); !errors.Is(err, ErrProtocol) || len(w) != 0 {
				t.Errorf("%d writes: %v", len(w), err)
			}
			if b, err := Append([]byte("before"), tt.bad); string(b) != "before" {
				t.Errorf("Append left %.20q: %v", b, err)
			}
		})
	}
}

// onceWriter keeps each write.
type onceWriter [][]byte

func (w *onceWriter) Write(b []byte) (int, error) {
	*w = append(*w, slices.Clone(b))
	return len(b), nil
}

// TestFirstFits makes sure that every first message fits MaxFirst.
func TestFirstFits(t *testing.T) {
	token := make([]byte, MaxToken)
	for _, m := range []Message{
		&Init{Version: 2, Token: token, Kernel: long(MaxName), Software: long(MaxName), Socket: long(MaxName)},
		&NotifyOpen{Dir: long(MaxPath)},
		&StreamOpen{Token: token},
		&NotifyOpen2{Token: token},
		&EventOpen{Token: token},
		&OpenReply{Text: long(MaxText)},
		&Refused{Text: long(MaxText)},
	} {
		if n := headerLen + len(body(t, m)); n > MaxFirst {
			t.Errorf("%s: %d bytes", name(m), n)
		}
	}
}

// TestTexts: too long ones are cut between characters, broken ones kept.
func TestTexts(t *testing.T) {
	tests := []struct{ name, in, want string }{
		{"short", "text", "text"},
		{"full", long(MaxText), long(MaxText)},
		{"long", long(MaxText + 1), long(MaxText-3) + "…"},
		{"within a character", long(MaxText-4) + "ééé", long(MaxText-4) + "…"},
		{"not UTF-8", "caf\xe9\xff", "caf\xe9\xff"},
		{"NUL", "a\x00b", "a\x00b"},
		{"no character begins", strings.Repeat("\x80", MaxText+9), "…"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			m, err := ToGuest(TypeRefused, body(t, &Refused{Text: tt.in}))
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tt.want, m.(*Refused).Text); diff != "" {
				t.Errorf("(-want +got)\n%s", diff)
			}
		})
	}
	t.Run("version 1", func(t *testing.T) {
		for _, m := range []Message{&LogError{Text: long(70000)}, &LogNotice{Text: strings.Repeat("é", 70000)}, &ErrorReply{Text: long(70000)}} {
			got, err := ToHost(m.Type(), body(t, m))
			if err != nil {
				t.Fatal(err)
			}
			s := reflect.ValueOf(got).Elem().FieldByName("Text").String()
			if len(s) < MaxControl-12 || !strings.HasSuffix(s, "…") || !utf8.ValidString(s) {
				t.Errorf("%s: %d bytes", name(m), len(s))
			}
		}
	})
}

// TestHostile decodes bodies that lie.
func TestHostile(t *testing.T) {
	tests := []struct {
		name   string
		decode func(Type, []byte) (Message, error)
		typ    Type
		body   string // hexadecimal
	}{
		{"Init of one byte", ToHost, TypeInit, "02"},
		{"Init of version 1 in the long form", ToHost, TypeInit, "0100" + strings.Repeat("00", 100)},
		{"Init of version 0", ToGuest, TypeInit, "0000" + strings.Repeat("00", 100)},
		{"Init whose token runs over", ToHost, TypeInit, "0200" + strings.Repeat("00", 58) + "ff03"},
		{"Init whose token is over its bound", ToHost, TypeInit, "0200" + strings.Repeat("00", 58) + "0104" + strings.Repeat("00", 2000)},
		{"string runs over by one", ToHost, TypeMountRequest, "01000000" + "0200" + "61"},
		{"string length cut", ToHost, TypeMountRequest, "01000000" + "02"},
		{"tag empty", ToHost, TypeMountRequest, "01000000" + "0000" + "0000" + "0000"},
		{"tag with NUL", ToHost, TypeMountRequest, "01000000" + "0200" + "6100" + "0000" + "0000"},
		{"count without elements", ToHost, TypeMountRequest, "01000000" + "010061" + "0000" + "4000"},
		{"count over its bound", ToHost, TypeMountRequest, "01000000" + "010061" + "0000" + "4100" + strings.Repeat("0000", 65)},
		{"count of 65535", ToGuest, TypeExportsReply, "01000000" + "00" + "ffff"},
		{"count too small", ToHost, TypeMountRequest, "01000000" + "010061" + "0000" + "0100" + "0000" + "0000"},
		{"bool of 2", ToGuest, TypeExportsReply, "01000000" + "02" + "0000"},
		{"errno of 4096", ToGuest, TypeRefused, "00100000" + "0000"},
		{"errno of -2", ToGuest, TypeRefused, "feffffff" + "0000"},
		{"Ping without ID", ToHost, TypePing, ""},
		{"Pong with a body", ToHost, TypePong, "00"},
		{"paths: no ID", ToGuest, TypeMountSuitability, "01"},
		{"paths: length cut", ToGuest, TypeMountSuitability, "0100" + "02"},
		{"paths: no NUL", ToGuest, TypeMountSuitability, "0100" + "02006161"},
		{"paths: not NUL", ToGuest, TypeMountSuitability, "0100" + "0200616161"},
		{"paths: NUL inside", ToGuest, TypeMountSuitability, "0100" + "0200610000"},
		{"paths: NUL counted", ToGuest, TypeMountSuitability, "0100" + "0300616100" + "01006200"},
		{"paths: length lies", ToGuest, TypeMountSuitability, "0100" + "ffff61"},
		{"paths: over PATH_MAX", ToGuest, TypeMountSuitability, "0100" + "0010" + strings.Repeat("61", 4096) + "00"},
		{"perfstat without now", ToHost, TypePerfstatReply, "0100" + "00000000"},
		{"perfstat of 8 bytes", ToHost, TypePerfstatReply, "0100" + strings.Repeat("00", 8+8)},
		{"perfstat of 16 bytes, a segment without entries", ToHost, TypePerfstatReply, "0100" + strings.Repeat("00", 8+16)},
		{"perfstat of 32 bytes", ToHost, TypePerfstatReply, "0100" + strings.Repeat("00", 8+32)},
		{"notify channel of a long path", ToHost, TypeNotifyOpen, strings.Repeat("61", 4096)},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			b, err := hex.DecodeString(tt.body)
			if err != nil {
				t.Fatal(err)
			}
			if m, err := tt.decode(tt.typ, b); !errors.Is(err, ErrProtocol) {
				t.Errorf("%+v, %v; want ErrProtocol", m, err)
			} else if len(err.Error()) > 300 || !utf8.ValidString(err.Error()) {
				t.Errorf("the error is not for a log line: %q", err)
			}
		})
	}
}

// allocated returns the bytes that f allocates.
func allocated(f func()) uint64 {
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	f()
	runtime.ReadMemStats(&after)
	return after.TotalAlloc - before.TotalAlloc
}

// allocBound is what decoding n bytes may allocate: a string header and its
// growth for each path of 3 bytes is the worst, and texts are copied.
func allocBound(n int) uint64 { return 4096 + 64*uint64(n) }

func TestAllocations(t *testing.T) {
	tests := []struct {
		name   string
		decode func(Type, []byte) (Message, error)
		typ    Type
		body   []byte
	}{
		{"a count of 65535 that lies", ToGuest, TypeExportsReply, []byte("\x01\x00\x00\x00\x00\xff\xff")},
		{"a count of 1024 that lies", ToGuest, TypeExportsReply, []byte("\x01\x00\x00\x00\x00\x00\x04")},
		{"a string that runs over", ToHost, TypeNotifyOpen2, append(make([]byte, 16), 0xff, 3)},
		{"a long token", ToHost, TypeNotifyOpen2, append(make([]byte, 16), 0xff, 0xff)},
		{"a message of empty paths", ToHost, TypeSuitabilityReply, make([]byte, MaxControl-headerLen-2)},
		{"the smallest exports", ToGuest, TypeExportsReply, append([]byte("\x01\x00\x00\x00\x00\x00\x04"), bytes.Repeat([]byte("\x01\x00t\x00\x00\x00"), 1024)...)},
		{"a full perfstat", ToHost, TypePerfstatReply, make([]byte, MaxControl-headerLen)},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			f := func() { tt.decode(tt.typ, tt.body) }
			// The runtime and the test before may allocate at the same time, but not each time.
			n := min(allocated(f), allocated(f), allocated(f))
			if n > allocBound(len(tt.body)) {
				t.Errorf("%d bytes for a body of %d, at most %d", n, len(tt.body), allocBound(len(tt.body)))
			}
		})
	}
}

// TestPerfstatSegments decodes what the seed would send for more than one segment.
func TestPerfstatSegments(t *testing.T) {
	for _, n := range []int{0, 1, 2729, 2730, 2731, 5460, 5461, 8190, 8191, 8192, 40000} {
		body := make([]byte, 10, 10+n*perfEntry+16*16)
		for i := range n {
			body = le.AppendUint64(body, uint64(i)+1)
			body = append(body, make([]byte, 16)...)
		}
		for range (n + perfSegment - 1) / perfSegment {
			body = append(body, bytes.Repeat([]byte{0xcc}, perfExtra)...)
		}
		m, err := ToHost(TypePerfstatReply, body)
		if err != nil {
			t.Errorf("%d entries: %v", n, err)
			continue
		}
		got := m.(*PerfstatReply)
		if len(got.Entries) != n || n > 0 && got.Entries[n-1] != (PerfEntry{Unique: uint64(n)}) {
			t.Errorf("%d entries: decoded %d", n, len(got.Entries))
		}
	}
}

// TestInitOfTheFuture: a later version's fields after ours are ignored.
func TestInitOfTheFuture(t *testing.T) {
	want := &Init{Version: 3, MinVersion: 2, Socket: "unix:/s"}
	got, err := ToGuest(TypeInit, append(body(t, want), "more fields"...))
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got, cmpopts.EquateEmpty()); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}
}

// TestInitV1: all that a version below 2 can say is six bytes.
func TestInitV1(t *testing.T) {
	for _, v := range []uint16{0, 1} {
		b, err := Append(nil, &Init{Version: v, Token: []byte("secret")})
		if err != nil || !bytes.Equal(b, []byte{6, 0, 0, 0, 0, 0}) {
			t.Errorf("version %d: %x, %v", v, b, err)
		}
	}
}
