// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// toldVersion1 starts a guest and a host that speak version 1, and waits for all channels of the mount.
func (r *rig) toldVersion1() {
	r.t.Helper()
	guest := r.guest()
	r.forceVersion1(guest)
	host := r.host("", "--guest", r.address("g"), "--mount", "code="+r.mnt)
	r.mounted(r.mnt)
	host.await("msg=mounted")
}

// What the host does is seen in a guest of version 1 by what that version has: no rename, no close-write.
func TestInotifyVersion1(t *testing.T) {
	const edit = "echo a >new; echo b >>file; chmod 600 mode; mv name other; ln -s nowhere link; mkfifo pipe; mkdir dir; mv dir folder; rm file; rmdir folder"
	prepare := func(r *rig) {
		script(t, r.export, "echo a >file; echo a >name; echo a >mode")
	}
	// begun waits until the host's events arrive.
	begun := func(r *rig, w *inotify) bool {
		for range 100 {
			script(t, r.export, "touch begun; rm begun")
			if _, ok := w.until("begun", "CREATE", stale/10); ok {
				return true
			}
		}
		return false
	}
	t.Run("told", func(t *testing.T) {
		r := newRig(t, 0)
		prepare(r)
		r.toldVersion1()
		w := watchTree(t, r.mnt, "file")
		if !begun(r, w) {
			t.Fatal("nothing is seen")
		}
		script(t, r.export, "mkdir start")
		before, _ := w.until("start", "CREATE,ISDIR", patience)
		script(t, r.export, edit)
		script(t, r.export, "mkdir the.end")
		events, ok := w.until("the.end", "CREATE,ISDIR", patience)
		if !ok {
			t.Fatalf("the guest saw %v", events)
		}
		got := byName(events[len(before)+1:])
		delete(got, "begun")
		delete(got, "start")
		want := map[string][]string{
			"new": {"CREATE", "MODIFY"}, "file": {"MODIFY", "DELETE_SELF", "IGNORED", "DELETE", "ATTRIB"}, "name": {"DELETE"}, "other": {"CREATE"}, "mode": {"ATTRIB"},
			"link": {"CREATE"}, "pipe": {"CREATE"}, "dir": {"CREATE,ISDIR", "DELETE,ISDIR"}, "folder": {"CREATE,ISDIR", "DELETE,ISDIR"},
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("-want +got:\n%s\nthe guest saw %v", diff, events)
		}
		// And that it is so is true.
		if diff := cmp.Diff(r.run("ls", "-lA", r.export), r.run("ls", "-lA", r.mnt)); diff != "" {
			t.Errorf("-host +guest:\n%s", diff)
		}
		if b, err := os.ReadFile(filepath.Join(r.export, "other")); err != nil || string(b) != "a\n" {
			t.Errorf("the host's own file: %q, %v", b, err)
		}
	})
	t.Run("untold", func(t *testing.T) {
		r := newRig(t, 0)
		r.blind()
		prepare(r)
		r.toldVersion1()
		w := watchTree(t, r.mnt)
		script(t, r.export, edit)
		if events, ok := w.until("dir", "CREATE,ISDIR", stale); ok {
			t.Errorf("nobody tells the guest, and it sees %v", events)
		}
	})
}
