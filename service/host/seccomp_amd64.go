// SPDX-License-Identifier: Apache-2.0

package host

import seccomp "github.com/elastic/go-seccomp-bpf"

// legacyGroup allows what exists on amd64 alone and what the runtime, or the
// C library beside the race detector, uses there.
func legacyGroup() []seccomp.SyscallGroup {
	return []seccomp.SyscallGroup{{
		Action: seccomp.ActionAllow,
		Names:  []string{"arch_prctl", "epoll_wait", "poll", "time"},
	}}
}
