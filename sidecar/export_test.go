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

// Limit is limit.
var Limit = limit

// MaxConnections is maxConnections.
const MaxConnections = maxConnections
