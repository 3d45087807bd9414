// SPDX-License-Identifier: Apache-2.0

package host

import (
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/moby/sys/mountinfo"
)

// systemMounts is where the unit of a server that does not see PID 1 (transfuse-host-user@.service) has PID 1's table of mounts.
const systemMounts = "/run/transfuse/mountinfo"

// checkHidden says that a directory is not the one that the administrator named: the unit that this service was started by has
// put something else in its place (PrivateTmp=, InaccessiblePaths= and their like). Started otherwise nothing is compared: who gives a
// process another mount namespace by hand wants what is there.
func checkHidden(dir string) error {
	if os.Getenv("INVOCATION_ID") == "" {
		return nil
	}
	theirs, err := os.Open("/proc/1/mountinfo")
	if err != nil {
		theirs, err = os.Open(systemMounts)
	}
	if err != nil {
		return nil // nothing to compare with
	}
	defer theirs.Close()
	ours, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return nil
	}
	defer ours.Close()
	return compareViews(dir, ours, theirs)
}

// compareViews compares where dir is in two tables of mounts, ours and that of PID 1.
func compareViews(dir string, ours, theirs io.Reader) error {
	if real, err := filepath.EvalSymlinks(dir); err == nil {
		dir = real
	}
	a, err := mountOfDir(dir, ours)
	if err != nil {
		return nil
	}
	b, err := mountOfDir(dir, theirs)
	if err != nil || a == b {
		return nil
	}
	return fmt.Errorf("%s is hidden from this service by its own unit, which has %s there and the system %s: take the setting that hides it (PrivateTmp=, ProtectHome=, InaccessiblePaths= …) out of the unit", dir, a, b)
}

// mountOfDir tells which directory of which file system dir is, by the last mount above it.
func mountOfDir(dir string, table io.Reader) (string, error) {
	var at *mountinfo.Info
	_, err := mountinfo.GetMountsFromReader(table, func(m *mountinfo.Info) (skip, stop bool) {
		if strings.HasPrefix(dir+"/", strings.TrimSuffix(m.Mountpoint, "/")+"/") && (at == nil || len(m.Mountpoint) >= len(at.Mountpoint)) {
			at = m
		}
		return true, false
	})
	if err != nil || at == nil {
		return "", fmt.Errorf("no mount above %s: %w", dir, err)
	}
	rel, err := filepath.Rel(at.Mountpoint, dir)
	if err != nil {
		return "", err
	}
	return fmt.Sprintf("%s of device %d:%d (%s)", filepath.Join(at.Root, rel), at.Major, at.Minor, at.FSType), nil
}
