// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"slices"
	"strings"
)

// withOption are the cases of fstest, or families of them, that need an option of the export.
var withOption = map[string]string{
	"acl": "acl", "mknod/device": "dev", "setid/chmod": "suid", "setid/dropped": "suid", "setid/chown-by-root": "suid",
	"setid/foreign-group": "suid", "setid/capability": "suid",
}

// Missing are the cases of fstest that a mount does not have, and why, by the options of its export, separated by commas.
func Missing(options string) map[string]string {
	missing := map[string]string{"xattr/trusted": "the guest's trusted.* are user.* on the host, which symbolic links can't have"}
	has := strings.Split(options, ",")
	for c, option := range withOption {
		if !slices.Contains(has, option) {
			missing[c] = "the export has no option " + option
		}
	}
	if slices.Contains(has, "writeback") {
		missing["attr/ctime"] = "the guest's kernel keeps the times of files that it writes back"
		missing["attr/times-now-omit"] = "files get their times by the host's clock when they are made, and by the guest's when they are written"
		missing["fallocate/punch"] = "blocks are counted when they have been written back"
		missing["sparse/blocks"] = missing["fallocate/punch"]
	}
	return missing
}
