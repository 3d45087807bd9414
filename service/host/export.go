// SPDX-License-Identifier: Apache-2.0

package host

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"path/filepath"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"

	"golang.org/x/sys/unix"

	"transfused.org/transfused/service/passthrough"
	"transfused.org/transfused/service/transport"
	"transfused.org/transfused/service/wire"
)

// Export is a directory of the host that guests may mount by its tag.
type Export struct {
	Tag string
	Dir string // absolute
	// Guests are those that may mount it. Without any, those that connect
	// over a Unix socket as the user who owns the server, or as root.
	Guests []GuestRule
	Options
	Streams int // of one mount, as its guest asks for them; 0: one
}

// Options are what an export's worker needs to know of it.
type Options struct {
	ReadOnly, Suid, Dev, ACL bool
	Root                     passthrough.RootPolicy
	UIDs, GIDs               passthrough.IDMap
	Squash                   *passthrough.Cred
	Submounts                passthrough.SubmountPolicy
	Xattr                    passthrough.XattrMode
	XattrMap                 []passthrough.XattrRule
	Cache                    passthrough.CacheMode
	Writeback                bool
	// MaxOpenFiles and MaxInodes bound what one session has of this export, MaxStreams
	// what one mount has; 0 leaves the defaults.
	MaxOpenFiles, MaxInodes, MaxStreams int
}

// GuestRule names guests: those of a CID, those behind a socket, or any (but
// CIDs 0 to 2, which have to be named).
type GuestRule struct {
	Any  bool
	CID  uint32
	Path string // of the VMM's socket (hybrid vsock), or of our Unix socket
}

// ParseGuestRule parses CID, PATH or any.
func ParseGuestRule(s string) (GuestRule, error) {
	if s == "any" {
		return GuestRule{Any: true}, nil
	}
	if strings.HasPrefix(s, "/") {
		return GuestRule{Path: filepath.Clean(s)}, nil
	}
	cid, err := strconv.ParseUint(s, 10, 32)
	if err != nil || cid == transport.CIDAny {
		return GuestRule{}, fmt.Errorf("%q names no guest: give a CID, the absolute path of a socket, or any", s)
	}
	return GuestRule{CID: uint32(cid)}, nil
}

func (r GuestRule) String() string {
	switch {
	case r.Any:
		return "any"
	case r.Path != "":
		return r.Path
	}
	return strconv.FormatUint(uint64(r.CID), 10)
}

// allows says whether p may mount e, served by a process of uid.
func (e *Export) allows(p transport.Peer, uid uint32) bool {
	if len(e.Guests) == 0 {
		return p.Family == transport.Unix && (p.UID == uid || p.UID == 0)
	}
	return slices.ContainsFunc(e.Guests, func(r GuestRule) bool {
		switch {
		case r.Any:
			return p.Family != transport.Vsock || p.CID > transport.CIDHost
		case r.Path != "":
			return p.Family != transport.Vsock && filepath.Clean(p.Local.Path) == r.Path
		}
		return p.Family == transport.Vsock && p.CID == r.CID
	})
}

// same says whether a mount of e is one of o too. Who may have it is another question.
func (e *Export) same(o *Export) bool {
	return e.Tag == o.Tag && e.Dir == o.Dir && reflect.DeepEqual(e.Options, o.Options)
}

// with is the export as a guest asks for it, which may be less than what it offers, and cached otherwise.
func (e *Export) with(options []string) (Export, error) {
	as := *e
	for _, o := range options {
		key, value, _ := strings.Cut(o, "=")
		switch {
		case o == "rw":
			if e.ReadOnly {
				return as, fmt.Errorf("%w: export %s is read-only: leave out rw", unix.EROFS, e.Tag)
			}
		case o == "ro":
			as.ReadOnly = true
		case key == "streams":
			n, err := strconv.ParseUint(value, 10, 16)
			if err != nil || n == 0 {
				return as, fmt.Errorf("%w: mount option %q: a number from 1 is wanted", unix.EINVAL, o)
			}
			as.Streams = min(int(n), cmp.Or(e.MaxStreams, maxStreams))
		case key == "cache":
			if err := as.Set(key, value, true); err != nil {
				return as, fmt.Errorf("%w: %w", unix.EINVAL, err)
			}
		case o == "writeback=on":
			if !e.Writeback {
				return as, fmt.Errorf("%w: export %s has no writeback: the host would have to allow it; leave it out", unix.EINVAL, e.Tag)
			}
		case o == "writeback=off":
			as.Writeback = false
		default:
			return as, fmt.Errorf("%w: this host knows no mount option %q: leave it out, or upgrade the host", unix.EINVAL, o)
		}
	}
	if as.Writeback && as.Cache != passthrough.CacheAlways {
		if slices.Contains(options, "writeback=on") {
			return as, fmt.Errorf("%w: %w", unix.EINVAL, errWriteback)
		}
		as.Writeback = false
	}
	return as, nil
}

var errWriteback = errors.New("writeback without cache=always would lose what is written on the host or by another guest meanwhile, since the guest would write its own pages over it: add cache=always if nobody else writes there, or leave writeback out")

// ParseExport parses TAG=DIR[,option…]. A backslash takes the meaning from a
// comma, or a backslash, that follows it.
func ParseExport(s string) (Export, error) {
	fields := splitCommas(s)
	tag, dir, ok := strings.Cut(fields[0], "=")
	if !ok {
		return Export{}, fmt.Errorf("export %q: give TAG=DIR[,option…], such as code=/home/me/code,ro", s)
	}
	e := Export{Tag: tag, Dir: dir}
	for _, o := range fields[1:] {
		name, value, given := strings.Cut(o, "=")
		if err := e.Set(name, value, given); err != nil {
			return Export{}, fmt.Errorf("export %q: %w", s, err)
		}
	}
	if err := e.check(); err != nil {
		return Export{}, fmt.Errorf("export %q: %w", s, err)
	}
	return e, nil
}

// splitCommas splits at commas without a backslash before them, and unescapes.
func splitCommas(s string) []string {
	fields := []string{""}
	for i := 0; i < len(s); i++ {
		last := &fields[len(fields)-1]
		switch {
		case s[i] == '\\' && i+1 < len(s) && (s[i+1] == ',' || s[i+1] == '\\'):
			i++
			*last += s[i : i+1]
		case s[i] == ',':
			fields = append(fields, "")
		default:
			*last += s[i : i+1]
		}
	}
	return fields
}

// check finds what no option by itself shows.
func (e *Export) check() error {
	switch {
	case e.Tag == "" || len(e.Tag) > wire.MaxTag || !utf8.ValidString(e.Tag) ||
		strings.ContainsFunc(e.Tag, func(r rune) bool { return unicode.IsControl(r) || r == '/' || r == ',' || r == '=' }):
		return fmt.Errorf("tag %q: give 1 to %d bytes without / , = and control characters", e.Tag, wire.MaxTag)
	case !filepath.IsAbs(e.Dir):
		return fmt.Errorf("directory %q: give an absolute path", e.Dir)
	case strings.ContainsRune(e.Dir, 0):
		return fmt.Errorf("directory %q: a path has no NUL", e.Dir)
	}
	if err := e.UIDs.Validate(); err != nil {
		return fmt.Errorf("uidmap: %w", err)
	}
	if err := e.GIDs.Validate(); err != nil {
		return fmt.Errorf("gidmap: %w", err)
	}
	if e.Squash != nil && (len(e.UIDs) > 0 || len(e.GIDs) > 0) {
		return fmt.Errorf("squash and id maps exclude each other: leave one out")
	}
	if e.Writeback && e.Cache != passthrough.CacheAlways {
		return errWriteback
	}
	e.Dir = filepath.Clean(e.Dir)
	return nil
}

// settings are the options of an export by name, for the command line and the
// configuration file alike.
var settings = map[string]func(e *Export, value string) error{
	"ro":     flag(func(e *Export) *bool { return &e.ReadOnly }),
	"suid":   flag(func(e *Export) *bool { return &e.Suid }),
	"dev":    flag(func(e *Export) *bool { return &e.Dev }),
	"acl":    flag(func(e *Export) *bool { return &e.ACL }),
	"guests": list(ParseGuestRule, func(e *Export) *[]GuestRule { return &e.Guests }),
	"uidmap": list(passthrough.ParseIDRange, func(e *Export) *[]passthrough.IDRange { return (*[]passthrough.IDRange)(&e.UIDs) }),
	"gidmap": list(passthrough.ParseIDRange, func(e *Export) *[]passthrough.IDRange { return (*[]passthrough.IDRange)(&e.GIDs) }),
	"xattrmap": list(passthrough.ParseXattrRule, func(e *Export) *[]passthrough.XattrRule {
		return &e.XattrMap
	}),
	"root": choice(map[string]passthrough.RootPolicy{
		"owner": passthrough.RootOwner, "trust": passthrough.RootTrust,
	}, func(e *Export) *passthrough.RootPolicy { return &e.Root }),
	"submounts": choice(map[string]passthrough.SubmountPolicy{
		"hide": passthrough.SubmountsHide, "follow": passthrough.SubmountsFollow,
	}, func(e *Export) *passthrough.SubmountPolicy { return &e.Submounts }),
	"xattr": choice(map[string]passthrough.XattrMode{
		"on": passthrough.XattrOn, "off": passthrough.XattrOff, "user": passthrough.XattrUser,
	}, func(e *Export) *passthrough.XattrMode { return &e.Xattr }),
	"cache": choice(map[string]passthrough.CacheMode{
		"coherent": passthrough.CacheCoherent, "none": passthrough.CacheNone, "always": passthrough.CacheAlways,
	}, func(e *Export) *passthrough.CacheMode { return &e.Cache }),
	"writeback": flag(func(e *Export) *bool { return &e.Writeback }),
	"squash": func(e *Export, value string) error {
		uid, gid, _ := strings.Cut(value, ":")
		u, uerr := strconv.ParseUint(uid, 10, 32)
		g, gerr := strconv.ParseUint(gid, 10, 32)
		if uerr != nil || gerr != nil || uint32(u) == noID || uint32(g) == noID {
			return fmt.Errorf("%q: give UID:GID, two numbers", value)
		}
		e.Squash = &passthrough.Cred{UID: uint32(u), GID: uint32(g)}
		return nil
	},
	"max-open-files": count(func(e *Export) *int { return &e.MaxOpenFiles }),
	"max-inodes":     count(func(e *Export) *int { return &e.MaxInodes }),
	"max-streams": func(e *Export, value string) error {
		err := count(func(e *Export) *int { return &e.MaxStreams })(e, value)
		if err == nil && e.MaxStreams > maxStreams {
			err = fmt.Errorf("%q is over %d", value, maxStreams)
		}
		return err
	},
}

// noID is the invalid uid and gid: chown takes it for "leave as it is".
const noID = ^uint32(0)

// Set sets one option by its name. Without a value given it is a flag, and
// means yes. Those that are lists grow.
func (e *Export) Set(name, value string, given bool) error {
	set, ok := settings[name]
	if !ok {
		return fmt.Errorf("unknown option %q: there are %s", name, strings.Join(slices.Sorted(maps.Keys(settings)), ", "))
	}
	switch name {
	case "ro", "suid", "dev", "acl", "writeback":
		if !given {
			value = "true"
		}
	default:
		if value == "" {
			return fmt.Errorf("option %s needs a value: write %s=VALUE", name, name)
		}
	}
	if err := set(e, value); err != nil {
		return fmt.Errorf("option %s: %w", name, err)
	}
	return nil
}

func flag(field func(*Export) *bool) func(*Export, string) error {
	return func(e *Export, value string) error {
		switch value {
		case "true", "yes", "on", "1":
			*field(e) = true
		case "false", "no", "off", "0":
			*field(e) = false
		default:
			return fmt.Errorf("%q is neither yes nor no", value)
		}
		return nil
	}
}

func list[T any](parse func(string) (T, error), field func(*Export) *[]T) func(*Export, string) error {
	return func(e *Export, value string) error {
		v, err := parse(value)
		if err == nil {
			*field(e) = append(*field(e), v)
		}
		return err
	}
}

func choice[T any](values map[string]T, field func(*Export) *T) func(*Export, string) error {
	return func(e *Export, value string) error {
		v, ok := values[value]
		if !ok {
			return fmt.Errorf("%q is none of %s", value, strings.Join(slices.Sorted(maps.Keys(values)), ", "))
		}
		*field(e) = v
		return nil
	}
}

func count(field func(*Export) *int) func(*Export, string) error {
	return func(e *Export, value string) error {
		n, err := strconv.ParseUint(value, 10, 31)
		if err != nil || n == 0 {
			return fmt.Errorf("%q is not a number above 0", value)
		}
		*field(e) = int(n)
		return nil
	}
}
