package policy_test

import (
	"testing"

	"github.com/credence-iam/credence/broker/policy"
)

// BenchmarkGrant is the decision that each call of a sidecar costs the broker.
func BenchmarkGrant(b *testing.B) {
	permitted := map[policy.Key]string{policy.Permitted: rolePrefix + "(reader|team/.*)"}
	limited := policy.File{KubernetesTags: true, SourceIdentity: policy.SourceServiceAccount, Namespaces: []policy.NamespaceRules{
		open("platform-*"), open("team-*"), edit("s*", func(n *policy.NamespaceRules) {
			n.Accounts, n.Roles = []string{"210987654321", "123456789012"}, []string{"/shared/*", "/reader"}
			n.ForcedTags = map[string]string{"team": "{namespace}", "environment": "production"}
		}),
	}}
	for _, bench := range []struct {
		name string
		pod  map[policy.Key]string
		ns   map[policy.Key]string
	}{
		{"limited", map[policy.Key]string{policy.Role: "reader", policy.SessionScope: "service-account"}, permitted},
		{"plain", map[policy.Key]string{policy.Role: "reader"}, permitted},
		{"globs", map[policy.Key]string{policy.Role: "reader"}, map[policy.Key]string{policy.AllowedRoles: `["writer","team/*","read*"]`}},
		{"all", map[policy.Key]string{
			policy.Role: rolePrefix + "team/reader", policy.SessionName: "session", policy.ExternalID: "ext/1", policy.SessionTags: "team=shop, cost=1",
			policy.SessionPolicy: `{"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": "s3:GetObject", "Resource": "*"}]}`,
			policy.PolicyARNs:    "arn:aws:iam::aws:policy/ReadOnlyAccess", policy.SessionScope: "pod", policy.Duration: "2h",
		}, map[policy.Key]string{policy.Permitted: rolePrefix + "(reader|team/.*)", policy.PermittedTags: "cost,team"}},
	} {
		b.Run(bench.name, func(b *testing.B) {
			pod, ns, rules := cart(bench.pod), shop(bench.ns), newRules(b, rolePrefix)
			if bench.name == "limited" {
				use(b, rules, limited)
			}
			// What other controllers put on nearly every pod and namespace.
			pod.Annotations["iam.amazonaws.com/service-account"] = "cart"
			pod.Annotations["kubectl.kubernetes.io/restartedAt"] = "2026-01-01T00:00:00Z"
			pod.Annotations["prometheus.io/scrape"] = "true"
			ns.Labels["kubernetes.io/metadata.name"] = "shop"
			b.ReportAllocs()
			for b.Loop() {
				if _, err := rules.Grant(pod, ns); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
