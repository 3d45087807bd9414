// SPDX-License-Identifier: Apache-2.0

package host

import (
	"errors"
	"fmt"
	"testing"
	"time"

	"transfused.org/transfused/service/transport"
)

// A guest that dials again and again is one line, whatever its port; another cause or another guest is another.
func TestRefusals(t *testing.T) {
	r := newRefusals()
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
	// What is remembered is bounded, and so is what is logged at once.
	n := 0
	for i := range 10 * maxCauses {
		if ok, _ := r.allow(identity{family: transport.Unix, uid: uint32(i)}, errors.New("no"), now); ok {
			n++
		}
	}
	if n > 20 || len(r.told) > maxCauses {
		t.Errorf("%d lines, %d causes", n, len(r.told))
	}
}
