// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"transfused.org/transfused/service/fstest"
)

// bin is where both programs are; every user may execute them.
var bin string

func TestMain(m *testing.M) {
	if fstest.Child() {
		return
	}
	os.Exit(run(m))
}

func run(m *testing.M) int {
	if os.Getenv(suiteEnv)+os.Getenv(floodEnv) != "" {
		return m.Run()
	}
	if os.Geteuid() != 0 {
		fmt.Fprintln(os.Stderr, "the tests of both programs mount: run them as root")
		return 1
	}
	if _, err := exec.LookPath("fusermount3"); err != nil {
		fmt.Fprintln(os.Stderr, "fusermount3 is missing: apt-get install fuse3")
		return 1
	}
	dir, err := os.MkdirTemp("", "transfuse-e2e")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	if err := os.Chmod(dir, 0o755); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	bin = dir
	build := exec.Command("go", "build", "-o", bin)
	build.Dir = filepath.Join("..", "..")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if os.Getenv("TRANSFUSED_RACE") != "" {
		build.Args = append(build.Args, "-race")
		build.Env = append(build.Env, "CGO_ENABLED=1")
	}
	build.Args = append(build.Args, "./cmd/...")
	build.Stderr = os.Stderr
	if err := build.Run(); err != nil {
		fmt.Fprintln(os.Stderr, "go build ./cmd/...:", err)
		return 1
	}
	// An ordinary user's part of the suites is this program again, where he may execute it.
	self, err := os.ReadFile("/proc/self/exe")
	if err == nil {
		err = os.WriteFile(filepath.Join(bin, "suites"), self, 0o755)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	unix.Umask(0o022)
	return m.Run()
}
