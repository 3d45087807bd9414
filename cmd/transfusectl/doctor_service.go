// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"regexp"
	"strconv"
	"strings"

	"transfused.org/transfused/service/admin"
	"transfused.org/transfused/service/api"
	"transfused.org/transfused/service/transport"
)

// units are those of the packages, the service first.
func units(host bool) []string {
	if host {
		return []string{"transfuse-host.service", "transfuse-host.socket", "transfuse-host-control.socket"}
	}
	return []string{"transfused.service", "transfused.socket", "transfused-control.socket"}
}

// unit is what systemctl show tells of a unit.
type unit map[string]string

// unit asks systemd for a unit's state.
func (m machine) unit(ctx context.Context, name string) (unit, error) {
	out, err := m.run(ctx, "systemctl", "show", "--property=LoadState,ActiveState,SubState,UnitFileState,Result,MainPID,NRestarts", "--", name)
	if err != nil {
		return nil, err
	}
	u := unit{}
	for line := range strings.Lines(out) {
		if key, value, ok := strings.Cut(strings.TrimSpace(line), "="); ok {
			u[key] = value
		}
	}
	return u, nil
}

func (m machine) checkSystemd(ctx context.Context, f *findings, host bool) {
	if !m.exists("run/systemd/system") {
		f.warn("systemd", "start the daemon by what runs here", "systemd does not run this machine: nothing restarts the daemon, or keeps mounts while it is restarted")
		return
	}
	out, err := m.run(ctx, "systemctl", "--version")
	v := regexp.MustCompile(`^systemd (\d+)`).FindStringSubmatch(out)
	if err != nil || v == nil {
		f.warn("systemd", "see why systemctl fails", "its version can't be told: %v", err)
		return
	}
	if n, err := strconv.Atoi(v[1]); err != nil || n < 252 {
		f.warn("systemd", "use systemd 252 or newer", "systemd %s is older than the units are made for", v[1])
	} else {
		f.ok("systemd", "systemd %s", v[1])
	}
	for _, name := range units(host) {
		u, err := m.unit(ctx, name)
		state := u["ActiveState"] + " (" + u["SubState"] + ")"
		switch {
		case err != nil:
			f.warn(name, "see why systemctl fails", "its state can't be told: %v", err)
		case u["LoadState"] == "not-found":
			f.warn(name, "install the package, or ignore this where the daemon is started otherwise", "there is no such unit")
		case u["LoadState"] == "masked":
			f.warn(name, "systemctl unmask "+name, "it is masked")
		case u["ActiveState"] == "failed":
			f.err(name, "journalctl -xeu "+name+"; then systemctl restart "+name, "it has failed: %s", u["Result"])
		case name == "transfuse-host.socket" && u["ActiveState"] != "active":
			// It is enabled by who has exports, and one of users or of hybrid vsock has no need of it.
			f.warn(name, "systemctl enable --now "+name, "it is %s: no guest reaches transfuse-host by vsock", state)
		case strings.HasSuffix(name, ".socket") && u["ActiveState"] != "active":
			f.err(name, "systemctl enable --now "+name, "it is %s", state)
		case strings.HasSuffix(name, ".socket") && u["UnitFileState"] == "disabled":
			f.warn(name, "systemctl enable "+name, "it is %s, but will not be after the next boot", state)
		default:
			f.ok(name, "it is %s", state)
		}
	}
}

func (m machine) checkFusermount(f *findings) {
	if path, err := m.lookPath("fusermount3"); err == nil {
		f.ok("fusermount3", "%s", path)
	} else {
		f.warn("fusermount3", "apt install fuse3, or dnf install fuse3", "it is missing: only root can mount")
	}
}

// checkVersion compares a daemon's version with ours.
func checkVersion(f *findings, program, theirs string) {
	if theirs != version {
		f.warn("version", "systemctl restart "+program+", or install packages of one version", "%s is %s, transfusectl %s", program, theirs, version)
		return
	}
	f.ok("version", "%s %s", program, theirs)
}

// notAnswered says why a daemon can't be asked. Others of its checks are of no use then.
func (a *app) notAnswered(f *findings, name string, err error) bool {
	switch {
	case err == nil:
		return false
	case admin.NotRunning(err):
		unit := "transfused-control.socket"
		if a.host {
			unit = "transfuse-host-control.socket"
		}
		f.err(name, "systemctl start "+unit, "nobody listens at %s", a.socket)
	default:
		f.err(name, "journalctl -xeu "+units(a.host)[0], "it does not answer at %s: %v", a.socket, err)
	}
	return true
}

// otherTransport is the host's address where the guest's daemon reaches it otherwise than by vsock; empty where that is not known.
func (a *app) otherTransport(ctx context.Context) string {
	if a.host {
		return ""
	}
	s, err := a.guest().GetStatus(ctx)
	if addr, perr := transport.Parse(s.Server); err != nil || perr != nil || addr.Family == transport.Vsock {
		return ""
	}
	return s.Server
}

func (a *app) checkDaemon(ctx context.Context, f *findings) {
	s, err := a.guest().GetStatus(ctx)
	if a.notAnswered(f, "transfused", err) {
		return
	}
	f.ok("transfused", "%s", s.Text)
	checkVersion(f, "transfused", s.Version)
	if !s.Connected {
		f.err("host", "start transfuse-host there, and see that an export names this guest", "%s is not connected", s.Server)
	} else {
		host := s.Host
		if host == "" {
			host = "a host that does not tell its version"
		}
		f.ok("host", "%s is connected: %s, protocol %d", s.Server, host, s.Protocol)
	}
	ms, err := a.guest().GetMounts(ctx)
	if a.notAnswered(f, "mounts", err) {
		return
	}
	for _, m := range ms {
		name := fmt.Sprintf("%s on %s", m.Tag, m.Directory)
		switch m.State {
		case api.Active:
			f.ok("mount", "%s is active", name)
		case api.Failed:
			f.err("mount", "mend that, and transfusectl reload", "%s has failed: %s", name, m.Error)
		default:
			f.warn("mount", "see what is said of the host", "%s is %s: %s", name, m.State, m.Error)
		}
	}
}

func (a *app) checkServer(ctx context.Context, f *findings) {
	s, err := a.server().GetStatus(ctx)
	if a.notAnswered(f, "transfuse-host", err) {
		return
	}
	f.ok("transfuse-host", "%s", s.Text)
	checkVersion(f, "transfuse-host", s.Version)
	if s.Exports == 0 {
		f.warn("exports", "name directories in /etc/transfuse/host.toml, and transfusectl --host reload", "nothing is exported")
	} else {
		f.ok("exports", "%s", count(s.Exports, "export"))
	}
}

// minFiles are descriptors that a daemon should have: the guest's a few a mount, the host's one for each node that a guest remembers.
func minFiles(host bool) uint64 {
	if host {
		return 65536
	}
	return 4096
}

func (m machine) checkLimits(ctx context.Context, f *findings, host bool) {
	service := units(host)[0]
	u, err := m.unit(ctx, service)
	if err != nil || u["MainPID"] == "" || u["MainPID"] == "0" {
		return // checkSystemd has said that it does not run
	}
	l := regexp.MustCompile(`(?m)^Max open files\s+(\S+)\s+(\S+)`).FindStringSubmatch(m.read("proc/" + u["MainPID"] + "/limits"))
	if l == nil {
		f.warn("limits", "run doctor as root", "the limits of process %s can't be read", u["MainPID"])
		return
	}
	// The daemons raise the soft limit to the hard one.
	n, err := strconv.ParseUint(l[2], 10, 64)
	if want := minFiles(host); err == nil && n < want {
		f.warn("limits", fmt.Sprintf("systemctl edit %s: [Service] LimitNOFILE=%d", service, want), "RLIMIT_NOFILE of %s is %s: too few open files for many mounts or large trees", service, l[2])
		return
	}
	f.ok("limits", "RLIMIT_NOFILE of %s is %s", service, l[2])
}
