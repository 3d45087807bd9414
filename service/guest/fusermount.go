// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// findFusermount returns the program that mounts for an ordinary user: name where it was given, else what is in the
// path.
func findFusermount(name string) (string, error) {
	if name != "" {
		if p, err := exec.LookPath(name); err == nil {
			return p, nil
		}
		return "", fmt.Errorf("fusermount %s: not found or not executable: install package fuse3, or name it by --fusermount", name)
	}
	for _, name := range []string{"fusermount3", "/bin/fusermount3", "/usr/bin/fusermount3", "fusermount", "/bin/fusermount"} {
		if p, err := exec.LookPath(name); err == nil {
			return p, nil
		}
	}
	return "", errors.New("fusermount3: not found: an ordinary user mounts by it: install package fuse3, or name it by --fusermount, or run as root")
}

// MountUser mounts over dir by the set-id program fusermount3, for who may not mount. It returns the device, as
// Mount does.
func MountUser(fusermount, dir string, o MountOptions) (*os.File, error) {
	// It checks itself that the caller may write to dir.
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, os.NewSyscallError("socketpair", err)
	}
	defer unix.Close(fds[0])
	theirs := os.NewFile(uintptr(fds[1]), "fusermount")
	cmd := exec.Command(fusermount, "-o", o.list(), "--", dir)
	cmd.Env = append(os.Environ(), "_FUSE_COMMFD=3")
	cmd.ExtraFiles = []*os.File{theirs}
	err = runFusermount(cmd)
	theirs.Close()
	if err != nil {
		return nil, err
	}
	// It has ended, and so what it sent is there, or nothing will come.
	oob := make([]byte, unix.CmsgSpace(4))
	var n int
	for {
		if _, n, _, _, err = unix.Recvmsg(fds[0], make([]byte, 1), oob, unix.MSG_CMSG_CLOEXEC|unix.MSG_DONTWAIT); err != unix.EINTR {
			break
		}
	}
	if err != nil {
		return nil, fmt.Errorf("%s sent no descriptor: %w", filepath.Base(fusermount), err)
	}
	msgs, err := unix.ParseSocketControlMessage(oob[:n])
	if err != nil || len(msgs) == 0 {
		return nil, fmt.Errorf("%s sent no descriptor", filepath.Base(fusermount))
	}
	rights, err := unix.ParseUnixRights(&msgs[0])
	if err != nil || len(rights) == 0 {
		return nil, fmt.Errorf("%s sent no descriptor", filepath.Base(fusermount))
	}
	dev, err := deviceFile(rights[0])
	if err != nil {
		unix.Close(rights[0])
	}
	return dev, err
}

// unmountUser is umount for who may not; lazy detaches a busy one.
func unmountUser(fusermount, dir string, lazy bool) error {
	prog, err := findFusermount(fusermount)
	if err != nil {
		return err
	}
	args := []string{"-u", "-q"}
	if lazy {
		args = append(args, "-z")
	}
	return runFusermount(exec.Command(prog, append(args, "--", dir)...))
}

// runFusermount runs it and makes its standard error the error.
func runFusermount(cmd *exec.Cmd) error {
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	err := cmd.Run()
	if err == nil {
		return nil
	}
	line, _, _ := strings.Cut(strings.TrimSpace(stderr.String()), "\n")
	if line == "" {
		return fmt.Errorf("%s: %w", filepath.Base(cmd.Path), err)
	}
	if strings.Contains(line, "/dev/fuse") {
		line += ": give this user access to it (mode 0666 is usual), or run as root"
	}
	return errors.New(line)
}
