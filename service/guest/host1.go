// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"crypto/sha256"
	"encoding/hex"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"transfused.org/transfused/service/transport"
)

// host1 remembers until the next boot that a host speaks version 1: another long Init might kill it.
type host1 struct {
	seen atomic.Bool
	path string // empty: remembered by this process alone
	boot string
}

func newHost1(dir string, server transport.Addr, boot [16]byte) *host1 {
	h := &host1{boot: hex.EncodeToString(boot[:])}
	if dir == "" {
		return h
	}
	// An address may hold what a file name can't.
	sum := sha256.Sum256([]byte(server.String()))
	h.path = filepath.Join(dir, "host-v1-"+hex.EncodeToString(sum[:8]))
	if b, err := os.ReadFile(h.path); err == nil && strings.TrimSpace(string(b)) == h.boot {
		h.seen.Store(true)
	}
	return h
}

func (h *host1) known() bool { return h.seen.Load() }

func (h *host1) remember(log *slog.Logger) {
	h.seen.Store(true)
	if h.path == "" {
		return
	}
	err := os.MkdirAll(filepath.Dir(h.path), 0o755)
	if err == nil {
		err = os.WriteFile(h.path, []byte(h.boot+"\n"), 0o644)
	}
	if err != nil {
		log.Debug("the host's version is remembered by this process alone", "error", err)
	}
}

// bootID names this boot; all zeros where the kernel does not tell.
func bootID() (id [16]byte) {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return id
	}
	if raw, err := hex.DecodeString(strings.ReplaceAll(strings.TrimSpace(string(b)), "-", "")); err == nil {
		copy(id[:], raw)
	}
	return id
}

func kernelRelease() string {
	var u unix.Utsname
	if unix.Uname(&u) != nil {
		return ""
	}
	return unix.ByteSliceToString(u.Release[:])
}
