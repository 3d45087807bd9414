// SPDX-License-Identifier: Apache-2.0

package sd

import (
	"fmt"
	"os"
	"regexp"
	"strings"
	"sync"

	"github.com/coreos/go-systemd/v22/activation"
	"github.com/coreos/go-systemd/v22/daemon"

	"transfused.org/transfused/service/transport"
)

// Passed descriptors are told apart by their names (FileDescriptorName=, FDNAME=).

// Names of sockets. One with another name is for peers of the address family that it has.
const (
	// ControlName is the name of the control socket.
	ControlName = "control"
	// HybridName is the name of a Unix socket at the path PATH_PORT where a VMM with hybrid vsock connects.
	HybridName = "hybrid"
)

// storedName has the names of what a program itself put into its store: ID.STREAM of a mount.
var storedName = regexp.MustCompile(`^[0-9]+\.[0-9]+$`)

// Passed is what this process was started with (sd_listen_fds(3)). Who takes it owns everything in it.
type Passed struct {
	Listeners []*transport.Listener // vsock and Unix sockets for peers, in their order
	Control   *transport.Listener   // nil: none
	Stored    []Stored              // from the store
}

// Stored are the descriptors that were put into the store under one name.
type Stored struct {
	Name  string
	Files []*os.File
}

// Close closes everything in p.
func (p *Passed) Close() {
	for _, l := range p.Listeners {
		l.Close()
	}
	if p.Control != nil {
		p.Control.Close()
	}
	for _, s := range p.Stored {
		for _, f := range s.Files {
			f.Close()
		}
	}
}

// Take takes what this process was started with; nothing if it was not started so. It is called once, before anything is started. A
// socket that is no listening stream socket is left out, and an error names it: what else was passed can be served all the same.
func Take() (p *Passed, errs []error) {
	p = &Passed{}
	for _, f := range activation.Files(true) {
		switch {
		case storedName.MatchString(f.Name()):
			p.add(f.Name(), f)
		case f.Name() == ControlName:
			if err := p.takeControl(f); err != nil {
				errs = append(errs, err)
			}
		default:
			from := transport.FromFile
			if f.Name() == HybridName {
				from = transport.HybridFromFile
			}
			l, err := from(f)
			if err != nil {
				errs = append(errs, err)
				continue
			}
			p.Listeners = append(p.Listeners, l)
		}
	}
	return p, errs
}

func (p *Passed) takeControl(f *os.File) error {
	l, err := transport.FromFile(f)
	switch {
	case err != nil:
		return err
	case p.Control != nil:
		l.Close()
		return fmt.Errorf("inherited socket %s: there are two: only one unit may have FileDescriptorName=%[1]s", ControlName)
	case l.Addr().Family != transport.Unix:
		l.Close()
		return fmt.Errorf("inherited socket %s: it is no Unix socket but %s: use ListenStream=/PATH in its unit", ControlName, l.Addr())
	}
	p.Control = l
	return nil
}

func (p *Passed) add(name string, f *os.File) {
	for i := range p.Stored {
		if p.Stored[i].Name == name {
			p.Stored[i].Files = append(p.Stored[i].Files, f)
			return
		}
	}
	p.Stored = append(p.Stored, Stored{name, []*os.File{f}})
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
				notify("STATUS=" + oneLine(text))
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

// oneLine keeps text from beginning another assignment.
func oneLine(text string) string { return strings.ReplaceAll(text, "\n", " ") }

func notify(state string) {
	if os.Getenv("NOTIFY_SOCKET") == "" {
		return
	}
	// Whoever started this may not listen any more: that is its business.
	_, _ = daemon.SdNotify(false, state)
}
