// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// tracing is where the kernel tells of each request of FUSE, from Linux 6.12 on. FORGETs are none.
const tracing = "/sys/kernel/tracing"

// traced is how often each request was asked on one mount.
type traced map[string]float64

// messages adds what was asked on the mount at dir since it was called before. All of it goes to the host.
func (t *traced) messages(dir string) (m messages, err error) {
	var st unix.Stat_t
	if err := unix.Stat(dir, &st); err != nil { // before what is counted
		return m, &os.PathError{Op: "stat", Path: dir, Err: err}
	}
	text := []byte{}
	if *t == nil {
		*t = traced{}
		for _, f := range [][2]string{{"buffer_size_kb", "32768"}, {"events/fuse/fuse_request_send/enable", "1"}} {
			if err := os.WriteFile(filepath.Join(tracing, f[0]), []byte(f[1]), 0); err != nil {
				return m, fmt.Errorf("have the kernel trace: %w", err)
			}
		}
	} else if text, err = os.ReadFile(filepath.Join(tracing, "trace")); err != nil {
		return m, err
	}
	if err := os.WriteFile(filepath.Join(tracing, "trace"), nil, 0); err != nil { // forgets them
		return m, err
	}
	t.add(string(text), unix.Minor(st.Dev))
	m.Asked = maps.Clone(*t)
	for _, n := range m.Asked {
		m.Sent += n
	}
	return m, nil
}

// add adds what the trace tells of one connection, which has the number of its mount's device.
func (t traced) add(trace string, connection uint32) {
	for line := range strings.Lines(trace) {
		// Program, CPU and time, and: fuse_request_send: connection 45 req 4 opcode 1 (FUSE_LOOKUP) len 49
		var c uint32
		var unique, opcode uint64
		var name string
		_, line, _ = strings.Cut(line, " fuse_request_send: ")
		if n, _ := fmt.Sscanf(line, "connection %d req %d opcode %d (FUSE_%s", &c, &unique, &opcode, &name); n == 4 && c == connection {
			t[strings.TrimSuffix(name, ")")]++
		}
	}
}
