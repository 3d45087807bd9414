// SPDX-License-Identifier: Apache-2.0

package passthrough

import (
	"fmt"
	"os"
	"testing"

	"transfused.org/transfused/service/fstest"
)

func TestMain(m *testing.M) {
	if fstest.Child() {
		return
	}
	if err := dropFsetid(); err != nil {
		fmt.Fprintln(os.Stderr, "dropping CAP_FSETID:", err)
		os.Exit(1)
	}
	if config := os.Getenv(childEnv); config != "" {
		if err := serveMount(config); err != nil {
			fmt.Fprintln(os.Stderr, "serving a mount:", err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}
