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

// decision is the outcome of a request, and the value of the audit annotation "decision".
type decision string

const (
	untouched decision = "untouched" // the request is not the creation of an annotated pod
	injected  decision = "injected"
	complete  decision = "complete" // the pod is already injected
	refused   decision = "refused"
	checked   decision = "checked" // the request is the check after an installation
)

// Decisions returns the values of [Observation.Decision].
func Decisions() []string {
	return []string{string(untouched), string(injected), string(complete), string(refused), string(checked)}
}

// verdict is a decision with its inputs.
type verdict struct {
	decision decision
	inject.Result
	grant policy.Grant // zero if the broker must decide
}

// respond decides on a request, logs the decision and returns the response. If err is not nil, it refuses the request
// because of err.
func (s *Server) respond(ctx context.Context, request *admissionv1.AdmissionRequest, err error, memory *reservation, began time.Time) *admissionv1.AdmissionResponse {
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
	s.log.InfoContext(ctx, "Decided on an admission",
		"uid", clip.Runes(string(request.UID), maxName), "namespace", clip.Runes(request.Namespace, maxName), "pod", clip.Runes(name, maxName),
		"decision", v.decision, "reason", reason, "role", role, "dry_run", request.DryRun != nil && *request.DryRun)
	// The user does not see the cause. A refusal without a cause is not a fault of the webhook.
	if e, ok := errors.AsType[*credential.Error](err); err != nil && (!ok || e.Cause != nil) {
		cause := err
		if ok {
			cause = e.Cause
		}
		s.log.ErrorContext(ctx, "Refused an admission because of a fault", "uid", clip.Runes(string(request.UID), maxName), "error", cause)
	}
	return response
}

// decideSafely is like decide, but returns an error if decide panics.
func (s *Server) decideSafely(ctx context.Context, request *admissionv1.AdmissionRequest, memory *reservation) (v verdict, err error) {
	if fault := s.safely(ctx, request.UID, func() { v, err = s.decide(ctx, request, memory) }); fault != nil {
		return verdict{}, fault
	}
	return v, err
}

// safely calls f and returns an error if f panics. Other reviews are not affected.
func (s *Server) safely(ctx context.Context, uid types.UID, f func()) (err error) {
	defer func() {
		if p := recover(); p != nil {
			// Errors of the Go runtime quote no data. Other panic values may quote the pod.
			value := fmt.Sprintf("%T", p)
			if fault, ok := p.(runtime.Error); ok {
				value = fault.Error()
			}
			s.log.ErrorContext(ctx, "Recovered from a panic in an admission", "uid", clip.Runes(string(uid), maxName), "panic", value, "stack", string(debug.Stack()))
			err = errors.New("panic: " + value)
		}
	}()
	f()
	return nil
}

func (s *Server) decide(ctx context.Context, request *admissionv1.AdmissionRequest, memory *reservation) (verdict, error) {
	// Only creation matters: the fields that injection adds cannot change later, and users must be able to edit pods that
	// are older than the webhook.
	switch {
	case request.Operation != admissionv1.Create || request.SubResource != "":
		return verdict{decision: untouched}, nil
	case request.Resource == podTemplates:
		return s.checkTemplate(ctx, request, memory)
	case request.Resource != pods:
		return verdict{decision: untouched}, nil
	}
	result, err := s.cfg.Injector.InjectWithin(ctx, request.Object.Raw, request.Namespace, func(containers int) error {
		return memory.growBy(ctx, costPerContainer*int64(containers))
	})
	v := verdict{decision: injected, Result: result}
	if ended := ctx.Err(); ended != nil && errors.Is(err, ended) {
		return v, &credential.Error{
			Kind: credential.ErrUnavailable, Reason: credential.ReasonInternal, Cause: err, RetryAfter: time.Second,
			Message: fmt.Sprintf("the webhook could not decide on the pod within %s because of too many other pods; try again", reviewTimeout),
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
	v.grant, err = s.check(ctx, result.Pod)
	return v, err
}

// check refuses a pod that the broker would refuse. If only the broker can decide, it returns a zero grant and no error.
func (s *Server) check(ctx context.Context, pod policy.Pod) (policy.Grant, error) {
	ns, err := s.cfg.Namespaces.Namespace(ctx, pod.Namespace)
	switch {
	case errors.Is(err, credential.ErrNotFound):
		return policy.Grant{}, credential.Errorf(credential.ErrNotFound, credential.ReasonNamespaceNotFound,
			"namespace %q does not exist", pod.Namespace)
	case err != nil:
		return policy.Grant{}, &credential.Error{
			Kind: credential.ErrUnavailable, Reason: credential.ReasonAPIServerUnavailable, Cause: err, RetryAfter: time.Second,
			Message: fmt.Sprintf("cannot check whether namespace %q permits the role: the API server does not respond; try again", pod.Namespace),
		}
	}
	grant, err := s.grant(ctx, pod, ns)
	if err == nil || errors.Is(err, credential.ErrUnavailable) {
		return grant, err
	}
	// The watch cache may be old: users annotate a namespace a moment before its first pod.
	latest, readErr := s.cfg.Namespaces.Latest(ctx, pod.Namespace)
	if readErr != nil {
		s.log.WarnContext(ctx, "Could not read a namespace, refusing by the watch cache", "namespace", clip.Runes(pod.Namespace, maxName), "error", readErr)
		return policy.Grant{}, err
	}
	return s.grant(ctx, pod, latest)
}

// grant decides by ns. It returns a zero grant if only the broker can decide.
func (s *Server) grant(ctx context.Context, pod policy.Pod, ns policy.Namespace) (policy.Grant, error) {
	grant, err := s.cfg.Rules.Decide(ctx, pod, ns)
	if errors.Is(err, policy.ErrNoBase) {
		return policy.Grant{}, nil
	}
	return grant, err
}

// maxMessage limits the message of a refusal, in characters. Some quote an annotation, which can have 256 KiB.
const maxMessage = 2048

// refusal returns the response for an error. kubectl prints its message, and a controller puts the message into an Event.
// Neither treats the codes specially; kubectl would print a 422 without its message.
func refusal(request *admissionv1.AdmissionRequest, err error) *admissionv1.AdmissionResponse {
	status := &metav1.Status{Status: metav1.StatusFailure, Details: &metav1.StatusDetails{}}
	message := fmt.Sprintf("internal error; see the webhook's log for uid %s", request.UID)
	if e, ok := errors.AsType[*credential.Error](err); ok {
		message = e.Message
		// The API server sends it as Retry-After header, and clients obey.
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

// Limits of warnings, in characters. If all warnings have more than 4096, the API server cuts each to 256 and drops those
// that do not fit. The webhook cuts them itself, and counts the others.
const (
	maxWarning  = 256
	maxWarnings = 4096
)

// bounded returns the warnings that fit, and a last one with the number of others. more are already missing in warnings.
func bounded(warnings []string, more int) []string {
	var kept []string
	for at, warning := range warnings {
		if (at+1)*maxWarning > maxWarnings-maxWarning { // The last place is for the count.
			return append(kept, fmt.Sprintf("credence: and %d more warnings", len(warnings)-at+more))
		}
		kept = append(kept, clip.Runes("credence: "+warning, maxWarning))
	}
	return kept
}
