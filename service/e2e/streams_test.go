// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"transfused.org/transfused/service/wire"
)

// relay stands between a guest and its host, for a test to end streams alone, or to hold up what they carry to the host.
type relay struct {
	t  *testing.T
	ln net.Listener
	to string
	wg sync.WaitGroup

	mu      sync.Mutex // guards the rest
	all     []net.Conn
	streams map[uint16]net.Conn // the guest's end of the last one of each index
	gates   map[uint16]chan struct{}
}

// relay starts one, which listens at the rig's address r.
func (r *rig) relay() *relay {
	r.t.Helper()
	ln, err := net.Listen("unix", r.socket("r"))
	if err != nil {
		r.t.Fatal(err)
	}
	l := &relay{t: r.t, ln: ln, to: r.socket("h"), streams: map[uint16]net.Conn{}, gates: map[uint16]chan struct{}{}}
	l.wg.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			l.wg.Go(func() { l.serve(c) })
		}
	})
	r.t.Cleanup(func() {
		ln.Close()
		l.mu.Lock()
		for _, c := range l.all {
			c.Close()
		}
		l.mu.Unlock()
		l.wg.Wait()
	})
	return l
}

func (l *relay) serve(c net.Conn) {
	defer c.Close()
	h, err := net.Dial("unix", l.to)
	if err != nil {
		return
	}
	defer h.Close()
	head := make([]byte, 4)
	if _, err := io.ReadFull(c, head); err != nil {
		return
	}
	first := append(head, make([]byte, min(wire.MaxFirst, max(6, int(binary.LittleEndian.Uint32(head))))-4)...)
	if _, err := io.ReadFull(c, first[4:]); err != nil {
		return
	}
	l.mu.Lock()
	l.all = append(l.all, c, h)
	var gate chan struct{}
	if m, err := wire.ToHost(wire.Type(binary.LittleEndian.Uint16(first[4:])), first[6:]); err == nil {
		if o, ok := m.(*wire.StreamOpen); ok {
			l.streams[o.Index] = c
			gate = l.gates[o.Index]
		}
	}
	l.mu.Unlock()
	l.wg.Go(func() {
		io.Copy(c, h) // the other direction tells of the end
		c.Close()
	})
	if _, err := h.Write(first); err != nil {
		return
	}
	if gate != nil {
		<-gate
	}
	io.Copy(h, c)
}

// lose ends the stream of that index.
func (l *relay) lose(index uint16) {
	l.t.Helper()
	l.mu.Lock()
	defer l.mu.Unlock()
	if c := l.streams[index]; c == nil {
		l.t.Errorf("there is no stream %d", index)
	} else {
		c.Close()
	}
}

// A mount that loses any one of its streams, or its daemon, goes on with as many, and nothing that passed it is lost. Its users do what may be done twice.
func TestStreamLost(t *testing.T) {
	const streams = 4
	r := newRig(t, 0)
	host := r.host("")
	l := r.relay()
	m := r.newManager("transfused", "g")
	args := []string{"--server", r.address("r"), "--control", r.address("c"), "--mount", fmt.Sprintf("code=%s,streams=%d", r.mnt, streams)}
	guest := m.start(args...)
	r.mounted(r.mnt)
	guest.await("msg=mounted")
	ref, stop := filepath.Join(r.dir, "ref"), filepath.Join(r.dir, "stop")
	users := []*shell{r.shell(), r.shell(), r.shell()}
	users[0].do("head -c 20000000 /dev/urandom > " + ref)
	for i, u := range users {
		file := filepath.Join(r.mnt, fmt.Sprint("file", i))
		u.do(fmt.Sprintf("cp %s %s", ref, file))
		u.begin(fmt.Sprintf("until [ -e %s ]; do cp %s %s && cmp %[2]s %[3]s || exit 1; done", stop, ref, file))
	}
	for i := range streams {
		l.lose(uint16(i))
		guest.awaitTimes("the mount goes on", i+1)
	}
	kill := func() {
		if err := guest.cmd.Process.Kill(); err != nil {
			t.Error(err)
		}
		// Not for its helper, which holds what it logs to open: that may be telling the kernel to forget pages, which waits until they are read.
		if err := unix.Waitid(unix.P_PID, guest.cmd.Process.Pid, nil, unix.WEXITED|unix.WNOWAIT, nil); err != nil && err != unix.ECHILD {
			t.Error(err)
		}
	}
	for _, end := range []func(){func() { guest.stop(unix.SIGTERM) }, kill} {
		if m := r.ctlMounts()[r.mnt]; m.Streams != streams {
			t.Errorf("transfusectl shows %d streams", m.Streams)
		}
		end()
		guest = m.start(args...)
		guest.await("the mount goes on")
	}
	if err := os.WriteFile(stop, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	want, err := os.ReadFile(ref)
	if err != nil {
		t.Fatal(err)
	}
	for i, u := range users {
		u.end()
		if got, err := os.ReadFile(filepath.Join(r.export, fmt.Sprint("file", i))); err != nil || !bytes.Equal(got, want) {
			t.Errorf("the host has %d bytes, %v, or others than were written", len(got), err)
		}
	}
	users[0].do("umount " + r.mnt)
	m.await("STATUS=0 mounts, host connected, protocol 2")
	guest.stop(unix.SIGTERM)
	host.stop(unix.SIGTERM)
}

// What is small is served while the host does not get what large data are asked for by. Its files are there before: to forget pages the guest's kernel
// waits until they are read.
func TestStreamHeldUp(t *testing.T) {
	r := newRig(t, 0)
	for name, size := range map[string]int{"large": 3_000_000, "small": 1} {
		if err := os.WriteFile(filepath.Join(r.export, name), bytes.Repeat([]byte("x"), size), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	host := r.host("")
	l := r.relay()
	gate := make(chan struct{})
	l.gates[1] = gate
	guest := r.guest("--server", r.address("r"), "--mount", "code="+r.mnt+",streams=2")
	r.mounted(r.mnt)
	large, small := r.shell(), r.shell()
	done := filepath.Join(r.dir, "done")
	large.begin(fmt.Sprintf("cmp %s/large %s/large; touch %s; dd if=/dev/zero of=%[2]s/new bs=1M count=16 status=none", r.export, r.mnt, done))
	for range 20 {
		if got := small.do(fmt.Sprintf("stat -c %%s %s/large; cat %[1]s/small; echo y > %[1]s/made; rm %[1]s/made", r.mnt)); got != "3000000\nx" {
			t.Errorf("got %q", got)
		}
	}
	if _, err := os.Stat(done); err == nil {
		t.Error("large data were not held up")
	}
	close(gate)
	large.end()
	guest.stop(unix.SIGTERM)
	host.stop(unix.SIGTERM)
}

// streamsEnv has TestBesideLargeData measure, for so long each.
const streamsEnv = "TRANSFUSED_STREAMS"

// TestBesideLargeData measures how long a forced getattr takes while another program reads, or writes, 1 GiB by 1 MiB over and over through the same mount,
// over one stream, two and four, in turns.
func TestBesideLargeData(t *testing.T) {
	each, err := time.ParseDuration(os.Getenv(streamsEnv))
	if err != nil {
		t.Skip("NOT RUN: it measures times, which other tests disturb: make streams")
	}
	r := newRig(t, 0)
	r.memory()
	const size = 1 << 30
	if f, err := os.Create(filepath.Join(r.export, "large")); err != nil {
		t.Fatal(err)
	} else {
		for block := make([]byte, 1<<20); ; {
			if n, err := f.Write(block); err != nil {
				t.Fatal(err)
			} else if end, _ := f.Seek(0, io.SeekCurrent); end == size || n == 0 {
				break
			}
		}
		f.Close()
	}
	r.host(",root=trust")
	loads := []struct{ name, command string }{
		{"alone", ""},
		{"beside reading", "dd if=%s/large of=/dev/null bs=1M iflag=nocache"},
		{"beside writing", "dd if=/dev/zero of=%s/large bs=1M count=1024 conv=notrunc"},
	}
	counts := []int{1, 2, 4}
	took, rates := map[string][]time.Duration{}, map[string][]string{}
	for round := range 4 {
		for i := range counts {
			streams := counts[(i+round)%len(counts)]
			guest := r.guest("--mount", fmt.Sprintf("code=%s,streams=%d", r.mnt, streams))
			r.mounted(r.mnt)
			for _, load := range loads {
				key := fmt.Sprintf("%s, streams=%d", load.name, streams)
				rates[key] = append(rates[key], r.underLoad(load.command, func() {
					// Now and then: who asks without a pause asks most where nothing is in his way.
					for begin := time.Now(); time.Since(begin) < each/4; time.Sleep(500 * time.Microsecond) {
						var st unix.Statx_t
						begun := time.Now()
						if err := unix.Statx(unix.AT_FDCWD, r.mnt, unix.AT_STATX_FORCE_SYNC, unix.STATX_BASIC_STATS, &st); err != nil {
							t.Fatal(err)
						}
						took[key] = append(took[key], time.Since(begun))
					}
				})...)
			}
			guest.stop(unix.SIGTERM)
			r.unmounted(r.mnt)
		}
	}
	for _, load := range loads {
		for _, streams := range counts {
			key := fmt.Sprintf("%s, streams=%d", load.name, streams)
			all := took[key]
			slices.Sort(all)
			at := func(permille int) time.Duration { return all[(len(all)-1)*permille/1000].Round(100 * time.Nanosecond) }
			t.Logf("%s: getattr p50 %v, p99 %v, p99.9 %v, max %v (%d); %s", key, at(500), at(990), at(999), at(1000), len(all), strings.Join(rates[key], ", "))
		}
	}
}

// underLoad calls f while a shell makes command, with the mount in it, again and again, and returns how fast it was each time, in dd's words.
func (r *rig) underLoad(command string, f func()) (rates []string) {
	r.t.Helper()
	if command == "" {
		f()
		return nil
	}
	var out bytes.Buffer
	cmd := exec.Command("sh", "-c", "while :; do "+fmt.Sprintf(command, r.mnt)+"; done")
	cmd.Stderr, cmd.SysProcAttr = &out, &syscall.SysProcAttr{Setpgid: true}
	if err := cmd.Start(); err != nil {
		r.t.Fatal(err)
	}
	f()
	if err := unix.Kill(-cmd.Process.Pid, unix.SIGKILL); err != nil {
		r.t.Error(err)
	}
	cmd.Wait() // it was killed
	return regexp.MustCompile(`[0-9.]+ [GM]B/s`).FindAllString(out.String(), -1)
}
