// SPDX-License-Identifier: Apache-2.0

package host

import (
	"maps"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"transfused.org/transfused/service/passthrough"
)

// meter counts for the metrics. Nothing else depends on it.
type meter struct {
	refused, deaths atomic.Uint64

	mu    sync.Mutex // guards the rest
	byTag map[string]passthrough.Counts
}

// add counts what was served of an export. A worker that counts backwards is not believed.
func (m *meter) add(tag string, before, now passthrough.Counts) {
	if now.Requests < before.Requests || now.Received < before.Received || now.Sent < before.Sent {
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	c := m.byTag[tag]
	c.Requests += now.Requests - before.Requests
	c.Received += now.Received - before.Received
	c.Sent += now.Sent - before.Sent
	m.byTag[tag] = c
}

// countPatience is how long the metrics wait for the workers' counts; who is late is shown as it was.
const countPatience = time.Second

// count has the workers tell what they have served.
func (s *Server) count() {
	s.mu.Lock()
	sessions := make([]*session, 0, len(s.sessions))
	for ss := range s.sessions {
		sessions = append(sessions, ss)
	}
	s.mu.Unlock()
	told, asked := make(chan struct{}, len(sessions)), 0
	for _, ss := range sessions {
		if ss.counting.CompareAndSwap(false, true) {
			if ss.spawn(func() {
				defer ss.counting.Store(false)
				ss.count(orderTime)
				told <- struct{}{}
			}) {
				asked++
			}
		}
	}
	late := time.After(countPatience)
	for ; asked > 0; asked-- {
		select {
		case <-told:
		case <-late:
			return
		}
	}
}

// count has the worker tell what it has served, of all mounts.
func (ss *session) count(d time.Duration) {
	ss.mu.Lock()
	w := ss.worker
	ss.mu.Unlock()
	if w == nil {
		return
	}
	if cs, err := w.count(d); err == nil { // else it has died, and that is told
		ss.counted(cs)
	}
}

// counted notes what a worker has told, by MountID.
func (ss *session) counted(cs counts) {
	ss.mu.Lock()
	defer ss.mu.Unlock()
	for id, c := range cs {
		if m := ss.mounts[id]; m != nil {
			ss.srv.meter.add(m.export.Tag, m.counts, c)
			m.counts = c
		}
	}
}

// Metrics serves the server's metrics in the OpenMetrics format, or that of Prometheus.
func (s *Server) Metrics() http.Handler {
	r := prometheus.NewRegistry()
	r.MustRegister(collector{s})
	return promhttp.HandlerFor(r, promhttp.HandlerOpts{EnableOpenMetrics: true, MaxRequestsInFlight: 4})
}

// collector makes the metrics when they are asked for.
type collector struct{ s *Server }

var _ prometheus.Collector = collector{}

func desc(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc("transfuse_host_"+name, help, labels, nil)
}

var (
	descBuild    = desc("build_info", "The version of the server; always 1.", "version")
	descExports  = desc("exports", "Exports of the configuration.")
	descSessions = desc("sessions", "Sessions of guests: connected, or lost and not given up yet.", "state")
	descMounts   = desc("mounts", "Mounts of an export: served, or waiting for their guest to come back.", "tag", "state")
	descStreams  = desc("streams", "Streams of the mounts of an export: their connections.", "tag")
	descRequests = desc("requests_total", "FUSE requests that were served.", "tag")
	descReceived = desc("received_bytes_total", "Bytes of requests: what guests write.", "tag")
	descSent     = desc("sent_bytes_total", "Bytes of replies: what guests read.", "tag")
	descRefused  = desc("connections_refused_total", "Connections that were refused.")
	descDeaths   = desc("worker_deaths_total", "Workers that ended without being asked to, each with its session.")
)

// Describe tells which metrics there are.
func (c collector) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{descBuild, descExports, descSessions, descMounts, descStreams, descRequests, descReceived, descSent, descRefused, descDeaths} {
		ch <- d
	}
}

// Collect makes them.
func (c collector) Collect(ch chan<- prometheus.Metric) {
	s := c.s
	s.count()
	gauge := func(d *prometheus.Desc, n int, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, float64(n), labels...)
	}
	counter := func(d *prometheus.Desc, n uint64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.CounterValue, float64(n), labels...)
	}
	exports := s.policy().exports
	gauge(descBuild, 1, s.conf.Version)
	gauge(descExports, len(exports))
	type key struct{ tag, state string }
	mounts, streams, sessions := map[key]int{}, map[string]int{}, map[string]int{"connected": 0, "lost": 0}
	for _, e := range exports {
		streams[e.Tag] = 0
		mounts[key{e.Tag, "served"}], mounts[key{e.Tag, "waiting"}] = 0, 0
	}
	for _, d := range s.Sessions() {
		state := "connected"
		if d.Lost {
			state = "lost"
		}
		sessions[state]++
		for _, m := range d.Mounts {
			state := "served"
			if m.Streams == 0 {
				state = "waiting"
			}
			mounts[key{m.Tag, state}]++
			streams[m.Tag] += m.Streams
		}
	}
	for state, n := range sessions {
		gauge(descSessions, n, state)
	}
	for k, n := range mounts {
		gauge(descMounts, n, k.tag, k.state)
	}
	for tag, n := range streams {
		gauge(descStreams, n, tag)
	}
	s.meter.mu.Lock()
	counts := maps.Clone(s.meter.byTag)
	s.meter.mu.Unlock()
	for _, e := range exports {
		counts[e.Tag] = counts[e.Tag] // each has a value from the beginning
	}
	for tag, n := range counts {
		counter(descRequests, n.Requests, tag)
		counter(descReceived, n.Received, tag)
		counter(descSent, n.Sent, tag)
	}
	counter(descRefused, s.meter.refused.Load())
	counter(descDeaths, s.meter.deaths.Load())
}
