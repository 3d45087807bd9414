// SPDX-License-Identifier: Apache-2.0

package transport

import (
	"fmt"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Spin is for how long who waits for a message looks for it again and again before he sleeps; 0: he sleeps at once.
type Spin time.Duration

const (
	// DefaultSpin is longer than most answers take to come, and as long as two CPUs take to be woken.
	DefaultSpin = Spin(50 * time.Microsecond)
	// MaxSpin is the longest that is taken.
	MaxSpin = Spin(time.Millisecond)
)

// ParseSpin reads a time with its unit, such as 50us; 0 needs none.
func ParseSpin(s string) (Spin, error) {
	d, err := time.ParseDuration(s)
	if err != nil || d < 0 || Spin(d) > MaxSpin {
		return 0, fmt.Errorf("%q: a time from 0 to %v with its unit is wanted, such as %v", s, MaxSpin, DefaultSpin)
	}
	return Spin(d), nil
}

func (s Spin) String() string { return time.Duration(s).String() }

// MarshalText is String.
func (s Spin) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// UnmarshalText is ParseSpin.
func (s *Spin) UnmarshalText(b []byte) (err error) {
	*s, err = ParseSpin(string(b))
	return err
}

// Spinner is for who waits for one message after another: he looks for the next one before he sleeps, and between two looks leaves the CPU to whoever
// wants it. To wake him takes longer than most answers do, and costs who wakes him too.
//
// It spins only while that pays: after a message that came within Max, and not again after one that did not until one does. So it costs Max of a CPU
// that has nothing else to do, at most, for each message, and nothing while messages are rare. It is for one goroutine at a time.
type Spinner struct {
	Max Spin

	begin  time.Time
	pays   bool
	looked bool
}

// Begin begins to wait.
func (s *Spinner) Begin() {
	if s.Max > 0 {
		s.begin, s.looked = time.Now(), false
	}
}

// Again tells whether to look again; else it is time to sleep.
func (s *Spinner) Again() bool {
	if s.Max == 0 || !s.pays {
		return false
	}
	if s.looked {
		// Not runtime.Gosched: what is waited for is another process.
		unix.RawSyscall(unix.SYS_SCHED_YIELD, 0, 0, 0)
	}
	s.looked = true
	return time.Since(s.begin) < time.Duration(s.Max)
}

// Slept is for who had to sleep, when the message has come.
func (s *Spinner) Slept() {
	if s.Max > 0 {
		s.pays = time.Since(s.begin) < time.Duration(s.Max)
	}
}

// Spin has Read look for what comes for so long before it sleeps. It is called after Block and before c is shared; one Read at a time may be under way from
// then on.
func (c *Conn) Spin(most Spin) {
	c.spinner.Max = most
	c.look = func(fd uintptr) {
		for c.spinner.Begin(); c.spinner.Again(); {
			n, _, errno := unix.RawSyscall6(unix.SYS_RECVFROM, fd, uintptr(unsafe.Pointer(unsafe.SliceData(c.into))), uintptr(len(c.into)), unix.MSG_DONTWAIT, 0, 0)
			if errno == 0 {
				c.came = int(n)
				return
			}
			if errno != unix.EAGAIN {
				return // Read will say what it is
			}
		}
	}
}

// spin reads what comes before it is time to sleep; 0: nothing.
func (c *Conn) spin(b []byte) int {
	if c.look == nil {
		return 0
	}
	c.into, c.came = b, 0
	_ = c.raw.Control(c.look) // of one that is closed Read will tell
	c.into = nil
	return c.came
}
