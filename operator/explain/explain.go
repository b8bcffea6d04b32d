package explain

import (
	"fmt"
	"strings"

	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/operator/finding"
	"github.com/credence-iam/credence/operator/snapshot"
)

// Explain returns the diagnosis. Its steps are in the order in which each depends on those before it: brokers come before
// the roots that they publish, and before what a sidecar says about a broker that it cannot reach.
func Explain(of *snapshot.Snapshot) Explanation {
	s := subject{of}
	x := Explanation{Report: finding.Report{Subject: s.subject()}}
	before := []func() []finding.Finding{s.installation, s.rulesFile, s.label, s.annotations, s.injectable, s.permission, s.admission, s.quota, s.injection}
	if s.Installation.Found == nil {
		before = before[:1]
	}
	for _, step := range before {
		x.Add(step()...)
	}
	switch {
	case s.Installation.Found == nil:
	case s.running() && s.Sidecar() != nil:
		for _, step := range []func() []finding.Finding{s.start, s.clocks, s.brokers, s.ownCredentials, s.trust, s.token, s.network, s.session, s.sts, s.environment, s.trial} {
			x.Add(step()...)
		}
		if x.Worst() != finding.Failed {
			x.Add(s.otherFailure()...)
		}
	case s.annotated():
		x.Add(s.brokers()...)
		x.Add(s.ownCredentials()...)
		x.Add(s.environment()...)
	}
	x.Conclusion = s.conclude(&x.Report)
	_, wrong := x.Cause()
	x.Healthy = !wrong && (!s.running() || s.hasCredentials())
	return x
}

// conclude returns the last sentence.
func (s subject) conclude(r *finding.Report) string {
	if cause, ok := r.Cause(); ok {
		begin := "The cause"
		if cause.State == finding.Warning {
			begin = "A warning"
			if s.running() && s.hasCredentials() {
				begin = "The pod has credentials, but"
			}
		}
		sentence := begin + ": " + strings.TrimSuffix(cause.Text, ".")
		if !strings.HasSuffix(sentence, "?") {
			sentence += "."
		}
		if m := cause.Remedy; m != nil {
			sentence += fmt.Sprintf(" What to do (%s): %s.", m.Who, m.What)
		}
		return sentence
	}
	unknown := 0
	for _, f := range r.Findings {
		if f.State == finding.Unknown {
			unknown++
		}
	}
	sentence := "Nothing is wrong"
	switch state := s.sidecarState(); {
	case s.running() && s.hasCredentials() && state.session.Role != "":
		sentence = fmt.Sprintf("The pod has credentials of %s until %s", state.session.Role, clock(state.session.Expiration))
	case s.running() && s.hasCredentials():
		sentence = "The pod has credentials"
	case s.running():
		sentence = "The pod waits for its first credentials"
	}
	switch unknown {
	case 0:
		return sentence + "."
	case 1:
		return sentence + "; one step is not known."
	default:
		return fmt.Sprintf("%s; %d steps are not known.", sentence, unknown)
	}
}

// otherFailure is the sidecar's last failure, if no step explains it.
func (s subject) otherFailure() []finding.Finding {
	failure := s.sidecarState().failure
	if failure.Reason == "" {
		return nil
	}
	text := fmt.Sprintf("the sidecar's last attempt failed %s ago with %s: %s", age(s.Now.Sub(failure.Time)), failure.Reason, short(failure.Error))
	if fixedByItself(failure.Reason) {
		return []finding.Finding{unless(s.hasCredentials(), failed("last attempt", text+"; what it refused is permitted now",
			finding.Remedy{Who: finding.Author, What: "wait: the sidecar tries again within a minute", Commands: []string{s.in("logs", s.Pod.Name, "-c", "credence-sidecar", "--tail=5")}}))}
	}
	who := finding.ClusterAdmin
	if strings.HasPrefix(string(failure.Reason), "POD_") || strings.HasPrefix(string(failure.Reason), "TOKEN_") || failure.Reason == credential.ReasonServiceAccountGone {
		return []finding.Finding{unless(s.hasCredentials(), failed("last attempt", text, finding.Remedy{
			Who: finding.Author, What: "recreate the pod, so that it gets a new token", Commands: s.recreate(), Page: "docs/errors.md",
		}))}
	}
	return []finding.Finding{unless(s.hasCredentials(), failed("last attempt", text, finding.Remedy{
		Who: who, What: "look up the reason, and read the brokers' logs", Page: "docs/errors.md",
		Commands: []string{s.inCredence("logs", "-l", "app.kubernetes.io/component=broker", "--tail=50", "--prefix")},
	}))}
}

// fixedByItself reports whether reason is a refusal about the namespace's or the pod's annotations. If these are right now,
// somebody has fixed them since.
func fixedByItself(reason credential.Reason) bool {
	switch reason {
	case credential.ReasonNamespaceNotOpted, credential.ReasonNothingPermitted, credential.ReasonRoleNotPermitted, credential.ReasonTagNotPermitted,
		credential.ReasonAnnotationInvalid, credential.ReasonRoleInvalid, credential.ReasonRoleMissing, credential.ReasonNamespaceBusy,
		credential.ReasonRulesNamespace, credential.ReasonRulesAccount, credential.ReasonRulesRole, credential.ReasonRulesExternalID,
		credential.ReasonRulesSessionName, credential.ReasonRulesDuration, credential.ReasonRulesTag:
		return true
	default:
		return false
	}
}
