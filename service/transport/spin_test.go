// SPDX-License-Identifier: Apache-2.0

package transport

import (
	"testing"
	"time"
)

func TestParseSpin(t *testing.T) {
	for s, want := range map[string]Spin{"0": 0, "50us": DefaultSpin, "50µs": DefaultSpin, "1ms": MaxSpin, "1500ns": 1500} {
		if got, err := ParseSpin(s); got != want || err != nil {
			t.Errorf("%s: %v, %v", s, got, err)
		}
	}
	for _, s := range []string{"", "50", "-1us", "1001us", "1s", "fast"} {
		if got, err := ParseSpin(s); err == nil {
			t.Errorf("%q is taken, for %v", s, got)
		}
	}
}

// It looks again only after what came in time, until that takes longer once.
func TestSpinner(t *testing.T) {
	looks := func(s *Spinner) (n int) {
		for s.Begin(); s.Again(); n++ {
		}
		return n
	}
	s := Spinner{Max: MaxSpin}
	if n := looks(&s); n != 0 {
		t.Errorf("looked %d times before anything has come", n)
	}
	s.Slept()
	if n := looks(&s); n < 2 {
		t.Errorf("looked %d times after what came in time", n)
	}
	time.Sleep(time.Duration(MaxSpin))
	s.Slept()
	if n := looks(&s); n != 0 {
		t.Errorf("looked %d times after what came late", n)
	}
	never := Spinner{}
	never.Begin()
	never.Slept()
	if n := looks(&never); n != 0 {
		t.Errorf("looked %d times without leave", n)
	}
}

// Who spins reads what comes while he looks, what comes later, and the end.
func TestReadSpinning(t *testing.T) {
	a, b, err := Pair()
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	if err := b.Block(); err != nil {
		t.Fatal(err)
	}
	b.Spin(MaxSpin)
	buf := make([]byte, 100)
	read := func() string {
		t.Helper()
		n, err := b.Read(buf)
		if err != nil {
			t.Fatal(err)
		}
		return string(buf[:n])
	}
	slept := make(chan string)
	go func() { slept <- read() }()
	if _, err := a.Write([]byte("first")); err != nil {
		t.Fatal(err)
	}
	if s := <-slept; s != "first" {
		t.Errorf("read %q", s)
	}
	b.spinner.pays = true // however long that took
	if _, err := a.Write([]byte("second")); err != nil {
		t.Fatal(err)
	}
	if s := read(); s != "second" || b.came != len(s) {
		t.Errorf("read %q, of which it found %d bytes by looking", s, b.came)
	}
	b.spinner.pays = true
	if n := testing.AllocsPerRun(100, func() {
		a.Write([]byte("more"))
		b.Read(buf)
		b.spinner.pays = true
	}); n > 0 {
		t.Errorf("%v allocations for each message", n)
	}
	b.spinner.pays = true
	a.Close()
	if n, err := b.Read(buf); n != 0 || err == nil {
		t.Errorf("after the end: %d, %v", n, err)
	}
	b.spinner.pays = true
	b.Close()
	if _, err := b.Read(buf); err == nil {
		t.Error("a closed one is read")
	}
}
