// SPDX-License-Identifier: Apache-2.0

//go:build vm

package vmtest

import (
	"fmt"
	"testing"

	"github.com/google/go-cmp/cmp"

	"transfused.org/transfused/service/e2e"
)

// token is what both ends know, in tokenFile on either side.
const token = "0123456789abcdef0123456789abcdef\n"

// TestVM runs everything in one VM, since a boot is what takes longest.
func TestVM(t *testing.T) {
	l := newLab(t, Config{})
	t.Run("harness", func(t *testing.T) { testHarness(t, l) })
	l.install(t)
	t.Run("old host", func(t *testing.T) { testOldHost(t, l) })
	t.Run("old protocol", func(t *testing.T) { testOldProtocol(t, l) })
	for _, s := range l.sides() {
		t.Run(s.name, func(t *testing.T) {
			t.Run("guest asks", func(t *testing.T) { testGuestAsks(t, l, s) })
			t.Run("host asks", func(t *testing.T) { testHostAsks(t, l, s) })
			t.Run("killed", func(t *testing.T) { testKilled(t, l, s) })
			t.Run("refused", func(t *testing.T) { testRefused(t, l, s) })
		})
	}
}

// serve starts transfuse-host on its side with these exports, of TAG=DIR, and further arguments.
func serve(t *testing.T, s side, exports []string, args ...string) daemon {
	t.Helper()
	all := []string{"transfuse-host", "--listen", s.listen, "--token-file", s.token}
	for _, e := range exports {
		all = append(all, "--export", e+",root=trust,guests="+s.guests)
	}
	return s.start(t, append(all, args...)...)
}

// join starts transfused in the guest; further arguments win.
func (l *lab) join(t *testing.T, s side, args ...string) daemon {
	t.Helper()
	return l.startInGuest(t, "", append([]string{"transfused", "--server", s.server, "--socket", "vsock:any:1525",
		"--token-file", "/root/token"}, args...)...)
}

// noMounts fails if the guest still has a mount of ours.
func (l *lab) noMounts(t *testing.T) {
	t.Helper()
	if out := l.guest(t, "findmnt --noheadings -t fuse.transfuse || true"); out != "" {
		t.Errorf("mounts left behind in the guest:\n%s", out)
	}
}

// testGuestAsks uses three mounts of one guest as a person would, and takes them down one by one.
func testGuestAsks(t *testing.T, l *lab, s side) {
	mnt := "/mnt/" + s.name
	code, other, third := s.dir(t), s.dir(t), s.dir(t)
	host := serve(t, s, []string{"code=" + code, "other=" + other + ",acl,suid,dev", "third=" + third})
	guest := l.join(t, s, "--mount", "code="+mnt+"/code", "--mount", "other="+mnt+"/other", "--mount", "third="+mnt+"/third")
	l.guest(t, "for d in code other third; do await mounted "+mnt+"/$d; done")

	folders := 100
	if s.name == "loopback" {
		folders = 10 // both ends are emulated: all 10,000 files may take two minutes
	}
	// All at once, as a guest is used: an emulated device waits for its host most of the time.
	t.Run("used", func(t *testing.T) {
		t.Run(fmt.Sprintf("%d files", 100*folders), func(t *testing.T) {
			t.Parallel()
			// Each has its name as content, and a few bytes that a block boundary falls into.
			s.run(t, "cd "+code+"; mkdir -p host/{00..99}; "+
				`awk 'BEGIN { for (i = 0; i < `+fmt.Sprint(folders)+`; i++) for (j = 0; j < 100; j++) {
					f = sprintf("host/%02d/%d", i, j); printf "%s\n%" (j*j+1) "d\n", f, i >f; close(f) } }'`)
			// Several readers at once: through an emulated device, one waits most of its time.
			const sums = "find host -type f -print0 | xargs -0 -n 100 -P 8 sha256sum | sort | sha256sum; find host -type f | wc -l"
			want := s.run(t, "cd "+code+"; "+sums)
			if diff := cmp.Diff(want, l.guest(t, "cd "+mnt+"/code; "+sums)); diff != "" {
				t.Error(diff)
			}
			// And the other way: what the guest writes is what the host has.
			const back = "cd guest; find . -type f -print0 | sort -z | xargs -0 sha256sum | sha256sum"
			want = l.guest(t, "cd "+mnt+"/code; mkdir guest; cp -a host/00 guest; head -c 5000000 /dev/urandom >guest/large; "+back)
			if diff := cmp.Diff(want, s.run(t, "cd "+code+"; "+back)); diff != "" {
				t.Error(diff)
			}
		})
		t.Run("git and gcc", func(t *testing.T) {
			t.Parallel()
			const sources = 12
			n := fmt.Sprintf("n=%d", sources)
			l.guest(t, n+`
				export GIT_CONFIG_GLOBAL=/root/gitconfig
				git config --global user.name Guest; git config --global user.email guest@localhost; git config --global init.defaultBranch main
				rm -rf /root/repo; mkdir /root/repo; cd /root/repo; git init -q
				for i in $(seq $n); do printf 'int f%d(void) { return %d; }\n' $i $i >f$i.c; done
				{ for i in $(seq $n); do echo "int f$i(void);"; done; echo '#include <stdio.h>'; echo 'int main(void) { printf("%d\n", 0'
				  for i in $(seq $n); do echo "+ f$i()"; done; echo '); }'; } >main.c
				printf 'sum: $(patsubst %%.c,%%.o,$(wildcard *.c))\n\t$(CC) -o $@ $^\n' >Makefile
				printf '*.o\nsum\n' >.gitignore
				git add .; git commit -q -m first; echo more >README; git add .; git commit -q -m second`)
			out := l.guest(t, n+`
				export GIT_CONFIG_GLOBAL=/root/gitconfig
				git clone -q --no-local /root/repo `+mnt+`/code/repo; cd `+mnt+`/code/repo
				git fsck --strict 2>&1 | grep -v '^notice' || true
				git status --porcelain; make -s -j2; ./sum; git status --porcelain
				echo changed >README; git status --porcelain; git commit -q -a -m third; git log --format=%s`)
			if diff := cmp.Diff(fmt.Sprint(sources*(sources+1)/2)+"\n M README\nthird\nsecond\nfirst", out); diff != "" {
				t.Error(diff)
			}
		})
		t.Run("posix", func(t *testing.T) {
			t.Parallel()
			missing := e2e.Missing("acl,suid,dev")
			missing["git"] = "tested by itself"
			// Locks wait, and so depend on how messages travel. TestCaches has all cases.
			l.posix(t, mnt+"/other", "Dir/^lock$", missing)
		})
	})
	t.Run("two of three go", func(t *testing.T) {
		// One is unmounted and one is killed in the kernel, while a reader of the other looks at every byte.
		l.guest(t, `
			(cd `+mnt+`/code; for i in 1 2 3; do cat host/00/* | sha256sum; done >/run/read) & reader=$!
			umount `+mnt+`/other
			id=$(( $(stat -c '0x%D' `+mnt+`/third) & 0xff ))
			touch `+mnt+`/third/x
			echo 1 >/sys/fs/fuse/connections/$id/abort
			! touch `+mnt+`/third/y
			wait $reader
			test "$(sort -u /run/read | wc -l)" = 1
			unmounted `+mnt+`/other; mounted `+mnt+`/code`)
	})
	guest.stop(t)
	l.noMounts(t)
	host.stop(t)
}

// testHostAsks has the host ask a guest that asks for nothing.
func testHostAsks(t *testing.T, l *lab, s side) {
	code := s.dir(t)
	l.join(t, s)
	host := serve(t, s, []string{"code=" + code}, "--guest", s.back, "--mount", "code=/mnt/asked")
	l.guest(t, "await mounted /mnt/asked; echo from the guest >/mnt/asked/file")
	if diff := cmp.Diff("from the guest", s.run(t, "cat "+code+"/file")); diff != "" {
		t.Error(diff)
	}
	host.stop(t)
	l.guest(t, "await unmounted /mnt/asked")
}

// testKilled kills one of two guests' daemons, and then the worker of one guest on the host.
func testKilled(t *testing.T, l *lab, s side) {
	code := s.dir(t)
	s.run(t, "head -c 100000 /dev/urandom >"+code+"/file")
	host := serve(t, s, []string{"code=" + code})
	l.join(t, s, "--socket", "vsock:any:1526", "--mount", "code=/mnt/first")
	l.guest(t, "await mounted /mnt/first")
	l.join(t, s, "--mount", "code=/mnt/second")
	l.guest(t, "await mounted /mnt/second; cmp /mnt/first/file /mnt/second/file")

	// The oldest child of the host is the first guest's worker.
	s.run(t, "kill -KILL $(pgrep -o -P "+host.pid(t)+")")
	l.guest(t, "cmp /mnt/second/file /mnt/second/file; until stat /mnt/first/file; do await mounted /mnt/first; done 2>/dev/null")
}

// testRefused has guests that may not mount.
func testRefused(t *testing.T, l *lab, s side) {
	serve(t, s, []string{"code=" + s.dir(t)})
	t.Run("wrong token", func(t *testing.T) {
		l.guest(t, "umask 077; echo 00000000000000000000000000000000 >/root/wrong")
		d := l.join(t, s, "--token-file", "/root/wrong", "--mount", "code=/mnt/refused")
		d.await(t, "wrong token")
		d.stop(t)
		l.noMounts(t)
	})
	t.Run("no token", func(t *testing.T) {
		if s.name != "virtio" {
			t.Skip("NOT RUN: vsock shows the source port, so that no token is needed")
		}
		d := l.startInGuest(t, "", "transfused", "--server", s.server, "--socket", "vsock:any:1525", "--mount", "code=/mnt/refused")
		d.await(t, "no token")
		d.stop(t)
		l.noMounts(t)
	})
	t.Run("unprivileged port", func(t *testing.T) {
		if s.name == "virtio" {
			t.Skip("NOT RUN: hybrid vsock hides the source port")
		}
		d := l.startInGuest(t, "nobody", "transfused", "--server", s.server, "--socket", "vsock:any:1525", "--mount", "code=/tmp/refused")
		d.await(t, "is not below 1024")
		d.stop(t)
		l.noMounts(t)
	})
}
