// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"

	"golang.org/x/sys/unix"

	"transfused.org/transfused/service/ipc"
)

// helper is the daemon's end of the helper process. Any goroutine may call it.
type helper struct {
	proc *ipc.Process
	pong func()
	log  func(string)
	done chan struct{} // closed when the helper has ended

	mu    sync.Mutex // guards the rest
	last  uint64
	calls map[uint64]chan answer // nil when the helper has ended
}

type answer struct {
	report
	file *os.File // the device of opMount
	more *os.File // and the mount, if it is nowhere
}

// helperError is a failure that the helper reported: its words, and its errno for a peer.
type helperError struct {
	text  string
	errno unix.Errno
}

func (e *helperError) Error() string { return e.text }
func (e *helperError) Unwrap() error { return e.errno }

var errHelperEnded = errors.New("the helper process has ended")

// startHelper starts the helper process. Its owner calls end.
func startHelper(roots []string, fusermount string, log func(string), pong func()) (*helper, error) {
	proc, err := ipc.Start(HelperRole, nil)
	if err != nil {
		return nil, err
	}
	h := &helper{proc: proc, log: log, pong: pong, done: make(chan struct{}), calls: make(map[uint64]chan answer)}
	go h.receive()
	if err := proc.Send(call{Op: opSetup, Roots: roots, Fusermount: fusermount}); err != nil {
		h.end()
		return nil, fmt.Errorf("start %s: %w", HelperRole, err)
	}
	return h, nil
}

// end ends the helper and waits for it.
func (h *helper) end() {
	h.proc.Close()
	<-h.done
}

func (h *helper) receive() {
	defer close(h.done)
	for {
		var r report
		files, err := h.proc.Recv(&r)
		if err != nil {
			break
		}
		switch {
		case r.Log != "":
			h.log(r.Log)
		case r.Pong:
			h.pong()
		}
		a := answer{report: r}
		for i, f := range files {
			switch i {
			case 0:
				a.file = f
			case 1:
				a.more = f
			default:
				f.Close()
			}
		}
		h.mu.Lock()
		waiting := h.calls[r.ID]
		delete(h.calls, r.ID)
		h.mu.Unlock()
		if waiting != nil {
			waiting <- a // has room for one
		} else {
			h.drop(a) // who asked has given up
		}
	}
	h.mu.Lock()
	for _, waiting := range h.calls {
		close(waiting)
	}
	h.calls = nil
	h.mu.Unlock()
	h.proc.Close()
	// How it ended is in its own last words on standard error.
	_ = h.proc.Wait()
}

// call asks the helper and waits for the answer, or until ctx ends. The files of the answer are the caller's, and files stay his.
func (h *helper) call(ctx context.Context, q call, files ...*os.File) (answer, error) {
	id, waiting, err := h.start(q, files...)
	if err != nil {
		return answer{}, err
	}
	return h.wait(ctx, q.Op, id, waiting)
}

// start asks the helper; wait is for the answer. Files are duplicated, the caller keeps its own.
func (h *helper) start(q call, files ...*os.File) (id uint64, answers chan answer, err error) {
	waiting := make(chan answer, 1)
	h.mu.Lock()
	if h.calls == nil {
		h.mu.Unlock()
		return 0, nil, errHelperEnded
	}
	h.last++
	q.ID = h.last
	h.calls[q.ID] = waiting
	h.mu.Unlock()
	if err := h.proc.Send(q, files...); err != nil {
		h.forget(q.ID, waiting)
		return 0, nil, fmt.Errorf("%w: %w", errHelperEnded, err)
	}
	return q.ID, waiting, nil
}

func (h *helper) wait(ctx context.Context, op string, id uint64, waiting chan answer) (answer, error) {
	select {
	case a, ok := <-waiting:
		switch {
		case !ok:
			return answer{}, errHelperEnded
		case a.Error != "":
			return a, &helperError{a.Error, a.Errno}
		}
		return a, nil
	case <-ctx.Done():
		h.forget(id, waiting)
		return answer{}, fmt.Errorf("%s: %w", op, context.Cause(ctx))
	}
}

// forget gives a call up; its answer is dropped, whenever it comes.
func (h *helper) forget(id uint64, waiting chan answer) {
	h.mu.Lock()
	_, there := h.calls[id]
	delete(h.calls, id)
	h.mu.Unlock()
	if !there {
		h.drop(<-waiting) // it was answered meanwhile, or the helper has ended
	}
}

// drop undoes what an answer that nobody takes tells of: a mount, which would stay with nobody to serve it.
func (h *helper) drop(a answer) {
	if a.file == nil {
		return
	}
	a.file.Close()
	if a.more != nil {
		a.more.Close()
	}
	// An error means that the helper ends, which detaches its mounts.
	_ = h.proc.Send(call{Op: opForget, Key: a.Key, Force: true})
}
