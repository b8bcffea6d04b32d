package sidecar

import (
	"testing/synctest"
	"time"
)

// SuspendFor simulates a machine that is suspended for d: the wall clock moves, but the timers do not. It waits until the
// renewal loop sleeps, so that it changes the state alone.
func (s *Sidecar) SuspendFor(d time.Duration) {
	synctest.Wait()
	st := s.state.Load()
	st.renewAt = st.renewAt.Add(-d)
	st.lease.Expiration = st.lease.Expiration.Add(-d)
}

// SetClockBack simulates a clock that is set back by d: the wall clock is farther from the times in the state, but timers
// do not change.
func (s *Sidecar) SetClockBack(d time.Duration) { s.SuspendFor(-d) }

// Limit exports limit for tests.
var Limit = limit

// These are the limits of the server.
const (
	MaxConnections = maxConnections
	KeepAliveLimit = keepAliveLimit
	ReadTimeout    = readTimeout
	WriteTimeout   = writeTimeout
	IdleTimeout    = idleTimeout
	MaxWaiting     = maxWaiting
	MaxLines       = maxLines
)
