// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"unicode"

	"github.com/coreos/go-systemd/v22/unit"

	"transfused.org/transfused/service/config"
	"transfused.org/transfused/service/guest"
	"transfused.org/transfused/service/transport"
)

// generatorName is the name by which this program is a generator of systemd, systemd.generator(7): it makes a .mount unit of
// each mount of the configuration, as systemd-fstab-generator(8) does of lines of fstab, and by the same options.
//
// Such a unit starts mount.transfuse, which has the daemon make the mount, or waits for the one that it is making already.
// The units differ from fstab's in this:
//   - A mount is always wanted, never required: a host that is not there must not hold the boot up. Who needs it says
//     x-systemd.required-by=local-fs.target and x-systemd.before=local-fs.target.
//   - It wants the daemon and comes after it, so that at shutdown it is unmounted while there is one. It does not require it: a
//     restart of the daemon would unmount what outlives it.
const generatorName = "transfused-generator"

// generator runs the generator: args are the directories for units, of which it uses the first. A mistake is told in one
// line: to the kernel's log where systemd runs it, since there is no other yet.
func generator(root string, args []string) int {
	if len(args) != 1 && len(args) != 3 {
		fmt.Fprintf(os.Stderr, "%s: it is run by systemd; to try it: %[1]s DIRECTORY\n", generatorName)
		return exitUsage
	}
	// The mounts are those of the machine, not of a user; and not of the initrd, whose files are others.
	if os.Getenv("SYSTEMD_SCOPE") == "user" || os.Getenv("SYSTEMD_IN_INITRD") == "1" {
		return exitOK
	}
	err := generate(root, args[0])
	if err == nil {
		return exitOK
	}
	log := os.Stderr
	if os.Getenv("SYSTEMD_SCOPE") != "" {
		if kmsg, err := os.OpenFile("/dev/kmsg", os.O_WRONLY, 0); err == nil {
			defer kmsg.Close()
			log = kmsg
		}
	}
	for line := range strings.SplitSeq(err.Error(), "\n") {
		fmt.Fprintf(log, "<3>%s[%d]: %s\n", generatorName, os.Getpid(), line) // 3: LOG_ERR
	}
	return exitFailure
}

// generate makes the units in dir. With a mistake in the configuration it makes none. A mount that a unit can't have is left
// out, for the daemon to make without.
func generate(root, dir string) error {
	f := flags{root: root}
	v, c, err := f.read()
	if err != nil {
		return err
	}
	ms, err := mountsOf(c, v.Mount)
	if err != nil {
		return err
	}
	all := guest.Config{Server: transport.Addr{Family: transport.Vsock}, Mounts: specs(ms), MountRoots: v.MountRoot}
	if err := all.Check(); err != nil {
		return fmt.Errorf("%s: %w", c.At("mount-root"), err)
	}
	var failed []error
	for _, m := range ms {
		if err := writeUnits(dir, m); err != nil {
			failed = append(failed, fmt.Errorf("%s: mount %s: no unit: %w", c.At("mount", m.name), m.name, err))
		}
	}
	return errors.Join(failed...)
}

// writeUnits makes the units of one mount.
func writeUnits(dir string, m configuredMount) error {
	where := filepath.Clean(m.Dir)
	if err := unitCanHave(where, m.Tag, m.Options); err != nil {
		return err
	}
	name := unit.UnitNamePathEscape(where)
	if len(name)+len(".automount") > 255 {
		return fmt.Errorf("the name of the unit of %s is too long: choose a shorter directory", where)
	}
	var (
		unitPart, mountPart, autoPart []*unit.UnitOption
		options                       []string
		wantedBy, requiredBy          []string
		automount, noauto, nofail     bool
		target                        = "local-fs.target"
	)
	about := []*unit.UnitOption{
		unit.NewUnitOption("Unit", "Documentation", "man:transfused.toml(5)"),
		unit.NewUnitOption("Unit", "SourcePath", unitText(m.path)),
	}
	add := func(to *[]*unit.UnitOption, section, name, value string) {
		*to = append(*to, unit.NewUnitOption(section, name, unitText(value)))
	}
	add(&unitPart, "Unit", "Wants", "transfused.service transfused-control.socket")
	add(&unitPart, "Unit", "After", "transfused.service transfused-control.socket")
	for option := range strings.SplitSeq(strings.Join(m.Options, ","), ",") {
		if option == "" {
			continue
		}
		options = append(options, option)
		key, value, _ := strings.Cut(option, "=")
		switch key {
		case "noauto":
			noauto = true
		case "auto":
			noauto = false
		case "nofail":
			nofail = true
		case "_netdev":
			target = "remote-fs.target"
		case "x-systemd.automount":
			automount = true
		case "x-systemd.idle-timeout":
			add(&autoPart, "Automount", "TimeoutIdleSec", value)
		case "x-systemd.mount-timeout":
			add(&mountPart, "Mount", "TimeoutSec", value)
		case "x-systemd.rw-only":
			add(&mountPart, "Mount", "ReadWriteOnly", "yes")
		case "x-systemd.requires":
			add(&unitPart, "Unit", "Requires", unitName(value))
			add(&unitPart, "Unit", "After", unitName(value))
		case "x-systemd.before":
			add(&unitPart, "Unit", "Before", unitName(value))
		case "x-systemd.after":
			add(&unitPart, "Unit", "After", unitName(value))
		case "x-systemd.requires-mounts-for":
			add(&unitPart, "Unit", "RequiresMountsFor", value)
		case "x-systemd.wanted-by":
			wantedBy = append(wantedBy, unitName(value))
		case "x-systemd.required-by":
			requiredBy = append(requiredBy, unitName(value))
		}
	}
	if !nofail {
		// Without it systemd has the target wait for the mount.
		options = append(options, "nofail")
	}
	mount := append(about[:len(about):len(about)], unitPart...)
	add(&mount, "Mount", "What", m.Tag)
	add(&mount, "Mount", "Where", where)
	add(&mount, "Mount", "Type", "transfuse")
	add(&mount, "Mount", "Options", strings.Join(options, ","))
	if err := writeUnit(filepath.Join(dir, name+".mount"), append(mount, mountPart...)); err != nil {
		return err
	}
	start := name + ".mount"
	if automount {
		start = name + ".automount"
		auto := about[:len(about):len(about)]
		add(&auto, "Automount", "Where", where)
		if err := writeUnit(filepath.Join(dir, start), append(auto, autoPart...)); err != nil {
			return err
		}
	}
	if len(wantedBy)+len(requiredBy) == 0 && (automount || !noauto) {
		wantedBy = []string{target}
	}
	for kind, by := range map[string][]string{".wants": wantedBy, ".requires": requiredBy} {
		for _, other := range by {
			if err := link(filepath.Join(dir, other+kind), start); err != nil {
				return err
			}
		}
	}
	return nil
}

// unitCanHave says why a .mount unit, which leads to mount(8), could not have a mount.
func unitCanHave(where, tag string, options []string) error {
	if strings.HasPrefix(tag, "-") || strings.ContainsAny(tag, "/=,") {
		return fmt.Errorf("mount(8) would take the tag %q for something else: choose one without / = , and no - before it", tag)
	}
	for _, s := range append([]string{where, tag}, options...) {
		if strings.ContainsFunc(s, unicode.IsControl) || strings.TrimSpace(s) != s || strings.HasSuffix(s, `\`) {
			return fmt.Errorf("a unit file can't have %q: choose one without control characters, and without spaces or a backslash at its ends", s)
		}
		for option := range strings.SplitSeq(s, ",") {
			key, value, _ := strings.Cut(option, "=")
			switch key {
			case "x-systemd.requires", "x-systemd.before", "x-systemd.after", "x-systemd.wanted-by", "x-systemd.required-by":
				if value == "" || strings.ContainsAny(value, ` "'`) || !strings.HasPrefix(value, "/") && strings.Contains(value, "/") {
					return fmt.Errorf("option %q names no unit: give the name of one, or the path of a mount point", option)
				}
			case "x-systemd.requires-mounts-for":
				if !strings.HasPrefix(value, "/") || strings.ContainsAny(value, ` "'`) {
					return fmt.Errorf("option %q: give an absolute path without spaces and quotes", option)
				}
			}
		}
	}
	return nil
}

// unitText writes s so that systemd takes it as it is.
func unitText(s string) string { return strings.ReplaceAll(s, "%", "%%") }

// unitName is the unit that s names in an option: by its name, or by the path of a mount point or device.
func unitName(s string) string {
	switch {
	case strings.HasPrefix(s, "/dev/"):
		return unit.UnitNamePathEscape(s) + ".device"
	case strings.HasPrefix(s, "/"):
		return unit.UnitNamePathEscape(s) + ".mount"
	case !strings.Contains(s, "."):
		return s + ".mount"
	}
	return s
}

// writeUnit makes the unit file path. It replaces none: another generator has it from fstab then.
func writeUnit(path string, options []*unit.UnitOption) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
	if errors.Is(err, os.ErrExist) {
		return fmt.Errorf("%w: leave the mount out here, or in /etc/fstab", err)
	}
	if err != nil {
		return config.Reason(err)
	}
	_, err = io.Copy(f, io.MultiReader(strings.NewReader("# Automatically generated by "+generatorName+"\n\n"), unit.Serialize(options)))
	return errors.Join(err, f.Close())
}

// link has the unit that the directory dir belongs to pull name in.
func link(dir, name string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	err := os.Symlink(filepath.Join("..", name), filepath.Join(dir, name))
	if errors.Is(err, os.ErrExist) {
		return nil // asked for twice
	}
	return err
}
