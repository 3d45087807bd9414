// SPDX-License-Identifier: Apache-2.0

package config

import (
	"bytes"
	"fmt"
	"io"
	"os"

	"transfused.org/transfused/service/wire"
)

// minToken is the shortest token that is worth the name, in bytes.
const minToken = 16

// Token reads the token of a file that nobody but its owner may read, less the end of its line.
func Token(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("token file: %w", Reason(err))
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return nil, fmt.Errorf("token file: %w", err)
	}
	if fi.Mode().Perm()&0o077 != 0 {
		return nil, fmt.Errorf("token file %s: others may read it (mode %04o): chmod 600 it and make a new token", path, fi.Mode().Perm())
	}
	return token(f)
}

// CredentialToken reads the token that the program ("transfused", "transfuse-host") was handed as a credential of systemd,
// PROGRAM.token; nil if there is none. Root is that of ReadAll.
func CredentialToken(root, program string) ([]byte, error) {
	path, err := credential(root, program+".token")
	if path == "" || err != nil {
		return nil, err
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("token file: %w", Reason(err))
	}
	defer f.Close()
	// Not its mode: systemd lets a service's user in by an ACL, whose mask stands there, and guards the directory.
	return token(f)
}

func token(f *os.File) ([]byte, error) {
	b, err := io.ReadAll(io.LimitReader(f, wire.MaxToken+3)) // with the end of its line, it is too long by one
	if err != nil {
		return nil, fmt.Errorf("token file: %w", Reason(err))
	}
	token := bytes.TrimRight(b, "\r\n")
	if len(token) < minToken || len(token) > wire.MaxToken {
		return nil, fmt.Errorf("token file %s: the token has %d bytes: it must have %d to %d; make one by: openssl rand -hex 32", f.Name(), len(token), minToken, wire.MaxToken)
	}
	return token, nil
}
