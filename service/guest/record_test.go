// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"io"
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"transfused.org/transfused/service/sd"
)

// storedMount is a record with a device beside it, as the store passes them.
func storedMount(t *testing.T, r *record) (s sd.Stored, file *os.File) {
	t.Helper()
	file, err := newRecordFile(r)
	if err != nil {
		t.Fatal(err)
	}
	dev, err := os.Open("/dev/null")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { file.Close(); dev.Close() })
	return sd.Stored{Name: r.name(), Files: []*os.File{file, dev}}, file
}

func testRecord() *record {
	return &record{ID: 7, Spec: MountSpec{Tag: "code", Dir: "/mnt/code"}, Kept: true, Session: strings.Repeat("0a", 16), WireID: 3,
		Options: MountOptions{Source: "code"}}
}

// The last whole line counts.
func TestRecord(t *testing.T) {
	r := testRecord()
	s, file := storedMount(t, r)
	r.Agreed = agreed{RequestSize: minRequest, MaxReply: minReply, Minor: 45, MaxWrite: 4096, Resend: true}
	r.Mount = mountID{Mnt: 12, Dev2: 99}
	if err := r.append(file); err != nil {
		t.Fatal(err)
	}
	if _, err := file.Seek(0, io.SeekEnd); err != nil {
		t.Fatal(err)
	}
	if _, err := file.WriteString(`{"Format":1,"Reads":1,"ID":8,`); err != nil { // killed while it wrote
		t.Fatal(err)
	}
	got, dev, f, err := readRecord(s)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(r, got); diff != "" {
		t.Error(diff)
	}
	if dev != s.Files[1] || f != s.Files[0] {
		t.Error("device and record are taken for each other")
	}
	if err := got.Agreed.check(); err != nil {
		t.Error(err)
	}
}

// A record of the next release is read, unless that says that this one can't.
func TestRecordOfAnotherRelease(t *testing.T) {
	line := func(format, reads string) string {
		return `{"Format":` + format + `,"Reads":` + reads + `,"ID":7,"Spec":{"Tag":"code","Dir":"/mnt/code"},"Session":"` + strings.Repeat("0a", 16) + `","Novelty":{"x":1}}` + "\n"
	}
	for _, tt := range []struct{ name, text, want string }{
		{"the next", line("2", "1"), ""},
		{"far", line("9", "2"), "start the version that made it, or unmount /mnt/code"},
		{"none", "", "not complete"},
		{"no JSON", "x\n", "its record: "},
		{"another mount", strings.Replace(line("1", "1"), `"ID":7`, `"ID":9`, 1), "of mount 9"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s, file := storedMount(t, testRecord())
			if err := file.Truncate(0); err != nil {
				t.Fatal(err)
			}
			if _, err := file.WriteAt([]byte(tt.text), 0); err != nil {
				t.Fatal(err)
			}
			r, _, _, err := readRecord(s)
			switch {
			case tt.want == "" && (err != nil || r.Spec.Tag != "code"):
				t.Errorf("%+v, %v", r, err)
			case tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want)):
				t.Errorf("%v, want %q", err, tt.want)
			}
		})
	}
	s, _ := storedMount(t, testRecord())
	s.Files = s.Files[:1]
	if _, _, _, err := readRecord(s); err == nil {
		t.Error("a record without a device is taken up")
	}
	// Before there were several streams nothing was said of them.
	s, file := storedMount(t, testRecord())
	text := line("1", "1")
	if err := file.Truncate(int64(len(text))); err != nil {
		t.Fatal(err)
	}
	if _, err := file.WriteAt([]byte(text), 0); err != nil {
		t.Fatal(err)
	}
	if r, _, _, err := readRecord(s); err != nil || r.streams() != 1 {
		t.Errorf("%+v, %v", r, err)
	}
	for n, want := range map[int]int{-1: 1, 1: 1, 3: 3, 1000: maxStreams} {
		if got := (&record{Streams: n}).streams(); got != want {
			t.Errorf("of %d streams %d are opened, want %d", n, got, want)
		}
	}
	for _, bad := range []agreed{{RequestSize: 1, MaxReply: minReply}, {RequestSize: minRequest, MaxReply: 1 << 30}} {
		if bad.check() == nil {
			t.Errorf("%+v is taken", bad)
		}
	}
}
