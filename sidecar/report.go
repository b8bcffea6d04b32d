package sidecar

import (
	"errors"
	"log/slog"
	"time"

	"github.com/credence-iam/credence/broker/credential"
)

// repeatAfter is how long a failure stays out of the log after another one. Two alternating failures both reach the log
// in time. The text of one failure can differ at each attempt, because it contains a port number.
const repeatAfter = time.Minute

// reporter logs changes, not attempts. The zero reporter has logged nothing. Only the renewal loop uses it.
type reporter struct {
	accessKey string // the session that was last logged
	failing   bool
	reason    credential.Reason
	valid     bool
	text      string
	at        time.Time
	released  bool // uninjected has logged
}

// received logs a new lease. If the broker has no newer session, it returns the same one, which is not logged again.
func (r *reporter) received(log *slog.Logger, lease credential.Lease, renewAt time.Time) {
	if !r.failing && r.accessKey == lease.AccessKeyID {
		return
	}
	*r = reporter{accessKey: lease.AccessKeyID, released: r.released}
	log.Info("Received credentials",
		"role", lease.Role.String(), "access_key_id", lease.AccessKeyID,
		"expiration", lease.Expiration.UTC(), "renews_at", renewAt.UTC())
}

// failed logs why there is no new lease, and whether the lease of old is still valid.
func (r *reporter) failed(log *slog.Logger, err error, old *state, now time.Time) {
	reason, valid, text := credential.ReasonOf(err), old.valid(now), err.Error()
	if r.failing && r.valid == valid && (r.reason == reason && r.text == text || now.Sub(r.at) < repeatAfter) {
		return
	}
	*r = reporter{accessKey: r.accessKey, failing: true, reason: reason, valid: valid, text: text, at: now, released: r.released}
	if traced, ok := errors.AsType[interface {
		error
		TraceID() string
	}](err); ok {
		log = log.With("trace_id", traced.TraceID()) // finds the call in the broker's traces
	}
	switch {
	case valid:
		log.Warn("Could not renew credentials, serving the current ones", "reason", string(reason), "error", text,
			"expiration", old.lease.Expiration.UTC())
	case old.lease.AccessKeyID != "":
		log.Error("Could not renew credentials, the current ones have expired", "reason", string(reason), "error", text,
			"expiration", old.lease.Expiration.UTC())
	default:
		log.Error("Could not get credentials", "reason", string(reason), "error", text)
	}
}

// uninjected logs, once, that the pod's containers start without credentials.
func (r *reporter) uninjected(log *slog.Logger) {
	if !r.released {
		r.released = true
		log.Warn("Pod was not injected, so its containers start without credentials", "reason", string(credential.ReasonPodNotInjected))
	}
}
