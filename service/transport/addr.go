// SPDX-License-Identifier: Apache-2.0

package transport

import (
	"fmt"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"

	"golang.org/x/sys/unix"
)

// Family is the kind of an address.
type Family int

const (
	Vsock  Family = iota + 1 // vsock:CID:PORT
	Hybrid                   // hybrid:PATH:PORT
	Unix                     // unix:PATH
)

// Context ids with a meaning of their own, from linux/vm_sockets.h.
const (
	CIDLocal = unix.VMADDR_CID_LOCAL // this machine (module vsock_loopback)
	CIDHost  = unix.VMADDR_CID_HOST  // the host of this machine
	CIDAny   = unix.VMADDR_CID_ANY   // every CID of this machine; to listen on
)

// maxPath is what sun_path of sockaddr_un holds beside its NUL, unix(7).
const maxPath = 107

// Addr is an address to dial or to listen on. It is comparable; the zero
// Addr is no address.
type Addr struct {
	Family Family
	CID    uint32 // Vsock
	Port   uint32 // Vsock, Hybrid; 0 to listen on a port that the kernel chooses (Vsock)
	Path   string // Hybrid (the VMM's socket), Unix
}

// Parse reads an address in one of the forms
//
//	vsock:CID:PORT    CID is a number, host, any or local
//	hybrid:PATH:PORT  PATH is the VMM's socket
//	unix:PATH
//	v:CID:PORT        version 1's form of vsock; CID is a number, or _ for any
//
// Paths are absolute, of at most 107 bytes, valid UTF-8 without control
// characters.
func Parse(s string) (Addr, error) {
	a, err := parse(s)
	if err != nil {
		return Addr{}, fmt.Errorf("address %q: %w", s, err)
	}
	return a, nil
}

func parse(s string) (a Addr, err error) {
	form, rest, _ := strings.Cut(s, ":")
	switch form {
	case "vsock", "v":
		cid, port, ok := strings.Cut(rest, ":")
		if !ok {
			return a, fmt.Errorf("no port; write %s:CID:PORT", form)
		}
		a.Family = Vsock
		if a.CID, err = parseCID(form, cid); err != nil {
			return a, err
		}
		a.Port, err = parsePort(port)
		return a, err
	case "hybrid":
		colon := strings.LastIndexByte(rest, ':')
		if colon < 0 {
			return a, fmt.Errorf("no port; write hybrid:/path/to/v.sock:PORT")
		}
		a.Family, a.Path = Hybrid, rest[:colon]
		if a.Port, err = parsePort(rest[colon+1:]); err != nil {
			return a, err
		}
		return a, checkPath(a.Path)
	case "unix":
		a.Family, a.Path = Unix, rest
		return a, checkPath(a.Path)
	}
	return a, fmt.Errorf("unknown form; write vsock:CID:PORT, hybrid:/path/to/v.sock:PORT or unix:/path")
}

func parseCID(form, s string) (uint32, error) {
	if form == "v" {
		if s == "_" {
			return CIDAny, nil
		}
	} else {
		switch s {
		case "host":
			return CIDHost, nil
		case "any":
			return CIDAny, nil
		case "local":
			return CIDLocal, nil
		}
	}
	n, err := strconv.ParseUint(s, 10, 32)
	if err != nil {
		if form == "v" {
			return 0, fmt.Errorf("CID %q must be 0 to 4294967295, or _ for any", s)
		}
		return 0, fmt.Errorf("CID %q must be 0 to 4294967295, host, any or local", s)
	}
	return uint32(n), nil
}

func parsePort(s string) (uint32, error) {
	n, err := strconv.ParseUint(s, 10, 32)
	if err != nil {
		return 0, fmt.Errorf("port %q must be 0 to 4294967295", s)
	}
	return uint32(n), nil
}

func checkPath(path string) error {
	switch {
	case !strings.HasPrefix(path, "/"):
		return fmt.Errorf("path %q must be absolute; begin it with /", path)
	case len(path) > maxPath:
		return fmt.Errorf("path has %d bytes, a socket's has at most %d; choose a shorter one", len(path), maxPath)
	case !utf8.ValidString(path) || strings.ContainsFunc(path, unicode.IsControl):
		return fmt.Errorf("path must be UTF-8 without control characters")
	}
	return nil
}

// String returns the canonical form, which Parse reads as the same address,
// or "" for no address.
func (a Addr) String() string {
	switch a.Family {
	case Vsock:
		return fmt.Sprintf("vsock:%s:%d", cidString(a.CID), a.Port)
	case Hybrid:
		return fmt.Sprintf("hybrid:%s:%d", a.Path, a.Port)
	case Unix:
		return "unix:" + a.Path
	}
	return ""
}

func cidString(cid uint32) string {
	switch cid {
	case CIDHost:
		return "host"
	case CIDAny:
		return "any"
	case CIDLocal:
		return "local"
	}
	return strconv.FormatUint(uint64(cid), 10)
}

// MarshalText returns the canonical form; that of no address is empty.
func (a Addr) MarshalText() ([]byte, error) { return []byte(a.String()), nil }

// UnmarshalText reads what Parse reads, and the empty text as no address.
func (a *Addr) UnmarshalText(text []byte) (err error) {
	if len(text) == 0 {
		*a = Addr{}
		return nil
	}
	*a, err = Parse(string(text))
	return err
}

// socketPath is the Unix socket on which a Hybrid or Unix address is listened
// on.
func (a Addr) socketPath() string {
	if a.Family == Hybrid {
		return a.Path + "_" + strconv.FormatUint(uint64(a.Port), 10)
	}
	return a.Path
}
