// SPDX-License-Identifier: Apache-2.0

// Command transfused is the guest's daemon: it mounts what its host exports.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"transfused.org/transfused/service/guest"
	"transfused.org/transfused/service/ipc"
)

// version is set by the linker.
var version = "unknown"

// Exit codes.
const (
	exitOK      = 0
	exitFailure = 1 // at run time
	exitUsage   = 2 // of the command line or the configuration
)

func main() { os.Exit(run("")) }

// run is the program, with the configuration below root.
func run(root string) int {
	if filepath.Base(os.Args[0]) == generatorName {
		return generator(root, os.Args[1:])
	}
	role, conn, err := ipc.Child()
	switch {
	case err != nil:
	case role == guest.HelperRole:
		err = guest.Helper(conn)
	case role != "":
		err = fmt.Errorf("role %q is not known", role)
	default:
		err = newCommand(root).ExecuteContext(context.Background())
	}
	if err == nil {
		return exitOK
	}
	fmt.Fprintln(os.Stderr, "transfused:", err)
	var usage *usageError
	if errors.As(err, &usage) {
		return exitUsage
	}
	return exitFailure
}
