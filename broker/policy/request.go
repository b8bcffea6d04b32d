package policy

import "github.com/credence-iam/credence/broker/credential"

// Request is what the annotations of a pod request: parsed settings, or the refusal of annotations that do not parse.
// Package inject makes it once at admission, and package kube once for a live pod. Every decision about the pod uses it,
// so the webhook and the broker cannot read the same annotations in two ways. It never changes, and pods with equal
// annotations may share one. The zero Request and a nil one are refused.
//
// Parsing takes some microseconds for ordinary annotations, and 4 ms at most (BenchmarkRequest): each value has a
// maximum length, and no regular expression of a user is matched. So parsing takes no turn at the gate of [Rules].
type Request struct {
	settings       Settings
	valid          bool  // settings are those of the annotations
	err            error // nil if valid
	annotated      bool
	setsDuration   bool
	serviceAccount string
	warnings       string
}

// Request parses the annotations of a pod. The result contains no annotation of another prefix.
func (k Keys) Request(annotations map[string]string) *Request {
	r := &Request{
		annotated: k.Annotated(annotations), serviceAccount: annotations[k.Name(ServiceAccount)], warnings: annotations[k.Name(Warnings)],
	}
	_, r.setsDuration = annotations[k.Name(Duration)]
	r.settings, r.err = k.parse(annotations)
	r.valid = r.err == nil
	return r
}

// errNoRequest is the error of a pod without a Request.
var errNoRequest = credential.Errorf(credential.ErrInvalid, credential.ReasonRoleMissing, "the pod requests no role")

// Settings returns what the pod requests, with defaults filled in. Its error is an [*credential.Error] of kind
// credential.ErrInvalid whose message names the annotation: one that is unknown, or one whose value does not parse. The
// caller does not change the slices of the result.
func (r *Request) Settings() (Settings, error) {
	switch {
	case r == nil || r.err == nil && !r.valid:
		return Settings{}, errNoRequest
	case r.err != nil:
		return Settings{}, r.err
	}
	return r.settings, nil
}

// Annotated reports whether the pod has an annotation under the prefix that a user sets, see [Keys.Annotated].
func (r *Request) Annotated() bool { return r != nil && r.annotated }

// ServiceAccount returns the webhook's copy of the pod's service account. It is a hint for prefetch: the token decides.
func (r *Request) ServiceAccount() string {
	if r == nil {
		return ""
	}
	return r.serviceAccount
}

// Warnings returns the webhook's warnings about credentials that outrank the role, one a line; empty if there are none.
func (r *Request) Warnings() string {
	if r == nil {
		return ""
	}
	return r.warnings
}
