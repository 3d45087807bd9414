// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

// A system's tree is the same through the mount.
func TestDiff(t *testing.T) {
	r := newRig(t, 0)
	r.export = "/usr/share"
	r.both(",ro", ",ro")
	r.run("diff", "-r", "--no-dereference", r.export, r.mnt)
}

// sums are the SHA-256 of all files below dir, by their paths in it.
func sums(t *testing.T, dir string) map[string][sha256.Size]byte {
	t.Helper()
	all := map[string][sha256.Size]byte{}
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		b, err := os.ReadFile(path)
		all[path[len(dir):]] = sha256.Sum256(b)
		return err
	})
	if err != nil {
		t.Error(err)
	}
	return all
}

// Half of the files come from each side, and both sides have the same.
func TestManyFiles(t *testing.T) {
	r := newRig(t, 0)
	r.both("", "")
	const dirs, files = 100, 100
	for d := range dirs {
		base := []string{r.export, r.mnt}[d%2]
		dir := filepath.Join(base, fmt.Sprint("d", d))
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		for f := range files {
			text := bytes.Repeat([]byte{byte(d), byte(f)}, d*f)
			if err := os.WriteFile(filepath.Join(dir, fmt.Sprint("f", f)), text, 0o644); err != nil {
				t.Fatal(err)
			}
		}
	}
	there, here := sums(t, r.export), sums(t, r.mnt)
	if len(there) != dirs*files {
		t.Errorf("%d files", len(there))
	}
	if diff := cmp.Diff(there, here); diff != "" {
		t.Error("SHA-256, -host +guest:\n", diff)
	}
}

// A file over 4 GiB has its size, its holes and its last bytes.
func TestLargeSparseFile(t *testing.T) {
	r := newRig(t, 0)
	r.both("", "")
	const size = 5 << 30
	f, err := os.Create(filepath.Join(r.mnt, "large"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	end := []byte("the end")
	for _, off := range []int64{1<<32 - 3, size - int64(len(end))} { // one over the border of 32 bits
		if _, err := f.WriteAt(end, off); err != nil {
			t.Fatal(err)
		}
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{filepath.Join(r.export, "large"), filepath.Join(r.mnt, "large")} {
		g, err := os.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		defer g.Close()
		for off, want := range map[int64]string{0: "\x00", 1<<32 - 4: "\x00the end\x00", size - 8: "\x00the end"} {
			b := make([]byte, len(want))
			if _, err := g.ReadAt(b, off); err != nil || string(b) != want {
				t.Errorf("%s at %d: %q, %v", path, off, b, err)
			}
		}
		var st unix.Stat_t
		if err := unix.Fstat(int(g.Fd()), &st); err != nil || st.Size != size || st.Blocks*512 > 1<<20 {
			t.Errorf("%s: size %d, %d blocks, %v", path, st.Size, st.Blocks, err)
		}
		if at, err := unix.Seek(int(g.Fd()), 0, unix.SEEK_DATA); err != nil || at < 1<<31 || at > 1<<32-3 {
			t.Errorf("%s: data begins at %d, %v", path, at, err)
		}
		g.Close()
	}
}

// A host that may open few files serves many: it closes what it can open again.
func TestFewDescriptors(t *testing.T) {
	r := newRig(t, 0)
	for f := range 1_000 {
		if err := os.WriteFile(filepath.Join(r.export, fmt.Sprint("f", f)), []byte{byte(f)}, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	host := r.startCommand("transfuse-host", exec.Command("sh", "-c", `ulimit -n 300; exec "$0" "$@"`,
		filepath.Join(bin, "transfuse-host"), "--listen", r.address("h"), "--export", "code="+r.export))
	host.await("listening")
	r.guest("--mount", "code="+r.mnt)
	r.mounted(r.mnt)
	if diff := cmp.Diff(sums(t, r.export), sums(t, r.mnt)); diff != "" {
		t.Error("SHA-256, -host +guest:\n", diff)
	}
}
