// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"transfused.org/transfused/service/admin"
	"transfused.org/transfused/service/api"
	"transfused.org/transfused/service/guest"
)

// Exit codes of mount(8), which its helpers share.
const (
	mountUsage     = 1 // or permissions
	mountSystem    = 2 // the daemon is not there
	mountInternal  = 4
	mountInterrupt = 8
	mountFailure   = 32
)

// hostPatience is how long a mount waits for its host, unless transfuse.timeout= says otherwise: as long as systemd waits for a unit.
const hostPatience = 90 * time.Second

// helperUsage is what mount.transfuse says of itself.
const helperUsage = `mount.transfuse TAG DIR [-sfnv] [-N NAMESPACE] [-t TYPE] [-o OPTION[,OPTION…]]

mount.transfuse mounts the host's export TAG at the directory DIR. mount(8) and systemd call it for the types transfuse and fuse.transfuse, as
in fstab:

  code  /mnt/code  transfuse  ro,nofail  0 0

It has transfused make the mount, which systemd starts for it where that is not running yet, and returns when the mount stands. In another
mount namespace than the daemon's it mounts there. With the option remount it makes a mount read-only or writable.

  -s            leave out options that are not known
  -f            check the arguments, and mount nothing
  -n            nothing: there is no /etc/mtab to write
  -v            say what was mounted
  -N NAMESPACE  mount in the mount namespace of a process (its id), or that a path names
  -t TYPE       transfuse or fuse.transfuse
  -o OPTIONS    ro, rw, suid, nosuid, dev, nodev, exec, noexec, atime, noatime, relatime, sync, async, dirsync, allow_other,
                default_permissions, fsname=NAME, max_read=BYTES, streams=N, cache=MODE,
                writeback=on|off; and
                transfuse.timeout=SECONDS  how long to wait for the host (90)
                transfuse.socket=PATH      the daemon's control socket (` + api.GuestSocket + `)
                remount                    with ro or rw; other options stay as they are
                Those of mount(8) and systemd, as nofail, noauto, _netdev and all with x-, are theirs.
  -h, -V        this text; the version

Exit codes, as mount(8) has them: 0 done, 1 bad usage or no right to mount, 2 the daemon is not there, 4 a fault of this program, 8 interrupted,
32 the mount failed.
`

// helperCall is a call of mount(8), or of systemd's mount units, which go through it.
type helperCall struct {
	source, dir string
	fake        bool   // -f: everything but the mount
	help        bool   // -h
	version     bool   // -V
	sloppy      bool   // -s: leave out options that are not known
	verbose     bool   // -v
	namespace   string // -N: of a process, or a path

	options []string // those for the daemon
	remount bool
	timeout time.Duration
	socket  string
}

// parseHelper reads arguments as mount(8) gives them to a helper: SRC DIR [-sfnv] [-N NS] [-t TYPE] [-o OPTIONS].
func parseHelper(args []string) (c helperCall, err error) {
	c.timeout, c.socket = hostPatience, api.GuestSocket
	var operands, lists []string
	for len(args) > 0 {
		arg := args[0]
		args = args[1:]
		if len(arg) < 2 || arg[0] != '-' {
			operands = append(operands, arg)
			continue
		}
		if arg == "--help" || arg == "--version" {
			arg = map[string]string{"--help": "-h", "--version": "-V"}[arg]
		}
		if arg == "--" {
			operands = append(operands, args...)
			break
		}
		for i := 1; i < len(arg); i++ {
			switch arg[i] {
			case 'h':
				c.help = true
			case 'V':
				c.version = true
			case 's':
				c.sloppy = true
			case 'f':
				c.fake = true
			case 'v':
				c.verbose = true
			case 'n': // there is no mtab to leave alone
			case 'N', 't', 'o':
				value := arg[i+1:]
				if value == "" {
					if len(args) == 0 {
						return c, fmt.Errorf("option -%c has no value", arg[i])
					}
					value, args = args[0], args[1:]
				}
				switch arg[i] {
				case 'N':
					c.namespace = value
				case 't':
					if value != "transfuse" && value != "fuse.transfuse" {
						return c, fmt.Errorf("-t %s: this helper mounts transfuse", value)
					}
				case 'o':
					lists = append(lists, value)
				}
				i = len(arg)
			default:
				return c, fmt.Errorf("option %q is not known: mount.transfuse -h tells how it is called", arg)
			}
		}
	}
	if c.help || c.version {
		return c, nil
	}
	if len(operands) != 2 {
		return c, fmt.Errorf("%d operands where a tag and a directory are wanted: mount.transfuse -h tells how it is called", len(operands))
	}
	if c.source = operands[0]; c.source == "" {
		return c, errors.New("the tag of an export is missing")
	}
	if c.dir, err = filepath.Abs(operands[1]); err != nil {
		return c, err
	}
	return c, c.parseOptions(lists)
}

// Options of this helper. They don't begin with x-: mount(8) keeps such options from helpers.
const (
	optTimeout = "transfuse.timeout" // seconds that it waits for the host
	optSocket  = "transfuse.socket"  // the daemon's control socket
)

// others are options that are for mount(8), systemd or fuse, and mean nothing here.
var others = []string{"", "defaults", "_netdev", "nofail", "noauto", "auto", "users", "nouser", "owner", "group", "user",
	"comment", "user_id", "group_id", "rootmode", "fd"}

func (c *helperCall) parseOptions(lists []string) error {
	for opt := range strings.SplitSeq(strings.Join(lists, ","), ",") {
		key, value, _ := strings.Cut(opt, "=")
		switch {
		case key == "remount":
			c.remount = true
		case key == optTimeout:
			n, err := strconv.ParseUint(value, 10, 31)
			if err != nil || n == 0 {
				return fmt.Errorf("option %q: a number of seconds from 1 is wanted", opt)
			}
			c.timeout = time.Duration(n) * time.Second
		case key == optSocket:
			c.socket = value
		case slices.Contains(others, key), strings.HasPrefix(key, "x-"), strings.HasPrefix(key, "X-"):
		default:
			if _, err := guest.ParseMountOptions([]string{opt}); err != nil {
				if c.sloppy {
					continue
				}
				return err
			}
			c.options = append(c.options, opt)
		}
	}
	return nil
}

var errInterrupted = errors.New("it was interrupted")

// errUsage and errSystem give an error its exit code.
type errUsage struct{ error }
type errSystem struct{ error }

func (e errUsage) Unwrap() error  { return e.error }
func (e errSystem) Unwrap() error { return e.error }

// mountExit is mount(8)'s exit code for an error of mountHelper.
func mountExit(err error) int {
	var u errUsage
	var s errSystem
	var a *api.Error
	var errno unix.Errno
	switch {
	case err == nil:
		return 0
	case errors.As(err, &u), isKind(err, api.Invalid), isKind(err, api.Denied):
		return mountUsage
	case errors.As(err, &s):
		return mountSystem
	case errors.Is(err, errInterrupted):
		return mountInterrupt
	case errors.As(err, &a), errors.As(err, &errno), errors.Is(err, context.DeadlineExceeded):
		return mountFailure
	}
	return mountInternal
}

// mountHelper does what mount(8) asks.
func mountHelper(ctx context.Context, args []string) error {
	c, err := parseHelper(args)
	if err != nil {
		return errUsage{err}
	}
	switch {
	case c.help:
		fmt.Print(helperUsage)
		return nil
	case c.version:
		fmt.Println("mount.transfuse", version)
		return nil
	case c.fake:
		return nil
	}
	g := admin.NewGuest(c.socket)
	var p place
	if c.namespace != "" {
		if p, err = placeOf(c.namespace); err != nil {
			return errUsage{fmt.Errorf("-N: %w", err)}
		}
		defer p.ns.Close()
	}
	if c.remount {
		err = c.remountIt(ctx, g, p)
	} else {
		err = c.mount(ctx, g, p)
	}
	switch {
	case admin.NotRunning(err):
		return errSystem{fmt.Errorf("%s: nobody listens at the control socket %s: systemctl start transfused-control.socket", c.source, c.socket)}
	case err != nil && ctx.Err() != nil:
		return fmt.Errorf("%s: %w", c.source, errInterrupted)
	}
	return err
}

func (c *helperCall) mount(ctx context.Context, g *admin.GuestClient, p place) error {
	within, cancel := context.WithTimeout(ctx, c.timeout)
	defer cancel()
	if err := p.do(func() error { _, err := os.Lstat(c.dir); return err }); errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("%s: mount point %s: %w: make it first, or use x-mount.mkdir", c.source, c.dir, unix.ENOENT)
	}
	m, err := mountAt(within, g, p, api.MountSpec{Tag: c.source, Directory: c.dir, Options: c.options})
	if errors.Is(err, context.DeadlineExceeded) && ctx.Err() == nil {
		host := "the host"
		ask, cancel := context.WithTimeout(ctx, answerTimeout)
		defer cancel()
		if s, serr := g.GetStatus(ask); serr == nil {
			host = "the host at " + s.Server
		}
		return fmt.Errorf("%s: %s has not answered within %s: see that transfuse-host runs there, or wait longer by transfuse.timeout=SECONDS: %w", c.source, host, c.timeout, err)
	}
	if err == nil && c.verbose {
		fmt.Printf("%s mounted on %s, id %s\n", clean(m.Tag), clean(m.Directory), clean(m.ID))
	}
	return err
}

// remountIt makes the mount at dir read-only or writable. Other options stay as they are: mount(8) repeats those that are there.
func (c *helperCall) remountIt(ctx context.Context, g *admin.GuestClient, p place) error {
	o, err := guest.ParseMountOptions(c.options)
	if err != nil {
		return errUsage{err}
	}
	ctx, cancel := context.WithTimeout(ctx, actTimeout)
	defer cancel()
	peer, err := g.Peer(ctx)
	if err != nil {
		return err
	}
	if !p.isOf(peer.PID) {
		// The daemon can't see this mount.
		attr := unix.MountAttr{Attr_clr: unix.MOUNT_ATTR_RDONLY}
		if o.ReadOnly {
			attr = unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY}
		}
		return p.do(func() error {
			if err := unix.MountSetattr(unix.AT_FDCWD, c.dir, unix.AT_SYMLINK_NOFOLLOW, &attr); err != nil {
				return fmt.Errorf("remount %s: %w", c.dir, os.NewSyscallError("mount_setattr", err))
			}
			return nil
		})
	}
	ms, err := g.GetMounts(ctx)
	if err != nil {
		return err
	}
	for _, m := range ms {
		if m.Directory == c.dir {
			return g.Remount(ctx, m.ID, o.ReadOnly)
		}
	}
	return fmt.Errorf("remount %s: transfused has no mount there: %w", c.dir, unix.EINVAL)
}
