// SPDX-License-Identifier: Apache-2.0

//go:build !amd64

package host

import seccomp "github.com/elastic/go-seccomp-bpf"

// legacyGroup is empty where there are no old system calls.
func legacyGroup() []seccomp.SyscallGroup { return nil }
