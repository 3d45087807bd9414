// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// scale is how much each case does.
type scale struct {
	Getattrs, Reads int // calls of one round
	Stats           int // files of the cold stat
	Creates         int // files created and removed
	Copies          int // files copied by cp -a
	Repo            int // files in the git repository
	Sequential      int // MiB
}

var fullScale = scale{Getattrs: 5000, Reads: 5000, Stats: 2000, Creates: 1000, Copies: 2000, Repo: 3000, Sequential: 1024}

const filesPerDir = 50

// makeTree makes what the cases need below dir: tree is what the peers show,
// local is copied from.
func makeTree(ctx context.Context, dir string, s scale) error {
	tree := filepath.Join(dir, "tree")
	r := rand.NewChaCha8([32]byte{1})
	if err := makeFiles(filepath.Join(tree, "stat"), s.Stats, r, 100); err != nil {
		return err
	}
	if err := makeFiles(filepath.Join(dir, "local"), s.Copies, r, 16<<10); err != nil {
		return err
	}
	big, err := os.Create(filepath.Join(tree, "big"))
	if err != nil {
		return err
	}
	_, err = io.CopyN(big, r, int64(s.Sequential)<<20)
	if e := big.Close(); err == nil {
		err = e
	}
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(dir, "sftp.sh"), []byte("#!/bin/sh\nexec "+sftpServer+"\n"), 0o755); err != nil {
		return err
	}
	repo := filepath.Join(tree, "repo")
	if err := makeFiles(repo, s.Repo, r, 4<<10); err != nil {
		return err
	}
	for _, args := range [][]string{{"init", "-q"}, {"add", "-A"}, {"commit", "-q", "-m", "tree"}, {"update-index", "-q", "--refresh"}} {
		if err := git(ctx, repo, args...); err != nil {
			return err
		}
	}
	return nil
}

// copyForOurs gives our host a tree of its own, on a file system of its own where we may mount one: it watches what it exports,
// and what the other peers do would cost them and it time, as changes that the mount is told of.
func copyForOurs(ctx context.Context, dir string) (undo func(), err error) {
	own := filepath.Join(dir, ours)
	if err := os.Mkdir(own, 0o755); err != nil {
		return nil, err
	}
	undo = func() {}
	if os.Geteuid() == 0 { // others can't watch a whole file system either
		if err := unix.Mount(ours, own, "tmpfs", 0, ""); err != nil {
			return nil, err
		}
		undo = func() { unix.Unmount(own, unix.MNT_DETACH) }
	}
	if out, err := exec.CommandContext(ctx, "cp", "-a", filepath.Join(dir, "tree"), own).CombinedOutput(); err != nil {
		undo()
		return nil, fmt.Errorf("%w: %s", err, out)
	}
	return undo, nil
}

// makeFiles makes n files of up to size bytes, old enough for git to trust
// their times.
func makeFiles(dir string, n int, r *rand.ChaCha8, size int) error {
	old := time.Unix(1_600_000_000, 0)
	buf := make([]byte, size)
	for i := range n {
		sub := filepath.Join(dir, fmt.Sprintf("d%03d", i/filesPerDir))
		if i%filesPerDir == 0 {
			if err := os.MkdirAll(sub, 0o755); err != nil {
				return err
			}
		}
		b := buf[:1+int(r.Uint64()%uint64(size))]
		r.Read(b)
		name := filepath.Join(sub, fmt.Sprintf("file%05d", i))
		if err := os.WriteFile(name, b, 0o644); err != nil {
			return err
		}
		if err := os.Chtimes(name, old, old); err != nil {
			return err
		}
	}
	return nil
}

// git runs git with a configuration of its own. Inode numbers, ctime and
// nanoseconds are not compared, since not every peer shows those of the tree: git would
// read all files again, and its status would measure that.
func git(ctx context.Context, dir string, args ...string) error {
	cmd := exec.CommandContext(ctx, "git", append([]string{
		"-c", "core.checkStat=minimal", "-c", "core.trustctime=false", "-c", "safe.directory=*", "-c", "core.fsmonitor=false",
		"-c", "user.name=bench", "-c", "user.email=bench@localhost", "-c", "gc.auto=0",
	}, args...)...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "GIT_CONFIG_GLOBAL=/dev/null", "GIT_CONFIG_NOSYSTEM=1", "GIT_OPTIONAL_LOCKS=0", "GIT_CEILING_DIRECTORIES="+filepath.Dir(dir))
	out, err := cmd.CombinedOutput()
	if err != nil {
		return fmt.Errorf("git %s: %w\n%s", args[0], err, out)
	}
	if args[0] == "status" && len(out) > 0 {
		return fmt.Errorf("git status of an unchanged tree says:\n%.200s", out)
	}
	return nil
}
