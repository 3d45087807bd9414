// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"strings"
	"unicode"
)

// said remembers what was logged last, so that what goes on is not logged with each try. The zero value remembers nothing.
type said struct{ cause string }

// again says whether text tells of the same cause as the last one. Numbers don't count: each try has another port.
func (s *said) again(text string) bool {
	cause := strings.Map(func(r rune) rune {
		if unicode.IsDigit(r) {
			return -1
		}
		return r
	}, text)
	same := cause == s.cause
	s.cause = cause
	return same
}

func (s *said) reset() { s.cause = "" }
