//go:build unix

package chart_test

import (
	"maps"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	rbacv1 "k8s.io/api/rbac/v1"

	"github.com/credence-iam/credence/integration/chart"
)

// TestRights lists all rights of the programs. A new right needs its reason here.
func TestRights(t *testing.T) {
	t.Parallel()
	read := []string{"get", "list", "watch"}
	wantCluster := map[string][]rbacv1.PolicyRule{
		"credence-broker": {
			// The watches and live reads: broker/kube.
			{APIGroups: []string{""}, Resources: []string{"pods", "namespaces", "serviceaccounts"}, Verbs: read},
			// The keys that verify tokens: broker/kube. See the reviews below.
			{NonResourceURLs: []string{"/openid/v1/jwks", "/.well-known/openid-configuration"}, Verbs: []string{"get"}},
			// The Events about refusals: broker/kube.
			{APIGroups: []string{"events.k8s.io"}, Resources: []string{"events"}, Verbs: []string{"create"}},
			// The roots, published by server-side apply: certs/trust.
			{APIGroups: []string{""}, Resources: []string{"configmaps"}, ResourceNames: []string{"credence-trust"}, Verbs: []string{"list", "watch", "create", "patch"}},
			// The owner of the published ConfigMaps: certs/trust.
			{APIGroups: []string{"rbac.authorization.k8s.io"}, Resources: []string{"clusterroles"}, ResourceNames: []string{"credence-broker"}, Verbs: []string{"get"}},
		},
		"credence-webhook": {
			{APIGroups: []string{""}, Resources: []string{"namespaces"}, Verbs: read},
		},
	}
	wantNamespace := map[string][]rbacv1.PolicyRule{
		"credence-broker": {
			// The trust record: certs/trust.
			{APIGroups: []string{""}, Resources: []string{"configmaps"}, ResourceNames: []string{"credence-trust"}, Verbs: []string{"get"}},
			// The list of brokers: broker/kube.
			{APIGroups: []string{"discovery.k8s.io"}, Resources: []string{"endpointslices"}, Verbs: []string{"list", "watch"}},
			// The election of the publishing broker: certs/trust.
			{APIGroups: []string{"coordination.k8s.io"}, Resources: []string{"leases"}, Verbs: []string{"create"}},
			{APIGroups: []string{"coordination.k8s.io"}, Resources: []string{"leases"}, ResourceNames: []string{"credence-broker"}, Verbs: []string{"get", "update"}},
		},
	}
	for name := range cases(t) {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			all := objects(t, name)
			wantCluster := maps.Clone(wantCluster)
			if strings.Contains(strings.Join(deployment(t, all, "broker").Spec.Template.Spec.Containers[0].Args, " "), "--token-verification=tokenreview") {
				// The API server reviews tokens, and the broker reads no keys: broker/kube.
				wantCluster["credence-broker"] = slices.Clone(wantCluster["credence-broker"])
				wantCluster["credence-broker"][1] = rbacv1.PolicyRule{APIGroups: []string{"authentication.k8s.io"}, Resources: []string{"tokenreviews"}, Verbs: []string{"create"}}
			}
			cluster, namespace := map[string][]rbacv1.PolicyRule{}, map[string][]rbacv1.PolicyRule{}
			for _, role := range chart.Of[*rbacv1.ClusterRole](all) {
				if role.AggregationRule != nil || hasAggregationLabel(role.Labels) {
					t.Errorf("ClusterRole %s is aggregated: it adds its rules to other roles, or gets theirs", role.Name)
				}
				cluster[role.Name] = role.Rules
			}
			for _, role := range chart.Of[*rbacv1.Role](all) {
				namespace[role.Namespace+"/"+role.Name] = role.Rules
			}
			if diff := cmp.Diff(wantCluster, cluster); diff != "" {
				t.Errorf("rights in the cluster (- want, + got):\n%s", diff)
			}
			if diff := cmp.Diff(map[string][]rbacv1.PolicyRule{chart.Namespace + "/credence-broker": wantNamespace["credence-broker"]}, namespace); diff != "" {
				t.Errorf("rights in the namespace (- want, + got):\n%s", diff)
			}

			var bound []string
			for _, b := range chart.Of[*rbacv1.ClusterRoleBinding](all) {
				bound = append(bound, binding("ClusterRole", b.RoleRef, b.Subjects))
			}
			for _, b := range chart.Of[*rbacv1.RoleBinding](all) {
				bound = append(bound, binding(b.Namespace, b.RoleRef, b.Subjects))
			}
			want := []string{
				"ClusterRole: ClusterRole credence-broker to ServiceAccount credence/credence-broker",
				"ClusterRole: ClusterRole credence-webhook to ServiceAccount credence/credence-webhook",
				"credence: Role credence-broker to ServiceAccount credence/credence-broker",
			}
			if diff := cmp.Diff(want, bound); diff != "" {
				t.Errorf("bindings (- want, + got):\n%s", diff)
			}
		})
	}
}

func hasAggregationLabel(labels map[string]string) bool {
	for key := range labels {
		if strings.HasPrefix(key, "rbac.") {
			return true
		}
	}
	return false
}

func binding(where string, role rbacv1.RoleRef, subjects []rbacv1.Subject) string {
	text := where + ": " + role.Kind + " " + role.Name + " to"
	for _, s := range subjects {
		text += " " + s.Kind + " " + s.Namespace + "/" + s.Name
	}
	return text
}
