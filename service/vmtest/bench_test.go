// SPDX-License-Identifier: Apache-2.0

//go:build vm

package vmtest

import (
	"encoding/json"
	"flag"
	"fmt"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"transfused.org/transfused/service/bench/figures"
)

var (
	reportDir = flag.String("report", "", "TestBench measures, and writes bench-vm.md and bench-vm.json into this `folder`")
	only      = flag.String("groups", "", "comma-separated `groups` of cases that TestBench measures; default: all")
	check     = flag.Bool("check", false, "TestBench fails when something costs more than it must")
)

// What is measured: the guest's own disk, virtiofs by each of its caches, and a mount of ours in its default mode.
const (
	disk   = "disk"
	ours   = "transfused" // the name by which service/bench knows us
	auto   = "virtiofs-auto"
	always = "virtiofs-always"
	never  = "virtiofs-never"
)

var benched = []string{disk, auto, always, never, ours}

// group is what one run of service/bench measures.
type group struct {
	name, cases string // cases or groups of service/bench
	runs        int
}

// groups: of what is judged there are more rounds. A compiler and many threads take emulated CPUs too long.
var groups = []group{
	{"warm", "warm", 5},
	{"cold", "cold", 3},
	{"calls", "getattr,read4k,create,unlink,fsmark,mdtest,coldstat8,read4k8", 3},
	{"sequential", "sequential", 2},
	{"programs", "cp,untar", 2},
}

// benchReport is what TestBench writes as JSON.
type benchReport struct {
	Host, Guest string
	Commit      string   `json:",omitempty"`
	With        []string // what the VM runs with, and its version
	Begin       time.Time
	Waited      float64 // for which part of the time some process of the host waited for a CPU
	Peers       []string
	Rows        []benchRow
	Bounds      []bound
}

// benchRow is a case, as service/bench has it in its own report, with what the kernel asked.
type benchRow struct {
	Group string
	figures.Row
	Asked map[string]figures.Messages `json:",omitempty"` // for each operation, by peer, but for the disk
}

// bound is what something must be at most, or should.
type bound struct {
	Text, Got string
	Must      bool
	Pass      bool
}

// TestBench measures a mount of ours, over virtio-vsock, beside virtiofs and the guest's own disk. make bench-vm runs it.
func TestBench(t *testing.T) {
	if *reportDir == "" {
		t.Skip("NOT RUN: it is no test; make bench-vm runs it")
	}
	// Each server has a tree of its own, in memory: our host watches the file system of its export, and what others change there would cost
	// it time, and them.
	theirs, own := memory(t), memory(t)
	l := newLab(t, Config{Share: theirs, Memory: 2048})
	program := filepath.Join(l.bin, "bench")
	local(t, "CGO_ENABLED=0 go build -trimpath -o "+program+" transfused.org/transfused/service/bench")
	local(t, fmt.Sprintf("for d in %s %s; do %s -scale small -make-tree $d; done", theirs, own, program))
	l.install(t)
	if err := l.vm.Push(t.Context(), program, "/usr/local/bin/bench"); err != nil {
		t.Fatal(err)
	}
	s := l.sides()[0]
	// What listens on that socket the guest reaches on that port.
	host := serve(t, s, []string{"bench=" + own}, "--metrics", fmt.Sprintf("unix:%s_%d", l.vm.Socket(), metricsPort))
	l.guest(t, fmt.Sprintf("mkdir %s; systemd-run --quiet --service-type=exec --unit=metrics socat UNIX-LISTEN:%[1]s/metrics.sock,fork VSOCK-CONNECT:2:%d", sockets, metricsPort))
	l.join(t, s, "--control", "unix:"+sockets+"/guest-control.sock", "--mount", "bench="+benchDir(ours))
	for _, cache := range Caches {
		dir := benchDir("virtiofs-" + cache)
		l.guest(t, "mkdir -p "+dir+"; mount -t virtiofs "+cache+" "+dir)
	}
	l.guest(t, "mkdir -p "+benchDir(disk)+"; bench -scale small -make-tree "+benchDir(disk))
	host.await(t, "tag=bench") // with all its channels

	r := benchReport{Host: figures.Machine(), With: l.versions(t), Begin: time.Now().UTC().Truncate(time.Second), Peers: benched}
	if out, err := exec.Command("git", "describe", "--always", "--dirty", "--abbrev=12").Output(); err == nil { // there may be no git
		r.Commit = strings.TrimSpace(string(out))
	}
	begin, waited := time.Now(), pressure()
	for _, g := range groups {
		if *only != "" && !slices.Contains(strings.Split(*only, ","), g.name) {
			continue
		}
		rows, guest := l.bench(t, g)
		r.Rows, r.Guest = append(r.Rows, rows...), guest
		r.Waited = (pressure() - waited) / time.Since(begin).Seconds()
		r.Bounds = bounds(r.Rows)
		r.write(t) // each time, as the rest may fail
	}
	fmt.Print("\n", r.markdown(), "\n")
	if *check && slices.ContainsFunc(r.Bounds, func(b bound) bool { return b.Must && !b.Pass }) {
		t.Error("something costs more than it must: see MISS above")
	}
}

const (
	metricsPort = 1600
	sockets     = "/run/bench" // of the guest, where service/bench asks what ours has sent
)

func benchDir(peer string) string { return "/bench/" + peer }

// memory makes a folder of this machine that is a tmpfs of its own.
func memory(t *testing.T) string {
	t.Helper()
	dir := localDir(t)
	if err := unix.Mount("transfused-bench", dir, "tmpfs", 0, "mode=755"); err != nil {
		t.Fatal(os.NewSyscallError("mount", err))
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(os.NewSyscallError("umount", err))
		}
	})
	return dir
}

// bench runs service/bench in the guest, on all peers.
func (l *lab) bench(t *testing.T, g group) (rows []benchRow, machine string) {
	t.Helper()
	begin := time.Now()
	var dirs []string
	peers := benched
	if g.name == "warm" { // without caches nothing is; it only takes long
		peers = slices.DeleteFunc(slices.Clone(peers), func(p string) bool { return p == never })
	}
	for _, p := range peers {
		dirs = append(dirs, p+"="+benchDir(p))
	}
	run := func(args string, report any) {
		t.Helper()
		out := l.guest(t, fmt.Sprintf("bench -scale small -cases %s %s -json /run/bench.json >/run/bench.log 2>&1 || { cat /run/bench.log; exit 1; }; cat /run/bench.json", g.cases, args))
		if err := json.Unmarshal([]byte(out), report); err != nil {
			t.Fatalf("%v in\n%s", err, out)
		}
	}
	var r struct {
		Host  string
		Modes []struct{ Rows []benchRow }
	}
	run(fmt.Sprintf("-runs %d -dirs %s", g.runs, strings.Join(dirs, ",")), &r)
	for _, m := range r.Modes {
		for _, row := range m.Rows {
			row.Group = g.name
			rows = append(rows, row)
		}
	}
	// Counted apart, as it takes time; without never, which asks for each part of each path.
	for _, p := range []string{auto, always, ours} {
		var counted struct {
			Counts []struct {
				Case string
				figures.Messages
			}
		}
		run("-count -sockets "+sockets+" -dirs "+p+"="+benchDir(p), &counted)
		for _, c := range counted.Counts {
			i := slices.IndexFunc(rows, func(r benchRow) bool { return r.Case == c.Case })
			if rows[i].Asked == nil {
				rows[i].Asked = map[string]figures.Messages{}
			}
			rows[i].Asked[p] = c.Messages
		}
	}
	t.Logf("%s: %d cases in %.1f s", g.name, len(rows), time.Since(begin).Seconds())
	return rows, r.Host
}

// versions are of what the VM and its devices are.
func (l *lab) versions(t *testing.T) []string {
	t.Helper()
	accelerator := "emulated (TCG)"
	if os.Getenv("TRANSFUSED_VM_KVM") != "" {
		accelerator = "KVM"
	}
	out := local(t, "dpkg-query --admindir="+filepath.Join(l.tools, "var/lib/dpkg")+" -W -f '${Package} ${Version}\\n' qemu-system-x86 vhost-device-vsock virtiofsd")
	return append(strings.Split(out, "\n"), accelerator+", 2 CPUs, 2 GiB")
}

// bounds judges. A tree that was looked at before must cost what it costs on the disk; the rest should cost no more than on virtiofs.
func bounds(rows []benchRow) (all []bound) {
	for _, r := range rows {
		at := func(other string, most float64, must bool) {
			if x := r.Ratio(ours, other); !math.IsNaN(x) {
				all = append(all, bound{fmt.Sprintf("%s: at most %.1f × %s", r.Case, most, other), fmt.Sprintf("%.2f ×", x), must, math.Round(100*x) <= 100*most})
			}
		}
		if r.Group != "warm" {
			at(auto, 1, false)
			continue
		}
		at(disk, 1.1, true)
		at(auto, 0.5, true)
		at(always, 1, true)
		if m, ok := r.Asked[ours]; ok {
			n := m.Sent * float64(r.N)
			all = append(all, bound{r.Case + ": no message", fmt.Sprintf("%.0f", n), false, math.Round(n) == 0})
		}
	}
	return all
}

func (b bound) verdict() string {
	switch {
	case b.Must && b.Pass:
		return "PASS"
	case b.Must:
		return "MISS"
	case b.Pass:
		return "goal reached"
	}
	return "goal not reached"
}

// write writes both files.
func (r benchReport) write(t *testing.T) {
	t.Helper()
	data, err := json.MarshalIndent(r, "", "\t")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(*reportDir, 0o755); err != nil {
		t.Fatal(err)
	}
	for name, data := range map[string][]byte{"bench-vm.md": []byte(r.markdown()), "bench-vm.json": append(data, '\n')} {
		if err := os.WriteFile(filepath.Join(*reportDir, name), data, 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

// markdown is the report for people.
func (r benchReport) markdown() string {
	var b strings.Builder
	fmt.Fprintf(&b, "# A mount in a VM, beside virtiofs and the guest's disk\n\nHost: %s\n\nGuest: %s\n\nVM: %s\n\n%s, commit %s; some process of the host waited for a CPU for %.0f %% of the time.\n",
		r.Host, r.Guest, strings.Join(r.With, "; "), r.Begin.Format(time.RFC3339), r.Commit, 100*r.Waited)
	fmt.Fprint(&b, "\nMedians. In the last columns how many times our cost is theirs: below 1 ours is faster.\n")
	for _, g := range groups {
		lines := [][]string{append([]string{"case", "what"}, r.Peers...)}
		for _, p := range r.Peers {
			if p != ours {
				lines[0] = append(lines[0], "/"+p)
			}
		}
		for _, row := range r.Rows {
			if row.Group != g.name {
				continue
			}
			line := []string{row.Case, row.What}
			for _, p := range r.Peers {
				line = append(line, row.Figure(p))
			}
			for _, p := range r.Peers {
				if p != ours {
					line = append(line, row.Times(ours, p))
				}
			}
			lines = append(lines, line)
		}
		if len(lines) == 1 {
			continue
		}
		fmt.Fprintf(&b, "\n## %s\n\n", strings.ToUpper(g.name[:1])+g.name[1:])
		figures.Markdown(&b, lines)
	}

	lines := [][]string{{"case", "of", "to the host", "by operation"}}
	for _, row := range r.Rows {
		for _, p := range r.Peers {
			if m, ok := row.Asked[p]; ok {
				lines = append(lines, []string{row.Case, p, fmt.Sprintf("%.2f", m.Sent), m.Operations()})
			}
		}
	}
	if len(lines) > 1 {
		fmt.Fprint(&b, "\n## Requests\n\nFor each operation of a case: messages to the host, and what the guest's kernel asked. Our daemon in the guest answers some of it by itself.\n\n")
		figures.Markdown(&b, lines)
	}
	lines = [][]string{{"", "bound", "measured"}}
	for _, x := range r.Bounds {
		lines = append(lines, []string{x.verdict(), x.Text, x.Got})
	}
	fmt.Fprint(&b, "\n## Bounds\n\n")
	figures.Markdown(&b, lines)
	return b.String()
}
