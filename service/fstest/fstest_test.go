// SPDX-License-Identifier: Apache-2.0

package fstest

import (
	"cmp"
	"flag"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

var (
	flagDir     = flag.String("dir", "", "directory to test; default: a temporary one")
	flagEntries = flag.Int("entries", 0, "entries of the large directory, and at most of other large ones; default: 100,000")
	flagOps     = flag.Int("ops", 0, "operations of the random sequence; default: 3,000")
	flagSeed    = flag.Uint64("seed", 0, "seed of the random sequence; default: a random one")
	missing     = missingFlag{}
)

// missingFlag collects -missing case=reason.
type missingFlag map[string]string

func (m missingFlag) String() string { return "" }
func (m missingFlag) Set(s string) error {
	name, reason, _ := strings.Cut(s, "=")
	m[name] = reason
	return nil
}

func TestMain(m *testing.M) {
	if Child() {
		return
	}
	flag.Var(missing, "missing", "`case=reason` that the file system can't run (repeatable)")
	flag.Parse()
	os.Exit(m.Run())
}

func options() Options {
	return Options{Missing: missing, Entries: *flagEntries, Ops: *flagOps, Seed: *flagSeed}
}

// TestDir tests the directory that was given, else one on the disk.
func TestDir(t *testing.T) {
	Leaks(t)
	dir := *flagDir
	if dir == "" {
		dir = t.TempDir()
	}
	All(t, dir, options())
}

// TestTmpfs tests a tmpfs, the other reference.
func TestTmpfs(t *testing.T) {
	if *flagDir != "" {
		t.Skip("-dir was given")
	}
	if os.Geteuid() != 0 {
		t.Skip("NOT RUN: mounting a tmpfs needs root")
	}
	Leaks(t)
	dir := t.TempDir()
	if err := unix.Mount("fstest", dir, "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	})
	o := options()
	o.Entries = cmp.Or(o.Entries, 20_000) // the full number is TestDir's
	o.Missing = map[string]string{"fallocate/zero": "tmpfs has no FALLOC_FL_ZERO_RANGE"}
	All(t, dir, o)
}
