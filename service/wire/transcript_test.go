// SPDX-License-Identifier: Apache-2.0

package wire

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

// step is one thing that a side of a transcript says; testdata/README.md has the form.
type step struct {
	line       int
	host, seed bool
	kind       string // message, event, mount, bytes
	name, want string // of a message; JSON
	bytes      []byte
}

// transcript returns the connections of a file, each a list of steps.
func transcript(t testing.TB, file string) [][]*step {
	t.Helper()
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	conns := [][]*step{nil}
	var last *step
	for i, line := range strings.Split(string(text), "\n") {
		fail := func(why any) { t.Fatalf("%s:%d: %v", file, i+1, why) }
		switch {
		case strings.HasPrefix(line, "    "):
			b, err := unhex(line)
			if err != nil || last == nil {
				fail(err)
			}
			last.bytes = append(last.bytes, b...)
		case line == "---":
			conns = append(conns, nil)
		case line != "" && line[0] != '#':
			head, want, _ := strings.Cut(line, " {")
			if want != "" {
				want = "{" + want
			} else if head, want, _ = strings.Cut(line, " ["); want != "" {
				want = "[" + want
			}
			if i := strings.LastIndexAny(want, "}]"); i >= 0 {
				want = want[:i+1] // a comment follows
			}
			head, _, _ = strings.Cut(head, "#")
			words := strings.Fields(head)
			s := &step{line: i + 1, host: words[0] == "host", want: want}
			words = words[1:]
			if words[0] == "seed" {
				s.seed, words = true, words[1:]
			}
			s.kind = words[0]
			if s.kind == "message" {
				s.name = words[1]
			}
			last = s
			conns[len(conns)-1] = append(conns[len(conns)-1], s)
		}
	}
	return conns
}

// unhex reads hexadecimal bytes and quoted strings, up to a comment.
func unhex(line string) (b []byte, err error) {
	for line = strings.TrimSpace(line); line != "" && line[0] != '#'; line = strings.TrimSpace(line) {
		if line[0] == '"' {
			q, err := strconv.QuotedPrefix(line)
			if err != nil {
				return nil, err
			}
			s, err := strconv.Unquote(q)
			if err != nil {
				return nil, err
			}
			b, line = append(b, s...), line[len(q):]
			continue
		}
		word, rest, _ := strings.Cut(line, " ")
		x, err := hex.DecodeString(word)
		if err != nil {
			return nil, err
		}
		b, line = append(b, x...), rest
	}
	return b, nil
}

func transcripts(t testing.TB) []string {
	files, err := filepath.Glob("testdata/v*/*.txt")
	if err != nil || len(files) < 7 {
		t.Fatalf("transcripts: %v %v", files, err)
	}
	return files
}

// TestTranscripts reads each side of each connection as one stream, in single
// bytes, and encodes what it decoded to the same bytes.
func TestTranscripts(t *testing.T) {
	for _, file := range transcripts(t) {
		t.Run(strings.TrimPrefix(file, "testdata/"), func(t *testing.T) {
			for _, conn := range transcript(t, file) {
				var guest, host bytes.Buffer
				for _, s := range conn {
					if s.host {
						host.Write(s.bytes)
					} else {
						guest.Write(s.bytes)
					}
				}
				for _, s := range conn {
					r := &guest
					if s.host {
						r = &host
					}
					left := r.Len() - len(s.bytes)
					s.check(t, iotest.OneByteReader(r))
					if r.Len() != left {
						t.Fatalf("line %d: %d bytes are left of the stream, want %d", s.line, r.Len(), left)
					}
				}
			}
		})
	}
}

func (s *step) check(t *testing.T, r io.Reader) {
	t.Helper()
	var got, want any
	var again []byte
	var err error
	switch s.kind {
	case "bytes":
		io.ReadFull(r, make([]byte, len(s.bytes)))
		return
	case "message":
		var m Message
		if m, err = s.message(NewReader(r, MaxControl)); err == nil {
			got, want = m, reflect.New(reflect.TypeOf(m).Elem()).Interface()
			if name := reflect.TypeOf(m).Elem().Name(); name != s.name {
				t.Fatalf("line %d: decoded a %s, want %s", s.line, name, s.name)
			}
			again, err = Append(nil, m)
		}
	case "event":
		var e EventV1
		if e, err = NewEventReader(r).Next(); err == nil {
			got, want = &e, new(EventV1)
			again, err = AppendEventV1(nil, e)
		}
	case "mount":
		b := make([]byte, len(s.bytes))
		io.ReadFull(r, b)
		var args []string
		for arg := range bytes.SplitSeq(b, []byte{0}) {
			args = append(args, string(arg))
		}
		got, want = &args, new([]string)
		if again, err = AppendMountArgs(nil, args); err == nil {
			_, _, err = ParseMountArgs(b)
		}
	default:
		err = fmt.Errorf("what is %q?", s.kind)
	}
	if err != nil {
		t.Fatalf("line %d: %v", s.line, err)
	}
	d := json.NewDecoder(strings.NewReader(s.want))
	d.DisallowUnknownFields()
	if err := d.Decode(want); err != nil {
		t.Fatalf("line %d: %v", s.line, err)
	}
	if diff := cmp.Diff(want, got, cmpopts.EquateEmpty()); diff != "" {
		t.Errorf("line %d: (-want +got)\n%s", s.line, diff)
	}
	if !s.seed && !bytes.Equal(again, s.bytes) {
		t.Errorf("line %d: encodes as\n%x, want\n%x", s.line, again, s.bytes)
	}
}

func (s *step) message(r *Reader) (Message, error) {
	typ, body, err := r.Next()
	if err != nil {
		return nil, err
	}
	if s.host {
		return ToGuest(typ, body)
	}
	return ToHost(typ, body)
}

// TestTranscriptsAreComplete makes sure that every message of both versions is
// in a transcript, in every direction that it goes.
func TestTranscriptsAreComplete(t *testing.T) {
	var seen []string
	for _, file := range transcripts(t) {
		for _, s := range slices.Concat(transcript(t, file)...) {
			if s.kind == "message" {
				seen = append(seen, fmt.Sprintf("%v %d", s.host, le.Uint16(s.bytes[4:])))
			}
		}
	}
	for _, k := range kinds {
		if k.t == TypePing || k.t == TypeAlive {
			continue // the same both ways
		}
		for _, d := range []direction{toHost, toGuest} {
			if key := fmt.Sprintf("%v %d", d == toGuest, k.t); k.d&d != 0 && !slices.Contains(seen, key) {
				t.Errorf("%T to the %v is in no transcript", k.new(), d)
			}
		}
	}
}
