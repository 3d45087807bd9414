// SPDX-License-Identifier: Apache-2.0

package wire

import (
	"bytes"
	"crypto/hmac"
	"crypto/sha256"
	"errors"
	"fmt"
	"strings"
)

// The first byte of a connection that the host dials says what it is.
const (
	SubMount  = 'm' // a mount of version 1
	SubEvents = 'e' // events of version 1
	SubProof  = 't' // a nonce to answer; one of the others follows
)

// NonceLen is the length of what follows SubProof.
const NonceLen = 32

// Proof is a guest's answer to the nonce of a host that wants to know whether
// the listener it reached has the token. Compare it with hmac.Equal.
func Proof(token, nonce []byte) [32]byte {
	h := hmac.New(sha256.New, token)
	h.Write([]byte("transfuse guest\x00"))
	h.Write(nonce)
	return [32]byte(h.Sum(nil))
}

// ErrIncomplete says that the mount arguments have no mount point yet: the rest
// may be on its way.
var ErrIncomplete = errors.New("no mount point, an absolute path, at the end of the mount arguments")

// MountArgs returns the arguments of fusermount that mount at dir with options.
func MountArgs(options []string, dir string) []string {
	if len(options) == 0 {
		return []string{dir}
	}
	escaped := make([]string, len(options))
	for i, o := range options {
		escaped[i] = strings.NewReplacer(`\`, `\\`, `,`, `\,`).Replace(o)
	}
	return []string{"-o", strings.Join(escaped, ","), dir}
}

// AppendMountArgs appends args as they go over an 'm' connection, in one write:
// with a NUL between them and no end.
func AppendMountArgs(b []byte, args []string) ([]byte, error) {
	s := strings.Join(args, "\x00")
	if len(s) > MaxMountArgs {
		return b, fmt.Errorf("%w: mount arguments of %d bytes, at most %d", ErrProtocol, len(s), MaxMountArgs)
	}
	if strings.Count(s, "\x00") != max(0, len(args)-1) {
		return b, fmt.Errorf("%w: mount arguments %q hold a NUL", ErrProtocol, args)
	}
	return append(b, s...), nil
}

// ParseMountArgs takes arguments of fusermount apart. The options of all -o are
// split at their commas (but not at `\,`) and unescaped. A flag other than -o
// is refused: fusermount would unmount, or worse. The error is ErrIncomplete
// where b may be the beginning of what the host sent.
func ParseMountArgs(b []byte) (options []string, dir string, err error) {
	if len(b) > MaxMountArgs {
		return nil, "", fmt.Errorf("%w: mount arguments of %d bytes, at most %d", ErrProtocol, len(b), MaxMountArgs)
	}
	args := bytes.Split(b, []byte{0})
	for len(args) > 1 {
		arg := string(args[0])
		value, isOption := strings.CutPrefix(arg, "-o")
		switch {
		case isOption && value != "":
			args = args[1:]
		case isOption && len(args) > 2:
			value, args = string(args[1]), args[2:]
		case isOption:
			return nil, "", ErrIncomplete
		case arg == "--" && len(args) == 2:
			args = args[1:]
			continue
		default:
			return nil, "", fmt.Errorf("%w: mount argument %q, only -o and a mount point are expected", ErrProtocol, clip(arg))
		}
		options = append(options, splitOptions(value)...)
	}
	dir = string(args[0])
	if !strings.HasPrefix(dir, "/") {
		return nil, "", ErrIncomplete
	}
	return options, dir, nil
}

// splitOptions reads options as fusermount does: a backslash takes the meaning
// from what follows it. Empty options are dropped.
func splitOptions(s string) (options []string) {
	var o []byte
	flush := func() {
		if len(o) > 0 {
			options = append(options, string(o))
		}
		o = o[:0]
	}
	for i := 0; i < len(s); i++ {
		switch {
		case s[i] == ',':
			flush()
			continue
		case s[i] == '\\' && i+1 < len(s):
			i++
		}
		o = append(o, s[i])
	}
	flush()
	return options
}
