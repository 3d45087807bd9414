// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"fmt"
	"os"
	"testing"

	"transfused.org/transfused/service/ipc"
)

// TestMain makes this program its own helper, as a daemon's main does.
func TestMain(m *testing.M) {
	role, conn, err := ipc.Child()
	if config := os.Getenv(daemonEnv); config != "" && role == "" && err == nil {
		if err := testDaemon(config); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	if role == HelperRole && err == nil {
		err = Helper(conn)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	if role != "" {
		os.Exit(0)
	}
	os.Exit(m.Run())
}
