// SPDX-License-Identifier: Apache-2.0

package vmtest

import (
	"bytes"
	"context"
	"encoding/base64"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"time"

	"transfused.org/transfused/service/transport"
)

// Dial connects to a vsock port of the guest.
func (vm *VM) Dial(ctx context.Context, port uint32) (*transport.Conn, error) {
	return transport.Dial(ctx, transport.Addr{Family: transport.Hybrid, Path: vm.Socket(), Port: port})
}

// Run runs a bash script as the guest's root, with -eu and pipefail, and returns what it wrote to its output and
// its standard error. The error tells a status other than 0. What the script leaves
// running in the background is killed when it ends; use systemd-run for daemons.
func (vm *VM) Run(ctx context.Context, script string) (string, error) {
	// The script goes in as one word, so that its commands cannot read the rest of it as their input.
	// It ends in the guest too when ctx does: a closed connection would not end it.
	limit := ""
	if d, ok := ctx.Deadline(); ok {
		limit = fmt.Sprintf("timeout -s KILL %.1f", max(0.1, time.Until(d).Seconds()))
	}
	line := fmt.Sprintf(`%s bash -euo pipefail -c "$(base64 -d <<<%s)" </dev/null; printf '\0%%d' $?; exit`+"\n",
		limit, base64.StdEncoding.EncodeToString([]byte(script)))
	return vm.shell(ctx, strings.NewReader(line))
}

// Push copies a file of this machine into the guest, mode 0755.
func (vm *VM) Push(ctx context.Context, file, guestFile string) error {
	f, err := os.Open(file)
	if err != nil {
		return err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	// bash reads its script byte by byte from a stream, so what follows the line is left for head.
	line := fmt.Sprintf("install -D -m 755 <(head -c %d) %s; printf '\\0%%d' $?; exit\n", info.Size(), Quote(guestFile))
	if _, err := vm.shell(ctx, io.MultiReader(strings.NewReader(line), f)); err != nil {
		return fmt.Errorf("push %s: %w", guestFile, err)
	}
	return nil
}

// shell feeds a shell of the guest and takes its output, which ends with NUL and the status.
func (vm *VM) shell(ctx context.Context, in io.Reader) (string, error) {
	c, err := vm.Dial(ctx, shellPort)
	if err != nil {
		return "", fmt.Errorf("shell: %w", err)
	}
	defer c.Close()
	defer context.AfterFunc(ctx, func() { c.SetDeadline(time.Unix(1, 0)) })()
	if _, err := io.Copy(c, in); err != nil {
		return "", fmt.Errorf("shell: %w", err)
	}
	all, err := io.ReadAll(c)
	out, status, found := bytes.Cut(all, []byte{0})
	if i := bytes.LastIndexByte(all, 0); found {
		out, status = all[:i], all[i+1:]
	}
	if ctx.Err() != nil {
		err = ctx.Err()
	}
	if code, atoi := strconv.Atoi(string(status)); err == nil && (atoi != nil || code != 0) {
		err = fmt.Errorf("status %q", status)
	}
	if err != nil {
		return string(out), fmt.Errorf("shell: %w; output:\n%s", err, lastLines(out, 40))
	}
	return string(out), nil
}

// Quote makes one word of a shell script of s.
func Quote(s string) string { return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'" }
