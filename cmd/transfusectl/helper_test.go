// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"transfused.org/transfused/service/api"
)

func TestParseHelper(t *testing.T) {
	base := helperCall{source: "code", dir: "/mnt", timeout: hostPatience, socket: api.GuestSocket}
	with := func(f func(*helperCall)) helperCall {
		c := base
		f(&c)
		return c
	}
	for _, tt := range []struct {
		args []string
		want helperCall
	}{
		{[]string{"code", "/mnt"}, base},
		{[]string{"code", "/mnt/../mnt/", "-n", "-t", "fuse.transfuse"}, base},
		{[]string{"-o", "rw,noexec", "code", "-sv", "--", "/mnt"}, with(func(c *helperCall) { c.sloppy, c.verbose, c.options = true, true, []string{"rw", "noexec"} })},
		{[]string{"code", "/mnt", "-fN/proc/1/ns/mnt", "-oremount,ro"}, with(func(c *helperCall) {
			c.fake, c.namespace, c.remount, c.options = true, "/proc/1/ns/mnt", true, []string{"ro"}
		})},
		{[]string{"code", "/mnt", "-o", "transfuse.timeout=5", "-o", "transfuse.socket=/s,max_read=8192,nofail,x-a,user=joe"}, with(func(c *helperCall) {
			c.timeout, c.socket, c.options = 5*time.Second, "/s", []string{"max_read=8192"}
		})},
		{[]string{"-h"}, helperCall{help: true, timeout: hostPatience, socket: api.GuestSocket}},
	} {
		got, err := parseHelper(tt.args)
		if err != nil {
			t.Errorf("%q: %v", tt.args, err)
		}
		if diff := cmp.Diff(tt.want, got, cmp.AllowUnexported(helperCall{})); diff != "" {
			t.Errorf("%q:\n%s", tt.args, diff)
		}
	}
	for _, args := range [][]string{{}, {"code"}, {"", "/mnt"}, {"a", "b", "c"}, {"a", "b", "-N"}, {"a", "b", "-x"}, {"a", "b", "--nonsense"}, {"a", "b", "-o", "nonsense"},
		{"a", "b", "-o", "max_read=1"}, {"a", "b", "-o", "transfuse.timeout=0"}, {"a", "b", "-o", "transfuse.timeout"}} {
		if c, err := parseHelper(args); err == nil {
			t.Errorf("%q is taken for %+v", args, c)
		}
	}
}

func TestMountExit(t *testing.T) {
	for _, tt := range []struct {
		err  error
		want int
	}{
		{nil, 0},
		{errUsage{errors.New("x")}, 1}, {api.Errorf(api.Denied, "x"), 1}, {fmt.Errorf("y: %w", api.Errorf(api.Invalid, "x")), 1},
		{errSystem{errors.New("x")}, 2},
		{errors.New("x"), 4},
		{fmt.Errorf("x: %w", errInterrupted), 8},
		{api.Errorf(api.Refused, "x"), 32}, {api.Errorf(api.Internal, "x"), 32}, {os.NewSyscallError("move_mount", unix.EPERM), 32}, {fmt.Errorf("x: %w", context.DeadlineExceeded), 32},
	} {
		if got := mountExit(tt.err); got != tt.want {
			t.Errorf("%v: exit code %d, want %d", tt.err, got, tt.want)
		}
	}
}
