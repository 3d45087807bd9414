// SPDX-License-Identifier: Apache-2.0

package sd

import (
	"os"
	"strings"
	"sync"

	"github.com/coreos/go-systemd/v22/activation"
	"github.com/coreos/go-systemd/v22/daemon"

	"transfused.org/transfused/service/transport"
)

// Listeners returns the listening sockets that this process was started with (sd_listen_fds(3)), vsock and Unix, in their
// order; none if it was not started so. It is called once. One that is no listening stream socket is an error that
// names it, and then none is left open.
func Listeners() ([]*transport.Listener, error) {
	var ls []*transport.Listener
	var failed error
	for _, f := range activation.Files(true) {
		l, err := transport.FromFile(f)
		if err != nil {
			failed = err
			continue
		}
		ls = append(ls, l)
	}
	if failed != nil {
		for _, l := range ls {
			l.Close()
		}
		return nil, failed
	}
	return ls, nil
}

// Ready tells that the service serves.
func Ready() { notify(daemon.SdNotifyReady) }

// Stopping tells that the service has begun to end.
func Stopping() { notify(daemon.SdNotifyStopping) }

var (
	status = make(chan string, 1)
	teller sync.Once
)

// Status tells how the service does, in a line for people: what systemctl status shows. It does not wait; of what is told
// faster than it is heard the latest is.
func Status(text string) {
	teller.Do(func() {
		go func() {
			for text := range status {
				// A newline would begin another assignment.
				notify("STATUS=" + strings.ReplaceAll(text, "\n", " "))
			}
		}()
	})
	for {
		select {
		case status <- text:
			return
		default:
		}
		select {
		case <-status:
		default:
		}
	}
}

func notify(state string) {
	if os.Getenv("NOTIFY_SOCKET") == "" {
		return
	}
	// Whoever started this may not listen any more: that is its business.
	_, _ = daemon.SdNotify(false, state)
}
