// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"transfused.org/transfused/service/fstest"
)

// Nothing is detached beside a daemon that runs, whoever asks for it; and a daemon that begins waits for what is under way.
func TestCleanUpBesideADaemon(t *testing.T) {
	fstest.Leaks(t)
	dir := t.TempDir()
	list := filepath.Join(dir, listName)
	if err := os.WriteFile(list, []byte(`[{"Dir": "/absent"}]`), 0o600); err != nil {
		t.Fatal(err)
	}
	daemon, err := lockState(dir, unix.LOCK_SH)
	if err != nil {
		t.Fatal(err)
	}
	another, err := lockState(dir, unix.LOCK_SH)
	if err != nil {
		t.Fatal(err)
	}
	daemon.Close()
	if err := CleanUp(dir); err == nil {
		t.Error("cleaned up beside a daemon")
	}
	if _, err := os.Stat(list); err != nil {
		t.Error(err)
	}
	another.Close()
	if err := CleanUp(dir); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(list); err == nil {
		t.Error("the list is still there")
	}
	if err := CleanUp(dir); err != nil { // nothing to do
		t.Error(err)
	}
}
