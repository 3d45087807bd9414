// SPDX-License-Identifier: Apache-2.0

package guest

import "testing"

func TestSaid(t *testing.T) {
	var s said
	for _, tt := range []struct {
		text string
		want bool
	}{
		{"read vsock:2:1524 from port 1023: reset", false},
		{"read vsock:2:1524 from port 1022: reset", true},
		{"read vsock:2:1524 from port 1021: refused", false},
		{"read vsock:2:1524 from port 1020: reset", false},
	} {
		if got := s.again(tt.text); got != tt.want {
			t.Errorf("%s: %v", tt.text, got)
		}
	}
	s.reset()
	if s.again("read vsock:2:1524 from port 1020: reset") {
		t.Error("it is not forgotten")
	}
}
