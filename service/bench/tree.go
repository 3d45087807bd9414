// SPDX-License-Identifier: Apache-2.0

package main

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
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
	Small           int // files of the tree of packages
	Sources         int // files that are compiled
	Sequential      int // MiB
}

// scales are those of -scale. The small one is for machines that are emulated.
var scales = map[string]scale{
	"full":  {Getattrs: 5000, Reads: 5000, Stats: 2000, Creates: 1000, Copies: 2000, Repo: 3000, Small: 1000, Sources: 20, Sequential: 1024},
	"small": {Getattrs: 1000, Reads: 1000, Stats: 400, Creates: 200, Copies: 200, Repo: 400, Small: 300, Sources: 5, Sequential: 64},
}

const filesPerDir = 50

// makeTree makes what the peers show. Without git there is no repository in it.
func makeTree(ctx context.Context, tree string, s scale) error {
	if _, err := os.Lstat(filepath.Join(tree, "big")); err == nil {
		return fmt.Errorf("%s has a tree already", tree)
	}
	r := rand.NewChaCha8([32]byte{1})
	if err := makeFiles(filepath.Join(tree, "stat"), s.Stats, r, 100); err != nil {
		return err
	}
	if err := packages(s.Small, func(name string, data []byte) error {
		name = filepath.Join(tree, name)
		if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
			return err
		}
		return os.WriteFile(name, data, 0o644)
	}); err != nil {
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
	if _, err := exec.LookPath("git"); err != nil {
		return nil
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

// checkTree tells whether dir holds the tree of that scale.
func checkTree(dir string, s scale) error {
	fi, err := os.Stat(filepath.Join(dir, "big"))
	if err == nil && fi.Size() != int64(s.Sequential)<<20 {
		err = errors.New("it is of another scale")
	}
	if err != nil {
		return fmt.Errorf("%s does not show the tree that -make-tree makes: %w", dir, err)
	}
	return nil
}

// makeLocal makes what is copied from and what servers need, below dir.
func makeLocal(dir string, s scale) error {
	if err := makeFiles(filepath.Join(dir, "local"), s.Copies, rand.NewChaCha8([32]byte{2}), 16<<10); err != nil {
		return err
	}
	if err := archive(filepath.Join(dir, "packages.tar"), func(visit visit) error { return packages(s.Small, visit) }); err != nil {
		return err
	}
	if err := archive(filepath.Join(dir, "sources.tar"), func(visit visit) error { return sources(s.Sources, visit) }); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, "sftp.sh"), []byte("#!/bin/sh\nexec "+sftpServer+"\n"), 0o755)
}

// visit takes a file of a tree.
type visit func(name string, data []byte) error

// packages is a tree as npm makes it: packages that have packages, four deep, each of small files in directories of few.
func packages(n int, visit visit) error {
	r := rand.NewChaCha8([32]byte{3})
	files := []string{"package.json", "README.md", "index.js", "lib/main.js", "lib/util.js", "lib/internal/a.js", "lib/internal/b.js",
		"test/test.js", "dist/cjs/index.js", "dist/esm/index.js"}
	dir := ""
	for i := range n {
		if i%len(files) == 0 {
			nr := i / len(files)
			if nr%4 == 0 {
				dir = "packages"
			}
			dir = filepath.Join(dir, "node_modules", fmt.Sprintf("package%04d", nr))
		}
		b := make([]byte, 1+r.Uint64()%2048)
		r.Read(b)
		if err := visit(filepath.Join(dir, files[i%len(files)]), b); err != nil {
			return err
		}
	}
	return nil
}

// sources is a program in C of n files, a header and a Makefile.
func sources(n int, visit visit) error {
	var calls, names strings.Builder
	for i := range n {
		fmt.Fprintf(&calls, " + f%d()", i)
		fmt.Fprintf(&names, " f%d.o", i)
		body := fmt.Sprintf("#include \"all.h\"\nint f%d(void) { return snprintf(0, 0, \"%%d\", %d); }\n", i, i)
		if err := visit(fmt.Sprintf("program/f%d.c", i), []byte(body)); err != nil {
			return err
		}
	}
	var header strings.Builder
	header.WriteString("#include <stdio.h>\n")
	for i := range n {
		fmt.Fprintf(&header, "int f%d(void);\n", i)
	}
	return errors.Join(
		visit("program/all.h", []byte(header.String())),
		visit("program/main.c", []byte("#include \"all.h\"\nint main(void) { return !(0"+calls.String()+"); }\n")),
		visit("program/Makefile", []byte("program: main.o"+names.String()+"\n\tgcc -o $@ $^\n%.o: %.c all.h\n\tgcc -c -o $@ $<\n")))
}

// archive makes a tar file of a tree.
func archive(name string, tree func(visit visit) error) error {
	f, err := os.Create(name)
	if err != nil {
		return err
	}
	w := tar.NewWriter(f)
	if err := tree(func(name string, data []byte) error {
		h := tar.Header{Name: name, Mode: 0o644, Size: int64(len(data)), ModTime: old}
		if err := w.WriteHeader(&h); err != nil {
			return err
		}
		_, err := w.Write(data)
		return err
	}); err != nil {
		f.Close()
		return err
	}
	return errors.Join(w.Close(), f.Close())
}

// old is old enough for git and make to trust it.
var old = time.Unix(1_600_000_000, 0)

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
