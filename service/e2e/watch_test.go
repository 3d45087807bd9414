// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

// watcher is an inotify watch in the guest.
type watcher struct {
	t    *testing.T
	f    *os.File
	buf  []byte
	have []byte
}

// watch watches dir.
func watch(t *testing.T, dir string) *watcher {
	t.Helper()
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		t.Fatal(err)
	}
	w := &watcher{t: t, f: os.NewFile(uintptr(fd), "inotify"), buf: make([]byte, 64<<10)}
	t.Cleanup(func() { w.f.Close() })
	const mask = unix.IN_CREATE | unix.IN_DELETE | unix.IN_MODIFY | unix.IN_ATTRIB | unix.IN_CLOSE_WRITE | unix.IN_MOVE
	if _, err := unix.InotifyAddWatch(fd, dir, mask); err != nil {
		t.Fatal(err)
	}
	return w
}

// next waits for an event and returns it as words.
func (w *watcher) next() string {
	w.t.Helper()
	if len(w.have) == 0 {
		w.f.SetReadDeadline(time.Now().Add(patience))
		n, err := w.f.Read(w.buf)
		if err != nil {
			w.t.Fatalf("no inotify event: %v", err)
		}
		w.have = w.buf[:n]
	}
	mask, n := binary.NativeEndian.Uint32(w.have[4:]), int(binary.NativeEndian.Uint32(w.have[12:]))
	name := strings.TrimRight(string(w.have[16:16+n]), "\x00")
	w.have = w.have[16+n:]
	var words []string
	for bit, word := range map[uint32]string{unix.IN_CREATE: "create", unix.IN_DELETE: "delete", unix.IN_MODIFY: "modify", unix.IN_ATTRIB: "attrib",
		unix.IN_CLOSE_WRITE: "close", unix.IN_MOVED_FROM: "from", unix.IN_MOVED_TO: "to"} {
		if mask&bit != 0 {
			words = append(words, word)
		}
	}
	return strings.Join(append(words, name), " ")
}

// until returns the events before one.
func (w *watcher) until(event string) (before []string) {
	w.t.Helper()
	for {
		e := w.next()
		if e == event {
			return before
		}
		if before = append(before, e); len(before) > 1000 {
			w.t.Fatalf("no %q in %q…", event, before[:20])
		}
	}
}

// blind runs a test where fanotify can't be used: by an ordinary user, and on an overlay. Its guest is root's.
func blind(t *testing.T, f func(t *testing.T, r *rig)) {
	t.Run("ordinary user", func(t *testing.T) {
		r := newRig(t, nobody)
		f(t, r)
	})
	t.Run("overlay", func(t *testing.T) {
		r := newRig(t, 0)
		layers := filepath.Join(r.dir, "layers")
		if err := os.Mkdir(layers, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := unix.Mount("tmpfs", layers, "tmpfs", 0, ""); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { unix.Unmount(layers, 0) })
		for _, d := range []string{"lower", "upper", "work"} {
			if err := os.Mkdir(filepath.Join(layers, d), 0o755); err != nil {
				t.Fatal(err)
			}
		}
		if err := unix.Mount("overlay", r.export, "overlay", 0, fmt.Sprintf("lowerdir=%[1]s/lower,upperdir=%[1]s/upper,workdir=%[1]s/work", layers)); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := unix.Unmount(r.export, 0); err != nil {
				t.Error(err)
			}
		})
		f(t, r)
	})
}

// blindHost starts the host of blind, and a guest as root, and mounts the export.
func (r *rig) blindHost(options string) (host *program) {
	r.t.Helper()
	host = r.host(",guests=any"+options, "--control", r.address("c"))
	r.attr = &syscall.SysProcAttr{Setpgid: true}
	r.guest("--mount", "code="+r.mnt)
	r.mounted(r.mnt)
	host.await("msg=mounted")
	return host
}

// A host that may not use fanotify tells its guest of what changes, by inotify.
func TestWatchedByInotify(t *testing.T) { blind(t, testWatched) }

func testWatched(t *testing.T, r *rig) {
	dir := filepath.Join(r.export, "d")
	put := func(name string, size int) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(dir, name), make([]byte, size), 0o666); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Mkdir(dir, 0o777); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(dir, 0o777); err != nil {
		t.Fatal(err)
	}
	put("f", 0)
	host := r.blindHost("")
	host.await(`watched="by inotify"`)
	if out := r.must("transfusectl", "--host", "status"); !strings.Contains(out, "Watched: by inotify") {
		t.Errorf("the status: %s", out)
	}

	mnt := filepath.Join(r.mnt, "d")
	size := func() int64 {
		t.Helper()
		st, err := os.Stat(filepath.Join(mnt, "f"))
		if err != nil {
			t.Fatal(err)
		}
		return st.Size()
	}
	if _, err := os.ReadDir(mnt); err != nil {
		t.Fatal(err)
	}
	w := watch(t, mnt)
	var lags []time.Duration
	for i := range 50 {
		if got := size(); got != int64(i) {
			t.Fatalf("%d bytes before the change to %d", got, i+1)
		}
		begun := time.Now()
		if err := os.Truncate(filepath.Join(dir, "f"), int64(i+1)); err != nil {
			t.Fatal(err)
		}
		w.until("modify f")
		lags = append(lags, time.Since(begun))
		if got := size(); got != int64(i+1) {
			t.Errorf("%d bytes when the change to %d was told", got, i+1)
		}
	}
	slices.Sort(lags)
	t.Logf("from the host's change to the guest's event: median %v, at most %v", lags[len(lags)/2], lags[len(lags)-1])
	if most := lags[len(lags)-1]; most > bound {
		t.Errorf("a change came after %v", most)
	}

	// By name.
	if _, err := os.Stat(filepath.Join(mnt, "n")); !os.IsNotExist(err) {
		t.Errorf("n: %v", err)
	}
	put("n", 1)
	if got := w.until("close n"); len(got) == 0 || !slices.Contains(got, "create n") {
		t.Errorf("of n's making: %q", got)
	}
	if err := os.Rename(filepath.Join(dir, "n"), filepath.Join(dir, "m")); err != nil {
		t.Fatal(err)
	}
	w.until("from n")
	w.until("to m")
	if err := os.Remove(filepath.Join(dir, "m")); err != nil {
		t.Fatal(err)
	}
	w.until("delete m")
	for _, name := range []string{"n", "m"} {
		if _, err := os.Stat(filepath.Join(mnt, name)); !os.IsNotExist(err) {
			t.Errorf("%s: %v", name, err)
		}
	}

	// What the guest does itself its watchers see once.
	var want []string
	for i := range 20 {
		name := fmt.Sprint("own", i)
		if err := os.WriteFile(filepath.Join(mnt, name), []byte("data"), 0o666); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(filepath.Join(mnt, name), filepath.Join(mnt, "x")); err != nil {
			t.Fatal(err)
		}
		if err := os.Remove(filepath.Join(mnt, "x")); err != nil {
			t.Fatal(err)
		}
		want = append(want, "create "+name, "modify "+name, "close "+name, "from "+name, "to x", "delete x")
	}
	put("end", 0)
	if diff := cmp.Diff(want, w.until("create end")); diff != "" {
		t.Errorf("the guest's own (-want +got):\n%s", diff)
	}
}

// The same guest does cache: without being told it does not see a change.
func TestNotWatched(t *testing.T) { blind(t, testNotWatched) }

func testNotWatched(t *testing.T, r *rig) {
	f := filepath.Join(r.export, "f")
	if err := os.WriteFile(f, nil, 0o666); err != nil {
		t.Fatal(err)
	}
	r.blindHost(",cache=always")
	for _, size := range []int64{0, 1} {
		if err := os.Truncate(f, size); err != nil {
			t.Fatal(err)
		}
		st, err := os.Stat(filepath.Join(r.mnt, "f"))
		if err != nil {
			t.Fatal(err)
		}
		if st.Size() != 0 {
			t.Errorf("%d bytes", st.Size())
		}
	}
}

// seen is what a tree looks like: its names, with what stat and read say.
func seen(t *testing.T, dir string) map[string]string {
	t.Helper()
	all := map[string]string{}
	err := filepath.WalkDir(dir, func(p string, d os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		st, err := os.Stat(p)
		if err != nil {
			return err
		}
		text := fmt.Sprint(st.Mode(), " ", st.ModTime())
		if st.Mode().IsRegular() {
			b, err := os.ReadFile(p)
			if err != nil {
				return err
			}
			text += fmt.Sprintf(" %d %q", st.Size(), b)
		}
		all[strings.TrimPrefix(p, dir)] = text
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

// bound is after how long the guest sees what the host has done. Where nothing is pushed it is a second.
const bound = 200 * time.Millisecond

func differ(host, guest map[string]string) string {
	for _, m := range []map[string]string{host, guest} {
		for k := range m {
			if host[k] != guest[k] {
				return fmt.Sprintf("%q is %q, and in the guest %q", k, host[k], guest[k])
			}
		}
	}
	return ""
}

// Whatever the host and the guest do to the same few names, afterwards they see the same.
func TestWatchedRandom(t *testing.T) { blind(t, testWatchedRandom) }

func testWatchedRandom(t *testing.T, r *rig) {
	if err := os.Chmod(r.export, 0o777); err != nil {
		t.Fatal(err)
	}
	r.blindHost(",root=trust")
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rnd := rand.New(rand.NewPCG(seed, 0))
	name := func() string {
		s := []string{"a", "b", "c"}[rnd.IntN(3)]
		if rnd.IntN(3) > 0 {
			s = filepath.Join([]string{"a", "b", "c"}[rnd.IntN(3)], s)
		}
		return s
	}
	for i := range 3000 {
		dir := r.export
		if rnd.IntN(2) == 0 {
			dir = r.mnt
		}
		p := filepath.Join(dir, name())
		// Most fail, as what is there is not what they want. Files that the host makes must be writable for the guest's server.
		switch rnd.IntN(9) {
		case 0:
			os.Mkdir(p, 0o777)
			os.Chmod(p, 0o777)
		case 1:
			os.Remove(p)
		case 2, 3:
			os.Rename(p, filepath.Join(dir, name()))
		case 4:
			os.Chmod(p, 0o755)
			os.Chmod(p, 0o777)
		case 5:
			os.Stat(p)
			os.ReadDir(p)
		case 6:
			os.Truncate(p, int64(rnd.IntN(5)))
		default:
			if os.WriteFile(p, fmt.Append(nil, i), 0o666) == nil {
				os.Chmod(p, 0o777)
			}
		}
		if i%20 != 19 {
			continue
		}
		mark := fmt.Sprint("/mark", i)
		if err := os.WriteFile(r.export+mark, nil, 0o666); err != nil {
			t.Fatal(err)
		}
		for begun := time.Now(); ; time.Sleep(time.Millisecond) { // as the guest's cache says that it is not there
			if _, err := os.Stat(r.mnt + mark); err == nil {
				break
			}
			if time.Since(begun) > patience {
				t.Fatal("the mark does not come")
			}
		}
		if err := os.Remove(r.export + mark); err != nil {
			t.Fatal(err)
		}
		for begun := time.Now(); ; time.Sleep(time.Millisecond) {
			if _, err := os.Stat(r.mnt + mark); os.IsNotExist(err) {
				break
			}
			if time.Since(begun) > patience {
				t.Fatal("the mark does not go")
			}
		}
		host := seen(t, r.export)
		var wrong string
		for begun := time.Now(); ; time.Sleep(time.Millisecond) {
			if wrong = differ(host, seen(t, r.mnt)); wrong == "" || time.Since(begun) > bound {
				break
			}
		}
		if wrong != "" {
			t.Fatalf("after step %d: %s", i, wrong)
		}
	}
}
