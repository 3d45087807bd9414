// SPDX-License-Identifier: Apache-2.0

package wire

import (
	"bytes"
	"errors"
	"io"
	"slices"
	"strings"
	"testing"
)

func frame(length uint32, rest ...byte) []byte { return append(le.AppendUint32(nil, length), rest...) }

func TestReader(t *testing.T) {
	const limit = 100
	tests := []struct {
		name  string
		input []byte
		want  error // nil: a message
		read  int   // bytes taken from the stream
	}{
		{"nothing", nil, io.EOF, 0},
		{"within the length", []byte{6, 0, 0}, io.ErrUnexpectedEOF, 3},
		{"length 0", frame(0, 1, 2, 3, 4), ErrProtocol, 4},
		{"length 1", frame(1, 1, 2, 3, 4), ErrProtocol, 4},
		{"length 2", frame(2, 1, 2, 3, 4), ErrProtocol, 4},
		{"length 3", frame(3, 1, 2, 3, 4), ErrProtocol, 4},
		{"length 4", frame(4, 1, 2, 3, 4), ErrProtocol, 4},
		{"length 5", frame(5, 1, 2, 3, 4), ErrProtocol, 4},
		{"length 6", frame(6, 1, 2, 3, 4), nil, 6},
		{"nothing after the length", frame(6), io.ErrUnexpectedEOF, 4},
		{"within the type", frame(6, 1), io.ErrUnexpectedEOF, 5},
		{"within the body", frame(9, 1, 2, 3), io.ErrUnexpectedEOF, 7},
		{"the longest", frame(limit, make([]byte, limit)...), nil, limit},
		{"longer", frame(limit+1, make([]byte, limit)...), ErrProtocol, 4},
		{"longer, nothing follows", frame(limit + 1), ErrProtocol, 4},
		{"2 GiB", frame(1 << 31), ErrProtocol, 4},
		{"the largest length", frame(1<<32 - 1), ErrProtocol, 4},
		{"text", []byte("HTTP/1.1 400 Bad Request\r\n"), ErrProtocol, 4},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			in := bytes.NewReader(tt.input)
			typ, b, err := NewReader(in, limit).Next()
			if tt.want == nil {
				if err != nil {
					t.Fatal(err)
				}
				if n := headerLen + len(b); n != tt.read || typ != Type(le.Uint16(tt.input[4:])) {
					t.Errorf("type %d, %d bytes", typ, n)
				}
			} else if !errors.Is(err, tt.want) {
				t.Errorf("%v, want %v", err, tt.want)
			}
			if n := len(tt.input) - in.Len(); n != tt.read {
				t.Errorf("read %d bytes, want %d", n, tt.read)
			}
		})
	}
}

// TestReaderLeavesTheRest reads a message, and then what is no message.
func TestReaderLeavesTheRest(t *testing.T) {
	b, err := Append(nil, &OpenReply{Text: "go on"})
	if err != nil {
		t.Fatal(err)
	}
	r := bytes.NewReader(append(b, "FUSE"...))
	if _, _, err := NewReader(r, MaxFirst).Next(); err != nil {
		t.Fatal(err)
	}
	if rest, _ := io.ReadAll(r); string(rest) != "FUSE" {
		t.Errorf("left %q", rest)
	}
}

func TestReaderError(t *testing.T) {
	broken := errors.New("broken")
	for _, before := range []int{0, 2, 4, 5, 8} {
		in := io.MultiReader(bytes.NewReader(frame(20, make([]byte, 16)...)[:before]), errReader{broken})
		if _, _, err := NewReader(in, 100).Next(); !errors.Is(err, broken) || errors.Is(err, ErrProtocol) {
			t.Errorf("after %d bytes: %v", before, err)
		}
	}
}

type errReader struct{ err error }

func (r errReader) Read([]byte) (int, error) { return 0, r.err }

// repeat gives the same message for ever.
type repeat struct {
	b []byte
	i int
}

func (r *repeat) Read(p []byte) (int, error) {
	n := copy(p, r.b[r.i:])
	r.i = (r.i + n) % len(r.b)
	return n, nil
}

func TestReaderAllocatesOnce(t *testing.T) {
	b, err := Append(nil, &LogNotice{Text: strings.Repeat("x", 5000)})
	if err != nil {
		t.Fatal(err)
	}
	r := NewReader(&repeat{b: b}, MaxControl)
	n := testing.AllocsPerRun(100, func() {
		if _, _, err := r.Next(); err != nil {
			t.Fatal(err)
		}
	})
	if n != 0 {
		t.Errorf("%v allocations a message", n)
	}
	if c := cap(r.buf); c > MaxControl {
		t.Errorf("a buffer of %d bytes", c)
	}
}

// TestReaderChecksFirst: a bad length costs no buffer.
func TestReaderChecksFirst(t *testing.T) {
	for _, length := range []uint32{0, 5, 1<<28 + 1, 1<<32 - 1} {
		r := NewReader(bytes.NewReader(frame(length, 0, 0)), 1<<28)
		if _, _, err := r.Next(); !errors.Is(err, ErrProtocol) || r.buf != nil {
			t.Errorf("length %d: %v, a buffer of %d bytes", length, err, cap(r.buf))
		}
	}
}

func TestEventReader(t *testing.T) {
	tests := []struct {
		name  string
		input string
		want  *EventV1 // nil: ErrProtocol
	}{
		{"good", "\x0a\x00\x00\x00\x00\x03/a\x00\x01", &EventV1{"/a", ActionUnlink}},
		{"unknown action", "\x0a\x00\x00\x00\x00\x03/a\x00\x63", &EventV1{"/a", 99}},
		{"ping without a path", "\x07\x00\x00\x00\x00\x00\x80", &EventV1{"", ActionPing}},
		{"n little-endian", "\x0a\x00\x00\x00\x03\x00/a\x00\x01", nil},
		{"no path", "\x07\x00\x00\x00\x00\x00\x01", nil},
		{"no action", "\x09\x00\x00\x00\x00\x03/a\x00", nil},
		{"no fields", "\x06\x00\x00\x00\x00\x00", nil},
		{"n runs over", "\x0a\x00\x00\x00\xff\xff/a\x00\x01", nil},
		{"n by one too many", "\x0a\x00\x00\x00\x00\x04/a\x00\x01", nil},
		{"n by one too few", "\x0b\x00\x00\x00\x00\x03/a\x00\x01\x01", nil},
		{"path without NUL", "\x0a\x00\x00\x00\x00\x03/ab\x01", nil},
		{"path with two NULs", "\x0a\x00\x00\x00\x00\x03/\x00\x00\x01", nil},
		{"length 5", "\x05\x00\x00\x00\x00\x00\x80", nil},
		{"length over 4096", "\x01\x10\x00\x00\x0f\xfa", nil},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, err := NewEventReader(strings.NewReader(tt.input)).Next()
			switch {
			case tt.want == nil && !errors.Is(err, ErrProtocol):
				t.Errorf("%+v, %v; want ErrProtocol", got, err)
			case tt.want != nil && (err != nil || got != *tt.want):
				t.Errorf("%+v, %v; want %+v", got, err, *tt.want)
			}
		})
	}
	t.Run("the longest", func(t *testing.T) {
		b, err := AppendEventV1(nil, EventV1{Path: long(MaxEvent - 8)})
		if err != nil || len(b) != MaxEvent {
			t.Fatalf("%d bytes, %v", len(b), err)
		}
		if got, err := NewEventReader(bytes.NewReader(b)).Next(); err != nil || got.Path != long(MaxEvent-8) {
			t.Error(err)
		}
	})
	for _, path := range []string{long(MaxEvent - 7), "/a\x00"} {
		if b, err := AppendEventV1([]byte("before"), EventV1{Path: path}); !errors.Is(err, ErrProtocol) || string(b) != "before" {
			t.Errorf("%.10q: %v", path, err)
		}
	}
}

func TestMountArgs(t *testing.T) {
	tests := []struct {
		name    string
		args    string
		options []string
		dir     string
		want    error
	}{
		{"dir alone", "/m", nil, "/m", nil},
		{"options", "-o\x00a,b=c\x00/m", []string{"a", "b=c"}, "/m", nil},
		{"joined", "-oa\x00/m", []string{"a"}, "/m", nil},
		{"twice", "-o\x00a\x00-o\x00b\x00/m", []string{"a", "b"}, "/m", nil},
		{"escaped", `-o` + "\x00" + `fsname=a\,b\\c,ro` + "\x00/m", []string{`fsname=a,b\c`, "ro"}, "/m", nil},
		{"backslash at the end", "-o\x00a\\\x00/m", []string{`a\`}, "/m", nil},
		{"empty options", "-o\x00,a,,\x00/m", []string{"a"}, "/m", nil},
		{"end of options", "-o\x00a\x00--\x00/m", []string{"a"}, "/m", nil},
		{"nothing", "", nil, "", ErrIncomplete},
		{"cut within -o", "-", nil, "", ErrIncomplete},
		{"cut after -o", "-o", nil, "", ErrIncomplete},
		{"cut after its NUL", "-o\x00", nil, "", ErrIncomplete},
		{"cut within options", "-o\x00allow", nil, "", ErrIncomplete},
		{"options like a path", "-o\x00/m", nil, "", ErrIncomplete},
		{"cut before dir", "-o\x00a\x00", nil, "", ErrIncomplete},
		{"NUL at the end", "/m\x00", nil, "", ErrProtocol},
		{"relative", "-o\x00a\x00m", nil, "", ErrIncomplete},
		{"unmount", "-u\x00/m", nil, "", ErrProtocol},
		{"lazy unmount", "-z\x00/m", nil, "", ErrProtocol},
		{"two dirs", "/a\x00/b", nil, "", ErrProtocol},
		{"long", "/" + long(MaxMountArgs), nil, "", ErrProtocol},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			options, dir, err := ParseMountArgs([]byte(tt.args))
			if !slices.Equal(options, tt.options) || dir != tt.dir || !errors.Is(err, tt.want) {
				t.Errorf("%q %q %v; want %q %q %v", options, dir, err, tt.options, tt.dir, tt.want)
			}
		})
	}
	for _, args := range [][]string{{"-o", "a\x00b", "/m"}, {long(MaxMountArgs + 1)}} {
		if b, err := AppendMountArgs([]byte("m"), args); !errors.Is(err, ErrProtocol) || string(b) != "m" {
			t.Errorf("%.20q: %v", args, err)
		}
	}
}
