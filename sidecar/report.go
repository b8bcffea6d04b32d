package sidecar

import (
	"errors"
	"log/slog"
	"time"

	"github.com/credence-iam/credence/broker/credential"
)

// repeatAfter is how long a trouble that goes on stays unmentioned, whatever it turns into meanwhile: of two that
// take turns each is in the log, and a port number differs at each attempt.
const repeatAfter = time.Minute

// reporter logs what changed, not what was tried. The zero reporter has reported nothing. It belongs
// to the renewal loop.
type reporter struct {
	accessKey string // the session that was last reported as held
	failing   bool
	reason    credential.Reason
	holding   bool
	text      string
	at        time.Time
	released  bool // it was reported that the pod's other containers are not held back
}

// held reports a lease that was got. The broker yields the same session again when it has no newer
// one; that is no news.
func (r *reporter) held(log *slog.Logger, lease credential.Lease, renewAt time.Time) {
	if !r.failing && r.accessKey == lease.AccessKeyID {
		return
	}
	*r = reporter{accessKey: lease.AccessKeyID, released: r.released}
	log.Info("got credentials",
		"role", lease.Role.String(), "access_key_id", lease.AccessKeyID,
		"expiration", lease.Expiration.UTC(), "renews_at", renewAt.UTC())
}

// failed reports why there is no new lease, and whether that of old still serves.
func (r *reporter) failed(log *slog.Logger, err error, old *state, now time.Time) {
	reason, holding, text := credential.ReasonOf(err), old.valid(now), err.Error()
	if r.failing && r.holding == holding && (r.reason == reason && r.text == text || now.Sub(r.at) < repeatAfter) {
		return
	}
	*r = reporter{accessKey: r.accessKey, failing: true, reason: reason, holding: holding, text: text, at: now, released: r.released}
	if traced, ok := errors.AsType[interface {
		error
		TraceID() string
	}](err); ok {
		log = log.With("trace_id", traced.TraceID()) // by which the broker's operator finds this call
	}
	switch {
	case holding:
		log.Warn("cannot renew credentials: serving those held", "reason", string(reason), "error", text,
			"expiration", old.lease.Expiration.UTC())
	case old.lease.AccessKeyID != "":
		log.Error("cannot renew credentials: those held have expired", "reason", string(reason), "error", text,
			"expiration", old.lease.Expiration.UTC())
	default:
		log.Error("cannot get credentials", "reason", string(reason), "error", text)
	}
}

// uninjected reports, once, that the pod's containers start though there are no credentials.
func (r *reporter) uninjected(log *slog.Logger) {
	if !r.released {
		r.released = true
		log.Warn("Pod was not injected, so its containers start without credentials", "reason", string(credential.ReasonPodNotInjected))
	}
}
