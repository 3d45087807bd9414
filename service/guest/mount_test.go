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
	known := strings.NewReplacer("NAME", "x", "BYTES", "65536").Replace(knownOptions)
	if _, err := ParseMountOptions(strings.Split(known, ", ")); err != nil {
		t.Error(err)
	}
	if _, err := ParseMountOptions([]string{"foo"}); err == nil || !strings.HasSuffix(err.Error(), knownOptions) {
		t.Error(err)
	}
}
