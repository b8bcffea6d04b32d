package credential

import "slices"

// reasons is every Reason there is, in the order of their declaration. A test compares the two.
var reasons = []Reason{
	ReasonTokenMissing,
	ReasonTokenInvalid,
	ReasonTokenExpired,
	ReasonTokenEarly,
	ReasonTokenLongLived,
	ReasonTokenAudience,
	ReasonTokenIssuer,
	ReasonTokenNotPodBound,
	ReasonTokenKey,
	ReasonPodNotFound,
	ReasonPodNotInjected,
	ReasonPodFinished,
	ReasonServiceAccountGone,
	ReasonNamespaceNotFound,
	ReasonNamespaceNotOpted,
	ReasonNothingPermitted,
	ReasonRoleNotPermitted,
	ReasonRoleMissing,
	ReasonRoleInvalid,
	ReasonTagNotPermitted,
	ReasonTooManyGrants,
	ReasonRulesNamespace,
	ReasonRulesAccount,
	ReasonRulesRole,
	ReasonRulesExternalID,
	ReasonRulesSessionName,
	ReasonRulesDuration,
	ReasonRulesTag,
	ReasonAnnotationUnknown,
	ReasonAnnotationInvalid,
	ReasonPodUnsupported,
	ReasonShadowed,
	ReasonNamespaceBusy,
	ReasonAPIServerAway,
	ReasonSTSDenied,
	ReasonSTSRejected,
	ReasonSTSThrottled,
	ReasonSTSUnavailable,
	ReasonBaseCredential,
	ReasonAuditUnavailable,
	ReasonShuttingDown,
	ReasonBrokerBusy,
	ReasonBrokerUnreachable,
	ReasonInternal,
}

// Reasons returns every Reason there is. Metrics begin each at zero by it, so that the first refusal
// of a kind is an increase and not a new series, which no alert on a rate would see.
func Reasons() []Reason { return slices.Clone(reasons) }
