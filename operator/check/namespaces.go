package check

import (
	"fmt"
	"maps"
	"slices"

	apierrors "k8s.io/apimachinery/pkg/api/errors"

	"github.com/credence-iam/credence/broker/policy"
	"github.com/credence-iam/credence/operator/finding"
	"github.com/credence-iam/credence/operator/survey"
)

// some returns "1 pod" or "12 pods".
func some(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}

func optInLabels(s *snapshot, r *results) {
	if apierrors.IsNotFound(s.Namespaces.Err) {
		r.fail("namespace/"+s.Scope, &finding.Remedy{Who: finding.Author, What: "Correct the name", Commands: []string{s.Target.Command("kubectl get namespaces")}}, "it does not exist")
		return
	}
	if unread(r, s.Namespaces) {
		return
	}
	n := s.Namespaces.Value
	if s.Scope != "" && len(n.OptedIn) == 0 && n.BadLabel.Count == 0 {
		r.warn("namespace/"+s.Scope, &finding.Remedy{Who: finding.NamespaceOwner, What: "Opt it in, and say which roles it permits", Page: "docs/install.md", Commands: []string{
			s.Target.Command("kubectl label namespace %s %s=%s", s.Scope, s.Keys.Name(policy.Inject), policy.Enabled),
		}}, "it is not opted in, so its pods get no sidecar")
		return
	}
	if n.BadLabel.Count > 0 {
		r.warn("", &finding.Remedy{
			Who: finding.NamespaceOwner, What: "Set the label to enabled, or to disabled to leave a namespace out on purpose", Commands: n.BadLabel.Commands, Page: "docs/annotations.md",
		}, "%s with a value of label %s that opts nothing in: %s", some(n.BadLabel.Count, "namespace"), s.Keys.Name(policy.Inject), &n.BadLabel)
		return
	}
	r.ok("%d of %s opted in", len(n.OptedIn), some(n.Total, "namespace"))
}

func trust(s *snapshot, r *results) {
	if unread(r, s.Namespaces) || unread(r, s.Published) {
		return
	}
	p, name := s.Published.Value, s.TrustName()
	logs := s.Target.Command("kubectl -n %s logs -l app.kubernetes.io/component=broker --tail=-1 --prefix | grep -i roots", s.Namespace)
	repair := func(what string, commands ...string) *finding.Remedy {
		return &finding.Remedy{Who: finding.ClusterAdmin, What: what, Commands: commands, Page: "docs/certificates.md"}
	}
	want, exists := p.Digests[s.Namespace]
	switch {
	case !exists:
		r.fail("namespace/"+s.Namespace, repair("See in the brokers' logs why none of them publishes the roots", logs),
			"ConfigMap %s does not exist, so the brokers have published no roots", name)
		return
	case p.Err != nil:
		r.fail("namespace/"+s.Namespace, repair("Remove the ConfigMap; the brokers write it again", s.Target.Command("kubectl -n %s delete configmap %s", s.Namespace, name)),
			"ConfigMap %s has no valid roots: %v", name, p.Err)
		return
	}
	var missing, differ survey.Tally
	for _, ns := range slices.Sorted(maps.Keys(s.Namespaces.Value.OptedIn)) {
		switch got, ok := p.Digests[ns]; {
		case !ok:
			missing.Add(ns, "")
		case got != want:
			differ.Add(ns, s.Target.Command("kubectl -n %s get configmap %s -o yaml", ns, name))
		}
	}
	if missing.Count > 0 {
		r.fail("", repair("See in the brokers' logs why they cannot write it", logs), "ConfigMap %s is missing in %s, whose pods cannot start: %s", name, some(missing.Count, "opted-in namespace"), &missing)
	}
	if differ.Count > 0 {
		r.fail("", repair("See who changes it; the brokers repair it within a minute", append(differ.Commands, logs)...),
			"ConfigMap %s has other roots than that of namespace %s in %s: %s", name, s.Namespace, some(differ.Count, "namespace"), &differ)
	}
	if missing.Count+differ.Count == 0 {
		r.ok("%s in all opted-in namespaces (%d), with the same roots (%d)", name, len(s.Namespaces.Value.OptedIn), len(p.Roots))
	}
}

func permittedRoles(s *snapshot, r *results) {
	if unread(r, s.Namespaces) {
		return
	}
	n := s.Namespaces.Value
	remedy := func(t survey.Tally) *finding.Remedy {
		return &finding.Remedy{Who: finding.NamespaceOwner, What: "Correct annotation " + s.Keys.Name(policy.Permitted) + ", or have an entry for the namespace added to the rules file", Commands: t.Commands, Page: "docs/annotations.md"}
	}
	if n.Invalid.Count > 0 {
		r.fail("", remedy(n.Invalid), "%s with an invalid annotation, so all of its annotated pods are refused: %s", some(n.Invalid.Count, "namespace"), &n.Invalid)
	}
	if n.Nothing.Count > 0 {
		r.warn("", remedy(n.Nothing), "%s opted in but permitting no role, so all of its annotated pods are refused: %s", some(n.Nothing.Count, "namespace"), &n.Nothing)
	}
	if n.Invalid.Count+n.Nothing.Count == 0 {
		r.ok("all opted-in namespaces permit roles")
	}
}

func permitsAnyRole(s *snapshot, r *results) {
	if unread(r, s.Namespaces) {
		return
	}
	n := s.Namespaces.Value
	for _, found := range []struct {
		what string
		t    *survey.Tally
	}{{"all roles of all accounts", &n.AnyRole}, {"all roles of an account", &n.AccountRole}} {
		if found.t.Count > 0 {
			r.warn("", &finding.Remedy{
				Who:  finding.NamespaceOwner,
				What: "Permit only the roles that pods of the namespace need, for example by an expression with their prefix. Or limit it by the rules file", Commands: found.t.Commands, Page: "docs/rules.md",
			}, "%s permitting %s: %s", some(found.t.Count, "namespace"), found.what, found.t)
		}
	}
	if n.AnyRole.Count+n.AccountRole.Count == 0 {
		r.ok("no opted-in namespace permits all roles")
	}
}

func podSecurity(s *snapshot, r *results) {
	if unread(r, s.Namespaces) {
		return
	}
	n := s.Namespaces.Value
	if n.BadLevel.Count > 0 {
		r.warn("", &finding.Remedy{Who: finding.NamespaceOwner, What: "Write privileged, baseline or restricted; the sidecar is admitted by all of them", Commands: n.BadLevel.Commands},
			"%s with an invalid value of label %s, which the API server treats as restricted: %s", some(n.BadLevel.Count, "namespace"), survey.EnforceLabel, &n.BadLevel)
		return
	}
	r.ok("PodSecurity of opted-in namespaces: %d restricted, %d baseline, %d privileged; the sidecar is admitted by all", n.Levels["restricted"], n.Levels["baseline"], n.Levels["privileged"]+n.Levels[""])
}
