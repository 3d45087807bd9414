// SPDX-License-Identifier: Apache-2.0

package sd

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"strconv"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"transfused.org/transfused/service/watchdog"
)

// Reloading tells that the configuration is being read again; Ready tells that this is over.
func Reloading() {
	var ts unix.Timespec
	_ = unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts) // it can't fail: the clock exists and ts is ours
	notify(fmt.Sprintf("RELOADING=1\nMONOTONIC_USEC=%d", ts.Nano()/1000))
}

// Failed tells why the service ends.
func Failed(err error) {
	state := "STATUS=" + oneLine(err.Error())
	var errno syscall.Errno
	if errors.As(err, &errno) {
		state += "\nERRNO=" + strconv.Itoa(int(errno))
	}
	notify(state)
}

// Watch feeds the service manager's watchdog, if there is one, while no loop that w looks at is stuck, until ctx ends.
func Watch(ctx context.Context, w *watchdog.Watchdog, log *slog.Logger) {
	timeout, err := watchdogTime()
	if err != nil {
		log.Error("the watchdog is not fed", "error", err)
	}
	if timeout == 0 {
		return
	}
	w.Run(ctx, timeout, func() { notify("WATCHDOG=1") }, func(text string) {
		log.Error("a loop stands still: the watchdog is not fed", "loop", text)
	})
}

// watchdogTime is after how long without a sign this process is ended; 0: it is not watched. A value in the environment that
// makes no sense is an error, and then it is not watched.
func watchdogTime() (time.Duration, error) {
	text := os.Getenv("WATCHDOG_USEC")
	if text == "" {
		return 0, nil
	}
	if pid := os.Getenv("WATCHDOG_PID"); pid != "" && pid != strconv.Itoa(os.Getpid()) {
		return 0, nil // of another process
	}
	usec, err := strconv.ParseInt(text, 10, 64)
	if err != nil || usec <= 0 || usec > int64(1<<62/time.Microsecond) {
		return 0, fmt.Errorf("WATCHDOG_USEC=%q in the environment is no time in µs: correct WatchdogSec= in the unit", text)
	}
	return time.Duration(usec) * time.Microsecond, nil
}
