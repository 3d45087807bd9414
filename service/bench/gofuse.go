// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"os"
	"time"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
)

const loopbackEnv = "TRANSFUSED_BENCH_LOOPBACK"

// serveLoopback is the process of the peer gofuse: go-fuse's own loopback, until it is unmounted.
func serveLoopback(args []string) error {
	if len(args) != 2 {
		return fmt.Errorf("loopback: %d arguments", len(args))
	}
	root, err := fs.NewLoopbackRoot(args[0])
	if err != nil {
		return err
	}
	second := time.Second
	server, err := fs.Mount(args[1], root, &fs.Options{
		AttrTimeout: &second, EntryTimeout: &second, NullPermissions: true,
		MountOptions: fuse.MountOptions{
			AllowOther: os.Geteuid() == 0, DirectMount: true, Options: []string{"default_permissions"}, FsName: args[0], Name: "loopback",
			MaxWrite: block, MaxReadAhead: block,
			// More than the kernel takes: it then has no passthrough, by which it would read and write the files behind without asking.
			MaxStackDepth: 3,
		},
	})
	if err != nil {
		return err
	}
	server.Wait()
	return nil
}
