package view

import (
	_ "embed" // of the reasons
	"slices"
	"strings"

	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/operator/finding"
)

// reasonsText has what docs/errors.md says of each reason: reason, kind and text, separated by tabs. A test compares it with
// that page, and writes it with -update.
//
//go:embed reasons.txt
var reasonsText string

// meaning is what docs/errors.md says of a reason.
type meaning struct{ kind, text string }

var meanings = func() map[credential.Reason]meaning {
	all := map[credential.Reason]meaning{}
	for line := range strings.Lines(reasonsText) {
		if parts := strings.SplitN(strings.TrimRight(line, "\n"), "\t", 3); len(parts) == 3 {
			all[credential.Reason(parts[0])] = meaning{parts[1], parts[2]}
		}
	}
	return all
}()

// others are the reasons that the author of the pod cannot fix, by the person who can.
var others = map[finding.Person][]credential.Reason{
	finding.NamespaceOwner: {
		credential.ReasonNamespaceNotOpted, credential.ReasonNothingPermitted, credential.ReasonRoleNotPermitted,
		credential.ReasonTagNotPermitted, credential.ReasonTooManyGrants, credential.ReasonNamespaceBusy,
	},
	finding.AWSAdmin: {credential.ReasonSTSDenied, credential.ReasonSTSThrottled},
	finding.ClusterAdmin: {
		credential.ReasonTokenMissing, credential.ReasonTokenInvalid, credential.ReasonTokenExpired, credential.ReasonTokenEarly,
		credential.ReasonTokenLongLived, credential.ReasonTokenAudience, credential.ReasonTokenIssuer, credential.ReasonTokenNotPodBound,
		credential.ReasonTokenKey, credential.ReasonPodNotFound, credential.ReasonNamespaceNotFound, credential.ReasonAPIServerUnavailable,
		credential.ReasonRulesNamespace, credential.ReasonRulesAccount, credential.ReasonRulesRole, credential.ReasonRulesExternalID,
		credential.ReasonRulesSessionName, credential.ReasonRulesDuration, credential.ReasonRulesTag, credential.ReasonSTSUnavailable,
		credential.ReasonBrokerCredentials, credential.ReasonAuditUnavailable, credential.ReasonShuttingDown, credential.ReasonBrokerBusy,
		credential.ReasonBrokerUnreachable, credential.ReasonInternal,
	},
}

// personOf returns who can fix a refusal for that reason.
func personOf(reason credential.Reason) finding.Person {
	for person, reasons := range others {
		if slices.Contains(reasons, reason) {
			return person
		}
	}
	return finding.Author
}

// span is a part of a text.
type span struct {
	Text string
	Code bool
}

// spans splits a text at its backticks.
func spans(text string) (all []span) {
	for n, part := range strings.Split(text, "`") {
		if part != "" {
			all = append(all, span{part, n%2 == 1})
		}
	}
	return all
}
