// SPDX-License-Identifier: Apache-2.0

package host

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"transfused.org/transfused/service/ipc"
	"transfused.org/transfused/service/passthrough"
	"transfused.org/transfused/service/transport"
)

const (
	// orderTime bounds an order. A worker that takes longer is broken.
	orderTime = 20 * time.Second
	// endTime is what a worker has to end by itself.
	endTime = 3 * time.Second
)

// workerProc is the parent's side of a worker. What it reports is not
// believed further than its own session goes.
type workerProc struct {
	proc  *ipc.Process
	log   *slog.Logger
	limit *limiter

	events workerEvents
	member *member // of the hub

	done chan struct{} // closed after died

	mu      sync.Mutex // guards the rest
	next    uint64
	waiting map[uint64]chan report
	closing bool
}

// workerEvents are called by the goroutine that reads a worker's reports.
type workerEvents struct {
	ended   func(id uint32, text string)                // a mount
	lost    func(id uint32, number uint64, text string) // the streams of a mount that is kept
	counted func(counts)                                // what mounts have served
	limited func(text string)                           // not all directories can be watched
	died    func(error)                                 // once, at the end: with nil when close asked for it
}

// startWorker starts a worker and has it confine itself.
func startWorker(c confinement, h *hub, log *slog.Logger, events workerEvents) (*workerProc, error) {
	p, err := ipc.Start(RoleWorker, workerAttr())
	if err != nil {
		return nil, err
	}
	w := &workerProc{
		proc: p, log: log.With("worker", p.Pid()), limit: newLimiter(50, 5), events: events,
		done: make(chan struct{}), waiting: map[uint64]chan report{},
	}
	go w.read()
	r, err := w.order(order{Start: &c})
	if err != nil {
		w.close()
		return nil, fmt.Errorf("confine the worker: %w", err)
	}
	for _, text := range r.Warnings {
		w.log.Warn("worker is less confined than it should be", "reason", quote(text))
	}
	member, files, err := h.join(p.Pid())
	if err == nil {
		_, err = w.order(order{Changes: true}, files...)
		for _, f := range files {
			f.Close()
		}
		w.mu.Lock()
		gone := w.waiting == nil
		w.member = member
		w.mu.Unlock()
		if gone {
			member.leave()
		}
	}
	if err != nil {
		w.close()
		return nil, fmt.Errorf("join the worker to what changes: %w", err)
	}
	return w, nil
}

// read takes the worker's reports until its end. It is the owner of the
// process.
func (w *workerProc) read() {
	defer close(w.done)
	for {
		var r report
		files, err := w.proc.Recv(&r)
		for _, f := range files {
			f.Close() // a worker has nothing to give
		}
		if err != nil {
			break // also when it sends rubbish: then it is killed below
		}
		switch {
		case r.ID != 0:
			w.mu.Lock()
			ch := w.waiting[r.ID]
			delete(w.waiting, r.ID)
			w.mu.Unlock()
			if ch != nil {
				ch <- r
			}
		case r.Ended != nil:
			w.events.counted(r.Counts)
			w.events.ended(r.Ended.MountID, r.Ended.Text)
		case r.Lost != nil:
			w.events.lost(r.Lost.MountID, r.Lost.Number, r.Lost.Text)
		case r.Limited != "":
			w.events.limited(quote(r.Limited))
		case r.Log != nil:
			if ok, dropped := w.limit.allow(time.Now()); ok {
				w.log.Log(context.Background(), min(r.Log.Level, slog.LevelError), quote(r.Log.Text), droppedAttr(dropped)...)
			}
		}
	}
	w.mu.Lock()
	asked := w.closing
	w.mu.Unlock()
	timer := time.AfterFunc(endTime, func() { w.proc.Kill() })
	if !asked {
		// Its end of the connection is gone, and so must it be.
		w.proc.Close()
		timer.Reset(100 * time.Millisecond)
	}
	err := w.proc.Wait()
	timer.Stop()
	w.mu.Lock()
	for id, ch := range w.waiting {
		delete(w.waiting, id)
		close(ch)
	}
	w.waiting = nil
	member := w.member
	w.mu.Unlock()
	if member != nil {
		member.leave()
	}
	if asked {
		err = nil
	} else if err == nil {
		err = errors.New("ended by itself")
	}
	w.events.died(err)
}

// order has the worker do o, and waits for its answer. The files stay the
// caller's.
func (w *workerProc) order(o order, files ...*os.File) (report, error) {
	return w.orderWithin(orderTime, o, files...)
}

// orderWithin is order with a bound of its own.
func (w *workerProc) orderWithin(d time.Duration, o order, files ...*os.File) (report, error) {
	ch := make(chan report, 1)
	w.mu.Lock()
	if w.waiting == nil {
		w.mu.Unlock()
		return report{}, errWorkerGone
	}
	w.next++
	o.ID = w.next
	w.waiting[o.ID] = ch
	w.mu.Unlock()
	// A worker that reads no orders would block Send: it is killed then, too.
	timer := time.AfterFunc(d, func() { w.proc.Kill() })
	defer timer.Stop()
	if err := w.proc.Send(o, files...); err != nil {
		if errors.Is(err, unix.EPIPE) || errors.Is(err, os.ErrClosed) {
			err = errWorkerGone
		}
		return report{}, err
	}
	r, ok := <-ch
	if !ok {
		return report{}, errWorkerGone
	}
	if r.Errno != 0 || r.Text != "" {
		return r, &workerError{r.Errno, r.Text}
	}
	return r, nil
}

var errWorkerGone = fmt.Errorf("the worker has ended: %w", unix.EIO)

// workerError is what a worker answered.
type workerError struct {
	errno unix.Errno
	text  string
}

func (e *workerError) Error() string { return e.text }
func (e *workerError) Unwrap() error { return e.errno }

// mount adds a mount, and tells how changes of it on the host are seen: "" where nobody asks.
func (w *workerProc) mount(m mountOrder, e *Export) (noFlush bool, watched string, err error) {
	root, err := openExport(e)
	if err != nil {
		return false, "", err
	}
	defer root.Close()
	m.Tag, m.Options = e.Tag, e.Options
	coherent := e.Cache == passthrough.CacheCoherent
	var why error
	if coherent {
		m.Watched, why = w.member.mounted(m.MountID, e.Dir, root)
	}
	r, err := w.order(order{Mount: &m}, root)
	if err != nil {
		w.member.unmounted(m.MountID)
		return false, "", err
	}
	switch {
	case !coherent:
	case m.Watched:
		watched = byFanotify
		w.log.Info("changes on the host are pushed to the guest", "tag", e.Tag, "watched", watched)
	case r.Blind == "":
		watched = byInotify
		w.log.Info("changes on the host are pushed to the guest", "tag", e.Tag, "watched", watched, "reason", why)
	default:
		watched = "not: " + quote(r.Blind)
		w.log.Warn("changes on the host are not pushed to the guest, which looks again after a second", "tag", e.Tag, "fanotify", why, "inotify", quote(r.Blind))
	}
	return passthrough.NoFlush(root, e.Submounts), watched, nil
}

// How changes on the host are seen.
const (
	byFanotify = "by fanotify"
	byInotify  = "by inotify"
)

// notify passes on the notify channel of a mount, and eventsOf the session's event channel. The caller still has c, closes it, and does nothing
// else with it.
func (w *workerProc) notify(id uint32, n uint64, c *transport.Conn) error {
	return w.pass(order{Notify: &notifyOrder{id, n, c.Peer()}}, c)
}

func (w *workerProc) eventChannel(thread uint32, n uint64, plain bool, c *transport.Conn) error {
	return w.pass(order{Events: &eventsOrder{thread, n, plain, c.Peer()}}, c)
}

func (w *workerProc) pass(o order, c *transport.Conn) error {
	f, err := c.File()
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = w.order(o, f)
	return err
}

// stream passes c on, as the index-th of the mount's n-th streams. The caller still has c, closes it, and does nothing else
// with it: it may block. With reply the worker answers a StreamOpen.
func (w *workerProc) stream(id uint32, n uint64, index uint16, c *transport.Conn, reply bool) error {
	f, err := c.File()
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = w.order(order{Stream: &streamOrder{id, n, index, c.Peer(), reply}}, f)
	return err
}

func (w *workerProc) unmount(id uint32) error {
	r, err := w.order(order{Unmount: &unmountOrder{id}})
	w.events.counted(r.Counts)
	return err
}

// count has the worker tell what its mounts have served. One that does not within d is killed.
func (w *workerProc) count(d time.Duration) (counts, error) {
	r, err := w.orderWithin(d, order{Count: true})
	return r.Counts, err
}

// close has the worker end, by force if need be, and waits for it.
func (w *workerProc) close() {
	w.mu.Lock()
	w.closing = true
	w.mu.Unlock()
	// Its Recv then returns the end of file, and ours an error.
	w.proc.Close()
	<-w.done
}
