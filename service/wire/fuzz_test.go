// SPDX-License-Identifier: Apache-2.0

package wire

import (
	"bytes"
	"errors"
	"io"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

// addTranscripts gives f the steps of one kind of all transcripts.
func addTranscripts(f *testing.F, kind string, add func(s *step)) {
	f.Helper()
	for _, file := range transcripts(f) {
		for _, s := range slices.Concat(transcript(f, file)...) {
			if s.kind == kind {
				add(s)
			}
		}
	}
}

func fuzzDecode(f *testing.F, decode func(Type, []byte) (Message, error), host bool) {
	addTranscripts(f, "message", func(s *step) {
		if s.host == host {
			f.Add(le.Uint16(s.bytes[4:]), s.bytes[headerLen:])
		}
	})
	f.Fuzz(func(t *testing.T, typ uint16, b []byte) {
		var m Message
		var err error
		n := allocated(func() { m, err = decode(Type(typ), b) })
		if n > 1<<16+allocBound(len(b)) { // the fuzzer allocates beside us
			t.Errorf("%d bytes allocated for %d", n, len(b))
		}
		if err != nil {
			if m != nil || !errors.Is(err, ErrProtocol) {
				t.Errorf("%v %v", m, err)
			}
			return
		}
		if m.Type() != Type(typ) {
			t.Errorf("type %d became %T", typ, m)
		}
		again, err := Append(nil, m)
		if err != nil {
			if headerLen+len(b) > MaxControl {
				return // more than we would send
			}
			t.Fatalf("%+v: %v", m, err)
		}
		again = again[headerLen:]
		switch m.(type) {
		case *Init, *PerfstatReply: // what followed is dropped
			if len(again) <= len(b) {
				b = b[:len(again)]
			}
		}
		if !bytes.Equal(again, b) {
			t.Errorf("%+v: encodes as\n%x, was\n%x", m, again, b)
		}
		back, err := decode(Type(typ), again)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(m, back, cmpopts.EquateEmpty()); diff != "" {
			t.Errorf("(-want +got)\n%s", diff)
		}
	})
}

func FuzzToHost(f *testing.F) { fuzzDecode(f, ToHost, false) }

func FuzzToGuest(f *testing.F) { fuzzDecode(f, ToGuest, true) }

// FuzzReader compares a Reader with the obvious way to split a whole input.
func FuzzReader(f *testing.F) {
	var all []byte
	addTranscripts(f, "message", func(s *step) { all = append(all, s.bytes...) })
	f.Add(all, 4096)
	f.Add(all, 16)
	for n := range 8 {
		f.Add(frame(uint32(n), 1, 2, 3, 4), 100)
	}
	f.Add(frame(1<<32-1, 1, 2), 1<<20)
	f.Fuzz(func(t *testing.T, in []byte, limit int) {
		limit = headerLen + int(uint(limit)%(1<<20))
		s := bytes.NewReader(in)
		r := NewReader(s, limit)
		for left := in; ; {
			typ, b, err := r.Next()
			ends := len(left) - s.Len()
			switch {
			case len(left) == 0:
				if err != io.EOF {
					t.Fatalf("at the end: %v", err)
				}
				return
			case len(left) < 4 || le.Uint32(left) >= headerLen && uint64(le.Uint32(left)) <= uint64(limit) && uint64(len(left)) < uint64(le.Uint32(left)):
				if err != io.ErrUnexpectedEOF {
					t.Fatalf("cut: %v", err)
				}
				return
			case le.Uint32(left) < headerLen || uint64(le.Uint32(left)) > uint64(limit):
				if !errors.Is(err, ErrProtocol) || ends != 4 {
					t.Fatalf("length %d: %v after %d bytes", le.Uint32(left), err, ends)
				}
				return
			}
			n := int(le.Uint32(left))
			if err != nil || typ != Type(le.Uint16(left[4:])) || !bytes.Equal(b, left[headerLen:n]) || ends != n {
				t.Fatalf("%d %x %v after %d bytes, of %x", typ, b, err, ends, left[:n])
			}
			left = left[n:]
		}
	})
}

func FuzzEventV1(f *testing.F) {
	addTranscripts(f, "event", func(s *step) { f.Add(s.bytes) })
	f.Add([]byte("\x07\x00\x00\x00\x00\x00\x80"))
	f.Fuzz(func(t *testing.T, in []byte) {
		e, err := NewEventReader(bytes.NewReader(in)).Next()
		if err != nil {
			return
		}
		out, err := AppendEventV1(nil, e)
		if err != nil {
			t.Fatal(err)
		}
		if n := int(le.Uint32(in)); n == 7 {
			if e != (EventV1{Action: ActionPing}) {
				t.Errorf("%+v", e)
			}
		} else if !bytes.Equal(out, in[:n]) {
			t.Errorf("%+v: encodes as\n%x, was\n%x", e, out, in[:n])
		}
	})
}

func FuzzMountArgs(f *testing.F) {
	addTranscripts(f, "mount", func(s *step) { f.Add(s.bytes) })
	f.Add([]byte("-o\x00fsname=a\\,b\\\\,,ro\x00--\x00/m"))
	f.Fuzz(func(t *testing.T, in []byte) {
		options, dir, err := ParseMountArgs(in)
		if err != nil {
			return
		}
		// Escapes may make it longer than it may be; the meaning must survive.
		out, err := AppendMountArgs(nil, MountArgs(options, dir))
		if err != nil {
			return
		}
		options2, dir2, err := ParseMountArgs(out)
		if err != nil || dir2 != dir || !slices.Equal(options, options2) {
			t.Errorf("%q %q became %q %q, %v", options, dir, options2, dir2, err)
		}
	})
}
