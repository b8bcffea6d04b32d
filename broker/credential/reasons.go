package credential

import "slices"

// reasons has every Reason, in the order of declaration. A test compares it with the declarations.
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
	ReasonAPIServerUnavailable,
	ReasonSTSDenied,
	ReasonSTSRejected,
	ReasonSTSThrottled,
	ReasonSTSUnavailable,
	ReasonBrokerCredentials,
	ReasonAuditUnavailable,
	ReasonShuttingDown,
	ReasonBrokerBusy,
	ReasonBrokerUnreachable,
	ReasonInternal,
}

// Reasons returns every Reason. Metrics start each reason at zero. Otherwise the first refusal for a reason would create
// a series instead of increasing one, and an alert on a rate would miss it.
func Reasons() []Reason { return slices.Clone(reasons) }
