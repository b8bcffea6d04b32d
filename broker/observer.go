package broker

import (
	"context"
	"errors"
	"time"

	"github.com/credence-iam/credence/broker/audit"
	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/broker/identity"
	"github.com/credence-iam/credence/broker/policy"
)

// Observer is notified of each call of GetCredentials, once, when its outcome is final and before the response leaves. It
// receives the context of the call. It must not block.
type Observer func(ctx context.Context, call Call)

// Call is a call of GetCredentials with its outcome.
type Call struct {
	// Entry is what the audit log recorded.
	Entry audit.Entry
	// Pod is the live pod of the token; zero if the broker refused the call before it knew the pod.
	Pod policy.Pod
	// Err is why the pod gets no credentials; nil if it gets some.
	Err error
	// RenewalErr is why the session that the pod gets could not be renewed; nil if no renewal failed.
	RenewalErr error
	// Took is the time from the arrival of the call.
	Took time.Duration
}

// Events reports on live pods to their users. Its methods must not block.
type Events interface {
	// Refused reports a refusal that a user must fix.
	Refused(pod policy.Pod, refusal *credential.Error)
	// Unavailable reports that the pod gets no credentials because this broker is impaired.
	Unavailable(pod policy.Pod, failure *credential.Error)
	// Shadowed reports the webhook's warnings about what outranks the pod's role.
	Shadowed(pod policy.Pod, warnings string)
}

// ReportTo returns an observer that reports to events what users must fix: refusals, failed renewals of sessions that pods
// still get, and credentials that outrank a pod's role. It also reports that a pod gets no credentials because this broker is
// impaired, so that its user need not look for a mistake.
//
// It also reports a token for another audience, to events and to impairments, if nothing else is wrong with it: the webhook
// and the broker then have different settings. It does so only if expects returns true for the token's pod; expects makes no
// live read. Otherwise a service that receives tokens of pods could have this reported on any pod.
func ReportTo(events Events, expects func(identity.Pod) bool, impairments *Impairments) Observer {
	return func(_ context.Context, call Call) {
		if warnings := call.Pod.Request.Warnings(); warnings != "" {
			events.Shadowed(call.Pod, warnings)
		}
		e, _ := errors.AsType[*credential.Error](call.Err)
		if call.Pod.UID != "" {
			report(events, call.Pod, call.Err)
			report(events, call.Pod, call.RenewalErr)
			if impairments.hasLasted(e) {
				events.Unavailable(call.Pod, e)
			}
		}
		if other, ok := errors.AsType[*identity.OtherAudienceError](call.Err); ok && e != nil && expects(other.Pod) {
			pod := policy.Pod{Namespace: other.Pod.Namespace, Name: other.Pod.Name, UID: other.Pod.UID}
			events.Refused(pod, e)
			impairments.record(e, pod)
		}
	}
}

// report reports err if a user must fix its cause. Users cannot fix other errors.
func report(events Events, pod policy.Pod, err error) {
	if !errors.Is(err, credential.ErrDenied) && !errors.Is(err, credential.ErrInvalid) {
		return
	}
	if e, ok := errors.AsType[*credential.Error](err); ok {
		events.Refused(pod, e)
	}
}
