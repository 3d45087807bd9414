// SPDX-License-Identifier: Apache-2.0

package main

import (
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestTraced(t *testing.T) {
	got := traced{"GETATTR": 1}
	got.add(`# tracer: nop
#           TASK-PID     CPU#  |||||  TIMESTAMP  FUNCTION
          find-712     [000] .....    71.234567: fuse_request_send: connection 45 req 4 opcode 1 (FUSE_LOOKUP) len 49
          find-712     [001] .....    71.234568: fuse_request_send: connection 46 req 4 opcode 1 (FUSE_LOOKUP) len 49
          find-712     [001] .....    71.234569: fuse_request_send: connection 45 req 6 opcode 3 (FUSE_GETATTR) len 56
          find-712     [001] .....    71.234569: fuse_request_end: connection 45 req 6 len 120 error 0
`, 45)
	if d := cmp.Diff(traced{"LOOKUP": 1, "GETATTR": 2}, got); d != "" {
		t.Error(d)
	}
}
