// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
)

// generatorEnv makes the test binary transfused with the configuration below the directory that it names.
const generatorEnv = "TRANSFUSED_TEST_GENERATOR"

func TestMain(m *testing.M) {
	if root := os.Getenv(generatorEnv); root != "" {
		os.Exit(run(root))
	}
	// A helper is this program again, under a name that testscript does not know.
	if os.Getenv("TRANSFUSE_ROLE") != "" {
		os.Exit(run(""))
	}
	// The configuration of the machine that tests is none of the tests' business.
	testscript.Main(m, map[string]func(){"transfused": func() { os.Exit(run(os.Getenv("S"))) }})
}

func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir: "testdata/script",
		Setup: func(e *testscript.Env) error {
			// A socket's path must fit 108 bytes.
			dir, err := os.MkdirTemp("", "tf")
			if err != nil {
				return err
			}
			e.Defer(func() { os.RemoveAll(dir) })
			e.Setenv("S", dir)
			return nil
		},
		Cmds: map[string]func(ts *testscript.TestScript, neg bool, args []string){
			"garbagehost": garbageHost,
			"exitcode":    exitCode,
			"waitfor":     waitFor,
			"user":        asUser,
			"signal":      sendSignal,
		},
	})
}

// garbagehost PATH: a host at a unix socket that answers garbage.
func garbageHost(ts *testscript.TestScript, neg bool, args []string) {
	ln, err := net.Listen("unix", ts.MkAbs(args[0]))
	ts.Check(err)
	ts.Defer(func() { ln.Close() })
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			go func() {
				c.Write([]byte("HTTP/1.1 400 Bad Request\r\n\r\n"))
				c.Read(make([]byte, 512))
				c.Close()
			}()
		}
	}()
}

// exitcode N program [argument…]: the program must end with N.
func exitCode(ts *testscript.TestScript, neg bool, args []string) {
	err := ts.Exec(args[1], args[2:]...)
	code := 0
	if exit, ok := err.(*exec.ExitError); ok {
		code = exit.ExitCode()
	} else if err != nil {
		ts.Fatalf("%v", err)
	}
	if got := fmt.Sprint(code); got != args[0] {
		ts.Fatalf("exit code %s, want %s", got, args[0])
	}
}

// waitfor FILE TEXT: wait until FILE holds TEXT.
func waitFor(ts *testscript.TestScript, neg bool, args []string) {
	deadline := time.Now().Add(10 * time.Second)
	var b []byte
	for time.Now().Before(deadline) {
		// Nothing tells of a line in a file but looking.
		if b, _ = os.ReadFile(ts.MkAbs(args[0])); strings.Contains(string(b), args[1]) {
			return
		}
		time.Sleep(5 * time.Millisecond)
	}
	ts.Fatalf("%s has no %q:\n%s", args[0], args[1], b)
}

// signal HUP|TERM: send it to the program that was last started in the background.
func sendSignal(ts *testscript.TestScript, neg bool, args []string) {
	all := ts.BackgroundCmds()
	sig := map[string]os.Signal{"HUP": syscall.SIGHUP, "TERM": syscall.SIGTERM}[args[0]]
	ts.Check(all[len(all)-1].Process.Signal(sig))
}

// user program [argument…]: run it as an ordinary user, and fail when it does.
func asUser(ts *testscript.TestScript, neg bool, args []string) {
	if os.Geteuid() != 0 {
		ts.Fatalf("user: only root can become another user: run this test as root")
	}
	self, err := os.Executable()
	ts.Check(err)
	dir := ts.Getenv("S")
	bin := filepath.Join(dir, "transfused")
	// By another process: a child that is started meanwhile would inherit a descriptor for writing, and keep this one
	// from being executed (ETXTBSY).
	ts.Check(exec.Command("cp", self, bin).Run())
	ts.Check(os.Chmod(bin, 0o755))
	ts.Check(os.Chmod(dir, 0o755))
	cmd := exec.Command(bin, args...)
	cmd.Dir = dir
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	cmd.Env = append(os.Environ(), "PATH="+ts.Getenv("PATH"))
	out, err := cmd.CombinedOutput()
	fmt.Fprintf(ts.Stderr(), "%s", out)
	if (err == nil) == neg {
		ts.Fatalf("user: %v", err)
	}
}
