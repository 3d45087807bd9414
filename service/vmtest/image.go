// SPDX-License-Identifier: Apache-2.0

package vmtest

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	_ "embed"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

var (
	//go:embed image/guest.sh
	guestScript []byte
	//go:embed image/tools.sh
	toolsScript []byte
)

// Debian releases that a guest can be.
const (
	Bookworm = "bookworm" // 12: systemd 252, the oldest that is supported; has what the service needs and no more
	Trixie   = "trixie"   // 13: systemd 257
)

// Images are the cached results of building.
type Images struct {
	Guest string // folder with vmlinuz, initrd.img and disk.img
	Tools string // folder with root, a tree that has QEMU and the vhost-user devices
}

// Build returns the images for a VM whose guest is of that Debian release, building what the cache does not have; that takes some minutes. It
// needs root, as Boot does, and says on log what it does, for several images at once. The cache is $XDG_CACHE_HOME/transfused/vm; an image's folder is
// named after the release and the hash of the script that built it, so a changed script builds anew.
// Concurrent calls, of several processes too, wait for each other, and a build that was interrupted leaves no image.
func Build(ctx context.Context, log io.Writer, suite string) (*Images, error) {
	if suite != Bookworm && suite != Trixie {
		return nil, fmt.Errorf("vm images: no guest is made of %q: say %s or %s", suite, Trixie, Bookworm)
	}
	if os.Geteuid() != 0 {
		return nil, errors.New("vm images: building and booting need root (debootstrap, chroot): run it as root")
	}
	cache, err := os.UserCacheDir()
	if err != nil {
		return nil, fmt.Errorf("vm images: %w", err)
	}
	cache = filepath.Join(cache, "transfused", "vm")
	if err := os.MkdirAll(cache, 0o700); err != nil {
		return nil, fmt.Errorf("vm images: %w", err)
	}
	lock, err := os.OpenFile(filepath.Join(cache, "lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("vm images: %w", err)
	}
	defer lock.Close()
	err = unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if err == unix.EWOULDBLOCK {
		fmt.Fprintln(log, "vm images: waiting for another process that builds them")
		err = unix.Flock(int(lock.Fd()), unix.LOCK_EX)
	}
	if err != nil {
		return nil, fmt.Errorf("vm images: lock %s: %w", lock.Name(), err)
	}

	im := new(Images)
	var g errgroup.Group
	for _, image := range []struct {
		name   string
		script []byte
		dir    *string
	}{
		{"tools", toolsScript, &im.Tools},
		{suite, guestScript, &im.Guest},
	} {
		*image.dir = filepath.Join(cache, fmt.Sprintf("%s-%.8x", image.name, sha256.Sum256(image.script)))
		if _, err := os.Stat(*image.dir); err == nil {
			continue
		}
		g.Go(func() error {
			if err := build(ctx, log, image.name, image.script, *image.dir); err != nil {
				return fmt.Errorf("vm images: %s: %w", image.name, err)
			}
			return nil
		})
	}
	return im, g.Wait()
}

// build runs script into a folder beside dir and renames it to dir in the end.
func build(ctx context.Context, log io.Writer, name string, script []byte, dir string) error {
	part := dir + ".part"
	if err := os.RemoveAll(part); err != nil { // of a build that was interrupted
		return err
	}
	if err := os.Mkdir(part, 0o755); err != nil {
		return err
	}
	mirror := mirror(ctx)
	fmt.Fprintf(log, "vm images: building the %s image from %s into %s, once; this takes some minutes\n", name, mirror, dir)
	buildLog, err := os.Create(dir + ".log")
	if err != nil {
		return err
	}
	defer buildLog.Close()

	// Mounts that debootstrap makes and daemons that packages start end with these namespaces,
	// also when the build is interrupted.
	cmd := exec.Command("unshare", "--mount", "--propagation=private", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c", string(script))
	cmd.Env = append(os.Environ(), "OUT="+part, "SUITE="+name, "MIRROR="+mirror, "LC_ALL=C", "DEBIAN_FRONTEND=noninteractive",
		"PATH="+os.Getenv("PATH")+":/usr/sbin:/sbin")
	cmd.Stdout, cmd.Stderr = buildLog, buildLog
	p, err := start(cmd)
	if err != nil {
		return err
	}
	select {
	case <-p.done:
		err = p.err
	case <-ctx.Done():
		p.stop()
		err = ctx.Err()
	}
	if err != nil {
		text, _ := os.ReadFile(buildLog.Name()) // only to show its end
		return fmt.Errorf("%w; the end of %s:\n%s", err, buildLog.Name(), lastLines(text, 20))
	}
	return os.Rename(part, dir)
}

// mirror is the Debian archive to build from: $TRANSFUSED_VM_MIRROR, else the one that this
// machine's apt uses, else Debian's own.
func mirror(ctx context.Context) string {
	if m := os.Getenv("TRANSFUSED_VM_MIRROR"); m != "" {
		return m
	}
	out, err := exec.CommandContext(ctx, "apt-get", "indextargets", "--format", "$(ORIGIN) $(LABEL) $(REPO_URI)", "Created-By: Packages").Output()
	if err == nil { // without apt there is no mirror to learn
		for line := range strings.Lines(string(out)) {
			if f := strings.Fields(line); len(f) == 3 && f[0] == "Debian" && f[1] == "Debian" {
				return f[2]
			}
		}
	}
	return "http://deb.debian.org/debian"
}

// lastLines is the end of text, for an error message.
func lastLines(text []byte, n int) string {
	var lines []string
	for s := bufio.NewScanner(bytes.NewReader(text)); s.Scan(); {
		lines = append(lines, s.Text())
	}
	return strings.Join(lines[max(0, len(lines)-n):], "\n")
}
