package webhook

import (
	"context"
	stdjson "encoding/json"
	"errors"
	"fmt"
	"math"
	"net/http"
	"runtime"
	"runtime/debug"
	"time"

	admissionv1 "k8s.io/api/admission/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/credence-iam/credence/broker/clip"
	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/broker/policy"
	"github.com/credence-iam/credence/webhook/inject"
)

// decision is what became of a request; it is the value of the audit annotation "decision".
type decision string

const (
	untouched decision = "untouched" // not the creation of an annotated pod
	injected  decision = "injected"
	complete  decision = "complete" // injected before: called again, with nothing to add
	refused   decision = "refused"
)

// Decisions returns the values of [Observation.Decision].
func Decisions() []string {
	return []string{string(untouched), string(injected), string(complete), string(refused)}
}

// verdict is a decision and what led to it.
type verdict struct {
	decision decision
	inject.Result
	grant policy.Grant // zero if the decision was left to the broker
}

// respond decides on one request, logs the decision and puts it in the API server's form. With an error it refuses the
// request for that, without looking at it.
func (s *Server) respond(ctx context.Context, request *admissionv1.AdmissionRequest, err error, memory *share, began time.Time) *admissionv1.AdmissionResponse {
	var v verdict
	if err == nil {
		v, err = s.decideSafely(ctx, request, memory)
	}
	response := &admissionv1.AdmissionResponse{UID: request.UID}
	if err == nil && v.Patch != nil {
		if response.Patch, err = stdjson.Marshal(v.Patch); err == nil {
			response.PatchType = new(admissionv1.PatchTypeJSONPatch)
		}
	}
	if err != nil {
		v.decision = refused
		response = refusal(request, err)
	} else {
		response.Allowed = true
		response.Warnings = bounded(v.Warnings, v.MoreWarnings)
	}

	if s.cfg.Observe != nil {
		s.cfg.Observe(Observation{
			Decision: string(v.decision), Reason: credential.ReasonOf(err), Duration: time.Since(began), PatchBytes: len(response.Patch),
		})
	}
	role, reason := v.grant.Role().String(), string(credential.ReasonOf(err))
	response.AuditAnnotations = map[string]string{"decision": string(v.decision)}
	sidecar := ""
	if v.decision == injected {
		sidecar = s.cfg.Injector.Image()
	}
	for key, value := range map[string]string{"role": role, "reason": reason, "sidecar": sidecar} {
		if value != "" {
			response.AuditAnnotations[key] = value
		}
	}
	name := request.Name
	if name == "" {
		name = v.Name
	}
	s.log.InfoContext(ctx, "Admission decided",
		"uid", clip.Runes(string(request.UID), maxName), "namespace", clip.Runes(request.Namespace, maxName), "pod", clip.Runes(name, maxName),
		"decision", v.decision, "reason", reason, "role", role, "dry_run", request.DryRun != nil && *request.DryRun)
	// What users are not told. Refusals that they are told of in full are no faults of ours.
	if e, ok := errors.AsType[*credential.Error](err); err != nil && (!ok || e.Cause != nil) {
		cause := err
		if ok {
			cause = e.Cause
		}
		s.log.ErrorContext(ctx, "Admission refused for a fault", "uid", clip.Runes(string(request.UID), maxName), "error", cause)
	}
	return response
}

// decideSafely is decide, with a panic turned into an error.
func (s *Server) decideSafely(ctx context.Context, request *admissionv1.AdmissionRequest, memory *share) (v verdict, err error) {
	if fault := s.safely(ctx, request.UID, func() { v, err = s.decide(ctx, request, memory) }); fault != nil {
		return verdict{}, fault
	}
	return v, err
}

// safely calls f, and turns a panic into an error: the pod is refused, and the others of the process live on.
func (s *Server) safely(ctx context.Context, uid types.UID, f func()) (err error) {
	defer func() {
		if p := recover(); p != nil {
			// Errors of the Go runtime quote no data; other panic values might quote the pod.
			what := fmt.Sprintf("%T", p)
			if fault, ok := p.(runtime.Error); ok {
				what = fault.Error()
			}
			s.log.ErrorContext(ctx, "Panic while deciding on an admission", "uid", clip.Runes(string(uid), maxName), "panic", what, "stack", string(debug.Stack()))
			err = errors.New("panic: " + what)
		}
	}()
	f()
	return nil
}

func (s *Server) decide(ctx context.Context, request *admissionv1.AdmissionRequest, memory *share) (verdict, error) {
	// Only creation: the fields that injection adds cannot be changed later, and a pod that was let
	// through before the webhook was there must stay editable.
	pods := metav1.GroupVersionResource{Version: "v1", Resource: "pods"}
	if request.Operation != admissionv1.Create || request.Resource != pods || request.SubResource != "" {
		return verdict{decision: untouched}, nil
	}
	result, err := s.cfg.Injector.InjectWithin(ctx, request.Object.Raw, request.Namespace, func(containers int) error {
		return memory.growBy(ctx, costPerContainer*int64(containers))
	})
	v := verdict{decision: injected, Result: result}
	if ended := ctx.Err(); ended != nil && errors.Is(err, ended) {
		return v, &credential.Error{
			Kind: credential.ErrUnavailable, Reason: credential.ReasonInternal, Cause: err, RetryAfter: time.Second,
			Message: fmt.Sprintf("the webhook did not decide on the pod within %s, because it had too many others to decide on: try again", reviewTimeout),
		}
	}
	if err != nil {
		return v, err
	}
	if !result.Annotated {
		v.decision = untouched
		return v, nil
	}
	if result.Patch == nil {
		v.decision = complete
	}
	v.grant, err = s.judge(ctx, result.Pod)
	return v, err
}

// judge refuses what the broker would refuse. A zero grant without an error leaves it to the broker.
func (s *Server) judge(ctx context.Context, pod policy.Pod) (policy.Grant, error) {
	ns, err := s.cfg.Namespaces.Namespace(ctx, pod.Namespace)
	switch {
	case errors.Is(err, credential.ErrNotFound):
		return policy.Grant{}, credential.Errorf(credential.ErrNotFound, credential.ReasonNamespaceNotFound,
			"namespace %q does not exist", pod.Namespace)
	case err != nil:
		return policy.Grant{}, &credential.Error{
			Kind: credential.ErrUnavailable, Reason: credential.ReasonAPIServerAway, Cause: err, RetryAfter: time.Second,
			Message: fmt.Sprintf("whether namespace %q permits the role cannot be known now, because the API server does not answer: try again", pod.Namespace),
		}
	}
	grant, err := s.grant(ctx, pod, ns)
	if err == nil || errors.Is(err, credential.ErrUnavailable) {
		return grant, err
	}
	// The watch may be behind: namespaces are annotated a moment before their first pod.
	latest, readErr := s.cfg.Namespaces.Latest(ctx, pod.Namespace)
	if readErr != nil {
		s.log.WarnContext(ctx, "Refusing by what was last heard of a namespace", "namespace", clip.Runes(pod.Namespace, maxName), "error", readErr)
		return policy.Grant{}, err
	}
	return s.grant(ctx, pod, latest)
}

// grant judges by ns. It is zero where that is left to the broker.
func (s *Server) grant(ctx context.Context, pod policy.Pod, ns policy.Namespace) (policy.Grant, error) {
	grant, err := s.cfg.Rules.Decide(ctx, pod, ns)
	if errors.Is(err, policy.ErrNoBase) {
		return policy.Grant{}, nil
	}
	return grant, err
}

// maxMessage bounds a refusal: some quote an annotation, of which Kubernetes takes 256 KiB.
const maxMessage = 2048

// refusal puts an error in the form in which it reaches the user: kubectl prints the message, and a
// controller puts it into an Event. The code is one that neither kubectl nor controllers treat
// specially: kubectl prints a 422 without its message.
func refusal(request *admissionv1.AdmissionRequest, err error) *admissionv1.AdmissionResponse {
	status := &metav1.Status{Status: metav1.StatusFailure, Details: &metav1.StatusDetails{}}
	message := fmt.Sprintf("internal error: the webhook's log has it under uid %s", request.UID)
	if e, ok := errors.AsType[*credential.Error](err); ok {
		message = e.Message
		// The API server makes a Retry-After header of it, which clients obey.
		status.Details.RetryAfterSeconds = int32(math.Ceil(min(e.RetryAfter, time.Minute).Seconds()))
	}
	switch {
	case errors.Is(err, credential.ErrInvalid):
		status.Code, status.Reason = http.StatusBadRequest, metav1.StatusReasonBadRequest
	case errors.Is(err, credential.ErrDenied), errors.Is(err, credential.ErrNotFound):
		status.Code, status.Reason = http.StatusForbidden, metav1.StatusReasonForbidden
	case errors.Is(err, credential.ErrUnavailable):
		status.Code, status.Reason = http.StatusServiceUnavailable, metav1.StatusReasonServiceUnavailable
	default:
		status.Code, status.Reason = http.StatusInternalServerError, metav1.StatusReasonInternalError
	}
	message = clip.Runes(message, maxMessage)
	status.Message = "credence: " + message
	status.Details.Causes = []metav1.StatusCause{{Type: metav1.CauseType(credential.ReasonOf(err)), Message: message}}
	return &admissionv1.AdmissionResponse{UID: request.UID, Result: status}
}

// Bounds of warnings, in characters. The API server cuts each to 256 once all have more than 4096
// together, and then drops those that do not fit: better cut and counted here.
const (
	maxWarning  = 256
	maxWarnings = 4096
)

// bounded returns what fits of the warnings, and how many more there were, beside those that were counted only.
func bounded(warnings []string, more int) []string {
	var kept []string
	for at, warning := range warnings {
		if (at+1)*maxWarning > maxWarnings-maxWarning { // the last place is for the count
			return append(kept, fmt.Sprintf("credence: and %d more warnings", len(warnings)-at+more))
		}
		kept = append(kept, clip.Runes("credence: "+warning, maxWarning))
	}
	return kept
}
