package credential

import (
	"errors"
	"fmt"
	"time"
)

// The kinds of failure that callers act upon. Each [Error] is exactly one of them under
// [errors.Is]; an error that is none of them is internal, and the outside is told no more than that.
var (
	// ErrUnauthenticated: the caller's token does not prove which live pod it is.
	ErrUnauthenticated = errors.New("unauthenticated")
	// ErrDenied: the caller is known, and may not have what it asks for.
	ErrDenied = errors.New("denied")
	// ErrInvalid: what the user wrote cannot be right, whoever asks.
	ErrInvalid = errors.New("invalid")
	// ErrNotFound: the pod or namespace that the caller names does not exist.
	ErrNotFound = errors.New("not found")
	// ErrUnavailable: a dependency is away; the same call may succeed later.
	ErrUnavailable = errors.New("unavailable")
)

// Reason is the machine-readable cause of an [Error]: stable, upper snake case, safe as a metric
// label and as google.rpc.ErrorInfo.reason (AIP-193 allows [A-Z0-9_], at most 63 characters).
type Reason string

// The reasons. Once released, one is never renamed and never reused.
const (
	ReasonTokenMissing       Reason = "TOKEN_MISSING"
	ReasonTokenInvalid       Reason = "TOKEN_INVALID"
	ReasonTokenExpired       Reason = "TOKEN_EXPIRED"
	ReasonTokenEarly         Reason = "TOKEN_NOT_YET_VALID"
	ReasonTokenLongLived     Reason = "TOKEN_TOO_LONG_LIVED"
	ReasonTokenAudience      Reason = "TOKEN_AUDIENCE"
	ReasonTokenIssuer        Reason = "TOKEN_ISSUER"
	ReasonTokenNotPodBound   Reason = "TOKEN_NOT_POD_BOUND"
	ReasonTokenKey           Reason = "TOKEN_KEY_UNSUPPORTED"
	ReasonPodNotFound        Reason = "POD_NOT_FOUND"
	ReasonPodNotInjected     Reason = "POD_NOT_INJECTED"
	ReasonPodFinished        Reason = "POD_FINISHED"
	ReasonServiceAccountGone Reason = "SERVICE_ACCOUNT_GONE"
	ReasonNamespaceNotFound  Reason = "NAMESPACE_NOT_FOUND"
	ReasonNamespaceNotOpted  Reason = "NAMESPACE_NOT_OPTED_IN"
	ReasonNothingPermitted   Reason = "NOTHING_PERMITTED"
	ReasonRoleNotPermitted   Reason = "ROLE_NOT_PERMITTED"
	ReasonRoleMissing        Reason = "ROLE_MISSING"
	ReasonRoleInvalid        Reason = "ROLE_INVALID"
	ReasonTagNotPermitted    Reason = "TAG_NOT_PERMITTED"
	ReasonTooManyGrants      Reason = "TOO_MANY_GRANTS"
	ReasonRulesNamespace     Reason = "RULES_NAMESPACE"
	ReasonRulesAccount       Reason = "RULES_ACCOUNT"
	ReasonRulesRole          Reason = "RULES_ROLE"
	ReasonRulesExternalID    Reason = "RULES_EXTERNAL_ID"
	ReasonRulesSessionName   Reason = "RULES_SESSION_NAME"
	ReasonRulesDuration      Reason = "RULES_DURATION"
	ReasonRulesTag           Reason = "RULES_TAG"
	ReasonAnnotationUnknown  Reason = "ANNOTATION_UNKNOWN"
	ReasonAnnotationInvalid  Reason = "ANNOTATION_INVALID"
	ReasonPodUnsupported     Reason = "POD_UNSUPPORTED"
	ReasonShadowed           Reason = "CREDENTIALS_SHADOWED"
	ReasonNamespaceBusy      Reason = "NAMESPACE_BUSY"
	ReasonAPIServerAway      Reason = "API_SERVER_UNAVAILABLE"
	ReasonSTSDenied          Reason = "STS_ACCESS_DENIED"
	ReasonSTSRejected        Reason = "STS_REJECTED"
	ReasonSTSThrottled       Reason = "STS_THROTTLED"
	ReasonSTSUnavailable     Reason = "STS_UNAVAILABLE"
	ReasonBaseCredential     Reason = "BROKER_CREDENTIALS"
	ReasonAuditUnavailable   Reason = "AUDIT_UNAVAILABLE"
	ReasonShuttingDown       Reason = "SHUTTING_DOWN"
	ReasonBrokerBusy         Reason = "BROKER_BUSY"
	ReasonBrokerUnreachable  Reason = "BROKER_UNREACHABLE"
	ReasonInternal           Reason = "INTERNAL"
)

// Error is a failure with a message for the person who has to mend it.
type Error struct {
	// Kind is one of the sentinels of this package. Required.
	Kind error
	// Reason is the machine-readable cause. Required.
	Reason Reason
	// Message is one sentence for the user: what was refused and what to change. It crosses the
	// wire, so it holds no secret and nothing that only operators may see. Required.
	Message string
	// RetryAfter, when positive, is how long to wait before trying again.
	RetryAfter time.Duration
	// Cause is the underlying error, for our own logs. It never leaves the process.
	Cause error
}

// Errorf makes an Error of the given kind and reason with a formatted message.
func Errorf(kind error, reason Reason, format string, args ...any) *Error {
	return &Error{Kind: kind, Reason: reason, Message: fmt.Sprintf(format, args...)}
}

// Error returns the message, and the cause behind it.
func (e *Error) Error() string {
	if e.Cause != nil {
		return fmt.Sprintf("%s: %v", e.Message, e.Cause)
	}
	return e.Message
}

// Unwrap yields the kind and the cause.
func (e *Error) Unwrap() []error {
	if e.Cause != nil {
		return []error{e.Kind, e.Cause}
	}
	return []error{e.Kind}
}

// ReasonOf returns the reason of err, [ReasonInternal] for an error that carries none, and "" for
// nil.
func ReasonOf(err error) Reason {
	if err == nil {
		return ""
	}
	if e, ok := errors.AsType[*Error](err); ok {
		return e.Reason
	}
	return ReasonInternal
}
