// SPDX-License-Identifier: Apache-2.0

package fstest

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// Options adapt the suite to a file system. The zero value runs everything.
type Options struct {
	// Missing names what the file system under test does not have, and why:
	// the key is a case ("fallocate/zero") or a family ("acl"). Such cases are
	// reported as NOT RUN. A case that has no key here must pass.
	Missing map[string]string

	Entries int    // of the large directory, and at most of other large ones; 0: 100,000
	Ops     int    // operations of the random sequence; 0: 3,000
	Seed    uint64 // of the random sequence; 0: a random one, which is printed
}

type testCase struct {
	name string // family/case
	root bool   // needs root
	run  func(*env)
}

// All runs every case as a subtest of t, one after the other, in directories
// of its own below dir. It sets the process's umask for its time.
func All(t *testing.T, dir string, o Options) {
	if o.Entries == 0 {
		o.Entries = 100_000
	}
	if o.Ops == 0 {
		o.Ops = 3_000
	}
	if o.Seed == 0 {
		o.Seed = rand.Uint64()
	}
	defer unix.Umask(unix.Umask(0))

	var notRun []string
	cases := slices.Concat(attrCases, nodeCases, linkCases, renameCases, openCases, ioCases, spaceCases, mmapCases,
		unlinkedCases, dirCases, nameCases, xattrCases, aclCases, permCases, setidCases, lockCases, miscCases, programCases, stressCases, modelCases)
	for i, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			e := &env{T: t, o: o, dir: filepath.Join(dir, fmt.Sprintf("fstest.%d.%d", os.Getpid(), i))}
			e.notRun = func(reason string) {
				notRun = append(notRun, fmt.Sprintf("NOT RUN: %s: %s", c.name, reason))
				t.Skip("NOT RUN: " + reason)
			}
			family, _, _ := strings.Cut(c.name, "/")
			for _, key := range []string{c.name, family} {
				if reason, ok := o.Missing[key]; ok {
					e.notRun(reason)
				}
			}
			if c.root && os.Geteuid() != 0 {
				e.notRun("needs root")
			}
			if err := unix.Mkdir(e.dir, 0o755); err != nil {
				t.Fatalf("make the case's directory %s: %v", e.dir, err)
			}
			t.Cleanup(func() {
				if err := os.RemoveAll(e.dir); err != nil {
					t.Errorf("remove the case's directory: %v", err)
				}
			})
			c.run(e)
		})
	}
	for _, line := range notRun {
		fmt.Println(line)
	}
}

// env is what a case runs in: an empty directory, mode 0755, umask 0.
type env struct {
	*testing.T
	o      Options
	dir    string
	notRun func(reason string) // ends the case
}
