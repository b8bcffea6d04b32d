package policy_test

import (
	"fmt"
	"strings"
	"testing"

	"github.com/credence-iam/credence/broker/policy"
)

// BenchmarkGrant is the time of the decision that the broker makes for each call of a sidecar.
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
			// Kubernetes sets it on every namespace.
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

// BenchmarkRequest is the time to parse the annotations of a pod, which the webhook and the broker each do once: ordinary ones, and those that
// take the longest.
func BenchmarkRequest(b *testing.B) {
	keys := newKeys(b)
	list := func(n int, form string) string {
		var list []string
		for i := range n {
			list = append(list, fmt.Sprintf(form, i))
		}
		return strings.Join(list, ",")
	}
	ideographs := strings.Repeat("\U0003134a", 120) // at the end of the tables of package unicode
	tags := list(50, ideographs+"%d="+ideographs+ideographs)
	policies := `{"Statement":[],` + list(1500, `"%d":1`) + `}`
	containers := list(1000, strings.Repeat("c", 50)+"%d")
	for _, bench := range []struct {
		name  string
		pairs map[policy.Key]string
	}{
		{"plain", map[policy.Key]string{policy.Role: "reader"}},
		{"tags", map[policy.Key]string{policy.Role: "reader", policy.SessionTags: tags}},
		{"policy", map[policy.Key]string{policy.Role: "reader", policy.SessionPolicy: policies}},
		{"containers", map[policy.Key]string{policy.Role: "reader", policy.Containers: containers}},
		{"everything", map[policy.Key]string{policy.Role: "reader", policy.SessionTags: tags, policy.SessionPolicy: policies, policy.Containers: containers}},
		{"unknown", map[policy.Key]string{policy.Role: "reader", policy.Key(strings.Repeat("x", 63)): ""}},
	} {
		b.Run(bench.name, func(b *testing.B) {
			annotations := annotations(bench.pairs)
			b.ReportAllocs()
			for b.Loop() {
				keys.Request(annotations)
			}
		})
	}
}
