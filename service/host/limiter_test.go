// SPDX-License-Identifier: Apache-2.0

package host

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"transfused.org/transfused/service/transport"
)

// A guest that dials again and again is one line, whatever its port; another cause or another guest is another.
func TestRefusals(t *testing.T) {
	r := newRefusals(toldAgain, 20, 1)
	now := time.Now()
	who := identity{family: transport.Vsock, cid: 7}
	for port := range 100 {
		ok, _ := r.allow(who, fmt.Errorf("port %d is not root's", 1024+port), now.Add(time.Duration(port)*time.Second))
		if ok != (port == 0) {
			t.Errorf("port %d: logged %v", port, ok)
		}
	}
	now = now.Add(2 * time.Minute)
	if ok, _ := r.allow(who, errors.New("wrong token"), now); !ok {
		t.Error("another cause is not logged")
	}
	if ok, _ := r.allow(identity{family: transport.Vsock, cid: 8}, errors.New("port 5 is not root's"), now); !ok {
		t.Error("another guest is not logged")
	}
	if ok, dropped := r.allow(who, errors.New("port 1 is not root's"), now.Add(toldAgain)); !ok || dropped != 99 {
		t.Errorf("later: %v, %d left out", ok, dropped)
	}
	// One that is refused for ever new causes hides no other.
	many := func(who identity, lines int) {
		t.Helper()
		n := 0
		for i := range 10 * maxCauses {
			if ok, _ := r.allow(who, errors.New(strings.Repeat("x", i)), now); ok {
				n++
			}
		}
		if n != lines {
			t.Errorf("%+v: %d lines, want %d", who, n, lines)
		}
	}
	many(identity{family: transport.Vsock, cid: 9}, 20)
	many(identity{family: transport.Vsock, cid: 10}, 20)
	// What is remembered is bounded, and so is what is logged at once.
	n := 0
	for i := range 10 * maxRefused {
		if ok, _ := r.allow(identity{family: transport.Unix, uid: uint32(i)}, errors.New("no"), now); ok {
			n++
		}
	}
	if n > maxRefused+20 || len(r.peers) > maxRefused {
		t.Errorf("%d lines, %d peers", n, len(r.peers))
	}
	// Who comes when others have been quiet has a place again.
	now = now.Add(2 * toldAgain)
	many(identity{family: transport.Vsock, cid: 11}, 20)
	many(identity{family: transport.Vsock, cid: 12}, 20)
}
