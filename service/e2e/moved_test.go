// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"os"
	"path/filepath"
	"testing"
	"time"
)

// shows waits until a file is as the host has it, by its attributes alone: to open it asks.
func shows(t *testing.T, name, host string) {
	t.Helper()
	want, err := os.Lstat(host)
	if err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(soakBound); ; time.Sleep(time.Millisecond) {
		got, err := os.Lstat(name)
		if err == nil && got.Size() == want.Size() && got.ModTime().Equal(want.ModTime()) {
			return
		}
		if time.Now().After(deadline) {
			t.Errorf("%s is %v, %v; want %v", name, got, err, want)
			return
		}
	}
}

// What the host moves over a name that the guest knows is seen, wherever it comes from.
func TestMovedOver(t *testing.T) {
	for name, move := range map[string]string{
		"from elsewhere":                     "mkdir ../out; echo newer >../out/f; mv ../out/f f",
		"from a directory that is gone then": "mkdir t; echo newer >t/f; mv t/f f; rmdir t",
		"in the directory":                   "echo newer >g; mv g f",
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, 0)
			file, host := filepath.Join(r.mnt, "f"), filepath.Join(r.export, "f")
			script(t, r.export, "echo old >f; ln f kept") // else it would be gone, and to ask about it would tell
			r.told("", "")
			for range 3 { // what is looked at during a change is not believed for long
				shows(t, file, host)
				time.Sleep(50 * time.Millisecond)
			}
			script(t, r.export, move)
			shows(t, file, host)
		})
	}
}

// Of exports that lie within each other each guest sees what another one does, by whichever of them.
func TestNestedExports(t *testing.T) {
	r := newRig(t, 0)
	sub := filepath.Join(r.export, "sub")
	if err := os.Mkdir(sub, 0o755); err != nil {
		t.Fatal(err)
	}
	script(t, sub, "echo old >f")
	host := r.host("", "--export", "sub="+sub)
	both, inner, other := r.mnt, filepath.Join(r.dir, "inner"), filepath.Join(r.dir, "other")
	r.guest("--mount", "code="+both, "--mount", "sub="+inner)
	r.start("transfused", "--server", r.address("h"), "--socket", "none", "--mount", "sub="+other)
	for _, dir := range []string{both, inner, other} {
		r.mounted(dir)
	}
	host.awaitTimes("msg=mounted", 3)
	for range 3 {
		for _, file := range []string{filepath.Join(both, "sub/f"), filepath.Join(inner, "f"), filepath.Join(other, "f")} {
			shows(t, file, filepath.Join(sub, "f"))
		}
		time.Sleep(50 * time.Millisecond)
	}
	script(t, filepath.Join(both, "sub"), "echo newer >f")
	shows(t, filepath.Join(other, "f"), filepath.Join(sub, "f"))
	shows(t, filepath.Join(inner, "f"), filepath.Join(sub, "f"))
	script(t, other, "echo newest >f")
	shows(t, filepath.Join(both, "sub/f"), filepath.Join(sub, "f"))
}
