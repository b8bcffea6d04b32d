package credential

import (
	"errors"
	"fmt"
	"time"
)

// The kinds of failure that callers distinguish. With [errors.Is], each [Error] is exactly one of them. An error that is
// none of them is internal: callers outside the process learn nothing else about it.
var (
	// ErrUnauthenticated: the token does not prove which live pod the caller is.
	ErrUnauthenticated = errors.New("unauthenticated")
	// ErrDenied: the caller is known, and may not have what it requests.
	ErrDenied = errors.New("denied")
	// ErrInvalid: the user's text is invalid, for every caller.
	ErrInvalid = errors.New("invalid")
	// ErrNotFound: the pod or namespace that the caller names does not exist.
	ErrNotFound = errors.New("not found")
	// ErrUnavailable: a dependency is unavailable. The same call may succeed later.
	ErrUnavailable = errors.New("unavailable")
)

// Reason is the cause of an [Error] for programs: stable, and in upper snake case. It can be a metric label and a
// google.rpc.ErrorInfo.reason (AIP-193 permits [A-Z0-9_], at most 63 characters).
type Reason string

// The reasons. A released reason is never renamed and never reused.
const (
	ReasonTokenMissing         Reason = "TOKEN_MISSING"
	ReasonTokenInvalid         Reason = "TOKEN_INVALID"
	ReasonTokenExpired         Reason = "TOKEN_EXPIRED"
	ReasonTokenEarly           Reason = "TOKEN_NOT_YET_VALID"
	ReasonTokenLongLived       Reason = "TOKEN_TOO_LONG_LIVED"
	ReasonTokenAudience        Reason = "TOKEN_AUDIENCE"
	ReasonTokenIssuer          Reason = "TOKEN_ISSUER"
	ReasonTokenNotPodBound     Reason = "TOKEN_NOT_POD_BOUND"
	ReasonTokenKey             Reason = "TOKEN_KEY_UNSUPPORTED"
	ReasonPodNotFound          Reason = "POD_NOT_FOUND"
	ReasonPodNotInjected       Reason = "POD_NOT_INJECTED"
	ReasonPodFinished          Reason = "POD_FINISHED"
	ReasonServiceAccountGone   Reason = "SERVICE_ACCOUNT_GONE"
	ReasonNamespaceNotFound    Reason = "NAMESPACE_NOT_FOUND"
	ReasonNamespaceNotOpted    Reason = "NAMESPACE_NOT_OPTED_IN"
	ReasonNothingPermitted     Reason = "NOTHING_PERMITTED"
	ReasonRoleNotPermitted     Reason = "ROLE_NOT_PERMITTED"
	ReasonRoleMissing          Reason = "ROLE_MISSING"
	ReasonRoleInvalid          Reason = "ROLE_INVALID"
	ReasonTagNotPermitted      Reason = "TAG_NOT_PERMITTED"
	ReasonTooManyGrants        Reason = "TOO_MANY_GRANTS"
	ReasonRulesNamespace       Reason = "RULES_NAMESPACE"
	ReasonRulesAccount         Reason = "RULES_ACCOUNT"
	ReasonRulesRole            Reason = "RULES_ROLE"
	ReasonRulesExternalID      Reason = "RULES_EXTERNAL_ID"
	ReasonRulesSessionName     Reason = "RULES_SESSION_NAME"
	ReasonRulesDuration        Reason = "RULES_DURATION"
	ReasonRulesTag             Reason = "RULES_TAG"
	ReasonAnnotationUnknown    Reason = "ANNOTATION_UNKNOWN"
	ReasonAnnotationInvalid    Reason = "ANNOTATION_INVALID"
	ReasonPodUnsupported       Reason = "POD_UNSUPPORTED"
	ReasonShadowed             Reason = "CREDENTIALS_SHADOWED"
	ReasonNamespaceBusy        Reason = "NAMESPACE_BUSY"
	ReasonAPIServerUnavailable Reason = "API_SERVER_UNAVAILABLE"
	ReasonSTSDenied            Reason = "STS_ACCESS_DENIED"
	ReasonSTSRejected          Reason = "STS_REJECTED"
	ReasonSTSThrottled         Reason = "STS_THROTTLED"
	ReasonSTSUnavailable       Reason = "STS_UNAVAILABLE"
	ReasonBrokerCredentials    Reason = "BROKER_CREDENTIALS"
	ReasonAuditUnavailable     Reason = "AUDIT_UNAVAILABLE"
	ReasonShuttingDown         Reason = "SHUTTING_DOWN"
	ReasonBrokerBusy           Reason = "BROKER_BUSY"
	ReasonBrokerUnreachable    Reason = "BROKER_UNREACHABLE"
	ReasonInternal             Reason = "INTERNAL"
)

// Error is a failure with a message for the user who must fix it.
type Error struct {
	// Kind is one of the sentinels of this package. Required.
	Kind error
	// Reason is the cause for programs. Required.
	Reason Reason
	// Message is one sentence for the user: what was refused, and what to change. It crosses the wire, so it has no secret
	// and nothing that only operators may see. Required.
	Message string
	// RetryAfter is how long the caller should wait before it retries. Zero: the error does not say.
	RetryAfter time.Duration
	// Cause is the underlying error, for the log of this process. It never crosses the wire.
	Cause error
}

// Errorf returns an Error of that kind and reason, with a formatted message.
func Errorf(kind error, reason Reason, format string, args ...any) *Error {
	return &Error{Kind: kind, Reason: reason, Message: fmt.Sprintf(format, args...)}
}

// Error returns the message, followed by the cause if there is one.
func (e *Error) Error() string {
	if e.Cause != nil {
		return fmt.Sprintf("%s: %v", e.Message, e.Cause)
	}
	return e.Message
}

// Unwrap returns the kind and the cause.
func (e *Error) Unwrap() []error {
	if e.Cause != nil {
		return []error{e.Kind, e.Cause}
	}
	return []error{e.Kind}
}

// ReasonOf returns the reason of err: [ReasonInternal] if err has none, and "" for nil.
func ReasonOf(err error) Reason {
	if err == nil {
		return ""
	}
	if e, ok := errors.AsType[*Error](err); ok {
		return e.Reason
	}
	return ReasonInternal
}
