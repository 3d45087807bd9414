// SPDX-License-Identifier: Apache-2.0

package api

import (
	"errors"
	"fmt"
	"syscall"
)

// Kind says what kind of failure an Error is. It is the last part of the name that the carriers give it.
type Kind string

// Kinds of failures.
const (
	Invalid     Kind = "Invalid"     // what was asked is not well-formed
	NotFound    Kind = "NotFound"    // there is no such mount
	Exists      Kind = "Exists"      // something is mounted there already
	Busy        Kind = "Busy"        // it is in use
	Refused     Kind = "Refused"     // by the host
	Denied      Kind = "Denied"      // the caller has not the right
	Unreachable Kind = "Unreachable" // the host is not there
	Unsupported Kind = "Unsupported" // this host, kernel or configuration can't
	Internal    Kind = "Internal"    // anything else
)

// Error is a failure as an administrator meets it.
type Error struct {
	Kind  Kind
	Errno syscall.Errno // 0 where there is none
	Text  string        // names the thing, the reason and the mend
}

func (e *Error) Error() string { return e.Text }

func (e *Error) Unwrap() error {
	if e.Errno == 0 {
		return nil
	}
	return e.Errno
}

// Errorf makes an Error. Its errno is that of an error among args.
func Errorf(k Kind, format string, args ...any) *Error {
	e := &Error{Kind: k, Text: fmt.Errorf(format, args...).Error()}
	for _, a := range args {
		if err, ok := a.(error); ok && errors.As(err, &e.Errno) {
			break
		}
	}
	return e
}

// AsError returns err as an *Error: itself where it is one, else one of kind Internal.
func AsError(err error) *Error {
	var e *Error
	if errors.As(err, &e) {
		return e
	}
	return Errorf(Internal, "%w", err)
}
