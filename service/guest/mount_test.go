// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestHostOptions(t *testing.T) {
	for _, tt := range []struct {
		name    string
		options []string
		want    []string
	}{
		{"none", nil, nil},
		{"the guest's own", []string{"suid", "dev,noatime", "x-systemd.automount", "fsname=ro"}, nil},
		{"read-only", []string{"suid", "ro"}, []string{"ro"}},
		{"the last counts", []string{"ro,noexec", "rw"}, []string{"rw"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if diff := cmp.Diff(tt.want, hostOptions(tt.options)); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestKnownOptions(t *testing.T) {
	known := strings.NewReplacer("NAME", "x", "BYTES", "65536", "COUNT", "4").Replace(knownOptions)
	if _, err := ParseMountOptions(strings.Split(known, ", ")); err != nil {
		t.Error(err)
	}
	if _, err := ParseMountOptions([]string{"foo"}); err == nil || !strings.HasSuffix(err.Error(), knownOptions) {
		t.Error(err)
	}
}

// Options of fstab that are others' business are taken, and those that say when to mount are understood.
func TestFstabOptions(t *testing.T) {
	for _, tt := range []struct {
		options string
		want    MountOptions
	}{
		{"nofail,_netdev,auto,x-mount.mkdir,X-mount.mkdir=0700,x-systemd.idle-timeout=30,x-systemd.requires=a.service", MountOptions{}},
		{"ro,noauto,nofail", MountOptions{ReadOnly: true, NoAuto: true}},
		{"noauto,auto", MountOptions{}},
		{"x-systemd.automount,auto", MountOptions{NoAuto: true}},
		{"x-systemd.automount", MountOptions{NoAuto: true}},
	} {
		got, err := ParseMountOptions([]string{tt.options})
		if diff := cmp.Diff(tt.want, got); diff != "" || err != nil {
			t.Errorf("%s: %v\n%s", tt.options, err, diff)
		}
	}
	for _, option := range []string{"nofail=1", "_netdev=x", "noauto=0", "y-systemd"} {
		if _, err := ParseMountOptions([]string{option}); err == nil {
			t.Errorf("%s is taken", option)
		}
	}
}
