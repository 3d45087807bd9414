// SPDX-License-Identifier: Apache-2.0

package host

import (
	"strings"
	"testing"
)

// A directory that the unit replaces is found, and one that it only mounts again is not taken for that.
func TestCompareViews(t *testing.T) {
	const system = `1 0 8:1 / / rw shared:1 - ext4 /dev/sda1 rw
2 1 8:2 / /home rw shared:2 - ext4 /dev/sda2 rw
3 1 0:30 / /tmp rw shared:3 - tmpfs tmpfs rw
`
	for _, tt := range []struct{ name, dir, ours, want string }{
		{"the same", "/no-such-srv/code", system, ""},
		{"other numbers, the same", "/home/nobody-there/x", strings.ReplaceAll(system, "2 1 8:2", "77 1 8:2"), ""},
		{"bound to itself", "/no-such-srv/code", system + "9 1 8:1 /no-such-srv /no-such-srv ro - ext4 /dev/sda1 rw\n", ""},
		{"PrivateTmp", "/tmp/no-such", system + "9 1 8:1 /var/tmp/private /tmp rw - ext4 /dev/sda1 rw\n", "/var/tmp/private/no-such of device 8:1 (ext4) there and the system /no-such of device 0:30 (tmpfs)"},
		{"ProtectHome", "/home/nobody-there", system + "9 1 0:99 / /home ro - tmpfs tmpfs ro\n", "by its own unit"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			err := compareViews(tt.dir, strings.NewReader(tt.ours), strings.NewReader(system))
			switch {
			case tt.want == "" && err != nil:
				t.Error(err)
			case tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want) || !strings.Contains(err.Error(), tt.dir)):
				t.Errorf("%v, want %q", err, tt.want)
			}
		})
	}
}
