package sidecar

import (
	"testing/synctest"
	"time"
)

// SuspendFor does to s what d of suspension of the machine does: the wall clock went on, and the
// timers did not. It waits until the renewal loop sleeps, which is then the only one not to read
// what is changed here.
func (s *Sidecar) SuspendFor(d time.Duration) {
	synctest.Wait()
	st := s.state.Load()
	st.renewAt = st.renewAt.Add(-d)
	st.lease.Expiration = st.lease.Expiration.Add(-d)
}

// SetClockBack does to s what setting the clock back by d does: the wall clock is farther from the times that s has
// got, and timers go on. It waits as SuspendFor does.
func (s *Sidecar) SetClockBack(d time.Duration) { s.SuspendFor(-d) }

// Limit is limit.
var Limit = limit

// Bounds of the server.
const (
	MaxConnections = maxConnections
	Crowd          = crowd
	ReadTimeout    = readTimeout
	WriteTimeout   = writeTimeout
	IdleTimeout    = idleTimeout
	MaxWaiting     = maxWaiting
	MaxLines       = maxLines
)
