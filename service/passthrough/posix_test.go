// SPDX-License-Identifier: Apache-2.0

package passthrough

import (
	"maps"
	"os"
	"slices"
	"testing"

	"github.com/hanwen/go-fuse/v2/posixtest"

	"transfused.org/transfused/service/fstest"
)

// go-fuse's suite, each of its tests on a mount of its own.
func TestPosix(t *testing.T) {
	backings(t, func(t *testing.T, dir string) {
		for _, name := range slices.Sorted(maps.Keys(posixtest.All)) {
			t.Run(name, func(t *testing.T) {
				fstest.Leaks(t)
				export, err := os.MkdirTemp(dir, "export")
				if err != nil {
					t.Fatal(err)
				}
				posixtest.All[name](t, mount(t, export, Config{RootAs: RootTrust}))
			})
		}
	})
}
