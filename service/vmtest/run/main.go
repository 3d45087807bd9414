// SPDX-License-Identifier: Apache-2.0

// Run boots a VM of package vmtest with this terminal as its console.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"path/filepath"

	"transfused.org/transfused/service/vmtest"
)

func main() {
	share := flag.String("share", "", "offer this `folder` by virtiofs: mount -t virtiofs auto /mnt; or always or never, after virtiofsd's --cache")
	suite := flag.String("suite", vmtest.Trixie, "the Debian `release` of the guest: "+vmtest.Trixie+" or "+vmtest.Bookworm)
	flag.Usage = func() {
		fmt.Fprintln(flag.CommandLine.Output(), "usage: run [-share DIR] [-suite RELEASE] [PROGRAM…]: boots a VM with the programs in its /usr/local/bin")
		flag.PrintDefaults()
	}
	flag.Parse()
	if err := run(*share, *suite, flag.Args()); err != nil {
		fmt.Fprintln(os.Stderr, "run:", err)
		os.Exit(1)
	}
}

func run(share, suite string, programs []string) error {
	ctx := context.Background()
	if share != "" {
		var err error
		if share, err = filepath.Abs(share); err != nil {
			return err
		}
	}
	images, err := vmtest.Build(ctx, os.Stderr, suite)
	if err != nil {
		return err
	}
	vm, err := vmtest.Boot(ctx, images, vmtest.Config{Share: share, Interactive: true})
	if err != nil {
		return err
	}
	defer vm.Close()
	for _, p := range programs {
		if err := vm.Push(ctx, p, "/usr/local/bin/"+filepath.Base(p)); err != nil {
			return err
		}
	}
	// The console is in raw mode by now.
	fmt.Fprintf(os.Stderr, "\r\nrun: this VM's vsock is hybrid:%s:PORT; Ctrl-a x ends it\r\n", vm.Socket())
	vm.Wait()
	return nil
}
