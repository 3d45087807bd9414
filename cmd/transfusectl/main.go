// SPDX-License-Identifier: Apache-2.0

// Command transfusectl asks and orders the two daemons at their control sockets. Under the names mount.transfuse and
// mount.fuse.transfuse it is the helper that mount(8) calls.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// version is set by the linker.
var version = "unknown"

// Exit codes, as LSB has them for services. status has 4 besides.
const (
	exitOK         = 0
	exitFailure    = 1
	exitUsage      = 2
	exitNotRunning = 3 // nobody listens at the control socket
	exitUnknown    = 4 // status only: the daemon can't be asked
)

// exitError ends the program with a code; without an error it says nothing.
type exitError struct {
	code int
	err  error
}

func (e *exitError) Error() string {
	if e.err == nil {
		return fmt.Sprintf("exit code %d", e.code)
	}
	return e.err.Error()
}

func (e *exitError) Unwrap() error { return e.err }

func main() { os.Exit(run(os.Args)) }

func run(args []string) int {
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGINT, unix.SIGTERM)
	defer stop()
	switch name := filepath.Base(args[0]); name {
	case "mount.transfuse", "mount.fuse.transfuse":
		err := mountHelper(ctx, args[1:])
		if err != nil {
			fmt.Fprintf(os.Stderr, "%s: %s\n", name, clean(err.Error()))
		}
		return mountExit(err)
	}
	cmd := newCommand()
	cmd.SetArgs(args[1:])
	err := cmd.ExecuteContext(ctx)
	if err == nil {
		return exitOK
	}
	code := exitFailure
	var exit *exitError
	if errors.As(err, &exit) {
		code = exit.code
		if exit.err == nil {
			return code
		}
	}
	if ctx.Err() != nil && errors.Is(err, context.Canceled) {
		return code // who pressed Ctrl-C knows
	}
	fmt.Fprintln(os.Stderr, "transfusectl:", clean(err.Error()))
	return code
}
