// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// said counts what a program says. It says it through a pipe: GNU tar does not read what it writes to /dev/null.
type said int

func (s *said) Write(b []byte) (int, error) {
	*s += said(len(b))
	return len(b), nil
}

// run measures commands, one after the other, that do n operations.
func (m *meter) run(ctx context.Context, n int, commands ...[]string) (out said, err error) {
	if err := m.start(); err != nil {
		return 0, err
	}
	for _, args := range commands {
		cmd := exec.CommandContext(ctx, args[0], args[1:]...)
		var stderr bytes.Buffer
		cmd.Stdout, cmd.Stderr = &out, &stderr
		if err := cmd.Run(); err != nil {
			return 0, fmt.Errorf("%s: %w\n%s", strings.Join(args, " "), err, &stderr)
		}
	}
	return out, m.stop(n)
}

// walk measures a program that goes through the tree of packages, and names each of its files.
func walk(ctx context.Context, p *peer, m *meter, args ...string) error {
	n := p.c.Scale.Small
	out, err := m.run(ctx, n, append(args, filepath.Join(p.dir, "packages")))
	if err == nil && int(out) < n {
		err = fmt.Errorf("%s said %d bytes of %d files", args[0], out, n)
	}
	return err
}

func find(ctx context.Context, p *peer, _ int, m *meter) error { return walk(ctx, p, m, "find") }

func list(ctx context.Context, p *peer, _ int, m *meter) error { return walk(ctx, p, m, "ls", "-lR") }

func tarUp(ctx context.Context, p *peer, _ int, m *meter) error {
	return walk(ctx, p, m, "tar", "-P", "-c", "-f", "-")
}

// intoScratch measures commands that make things in a new directory, and removes it.
func intoScratch(ctx context.Context, p *peer, m *meter, name string, round, n int, commands func(dir string) [][]string) error {
	dir, err := p.scratch(fmt.Sprint(name, "/", round))
	if err != nil {
		return err
	}
	_, err = m.run(ctx, n, commands(dir)...)
	return errors.Join(err, os.RemoveAll(dir))
}

func copyFiles(ctx context.Context, p *peer, round int, m *meter) error {
	return intoScratch(ctx, p, m, "cp", round, p.c.Scale.Copies, func(dir string) [][]string {
		return [][]string{{"cp", "-a", filepath.Join(p.c.Dir, "local"), dir}}
	})
}

func untar(ctx context.Context, p *peer, round int, m *meter) error {
	return intoScratch(ctx, p, m, "untar", round, p.c.Scale.Small, func(dir string) [][]string {
		return [][]string{{"tar", "-x", "-f", filepath.Join(p.c.Dir, "packages.tar"), "-C", dir}}
	})
}

func compile(ctx context.Context, p *peer, round int, m *meter) error {
	return intoScratch(ctx, p, m, "build", round, p.c.Scale.Sources, func(dir string) [][]string {
		return [][]string{
			{"tar", "-x", "-f", filepath.Join(p.c.Dir, "sources.tar"), "-C", dir},
			{"make", "-s", "-C", filepath.Join(dir, "program")},
			{filepath.Join(dir, "program/program")},
		}
	})
}

func gitStatus(ctx context.Context, p *peer, _ int, m *meter) error {
	if err := m.start(); err != nil {
		return err
	}
	if err := git(ctx, filepath.Join(p.dir, "repo"), "status", "--porcelain"); err != nil {
		return err
	}
	return m.stop(p.c.Scale.Repo)
}
