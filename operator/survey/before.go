package survey

import (
	"context"
	"strings"
	"sync"

	authorizationv1 "k8s.io/api/authorization/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
)

// created are the kinds of objects that helm creates, those of a namespace last.
var created = []struct {
	group      string
	resources  string
	namespaced bool
}{
	{"", "namespaces", false},
	{"rbac.authorization.k8s.io", "clusterroles clusterrolebindings", false},
	{"admissionregistration.k8s.io", "mutatingwebhookconfigurations validatingadmissionpolicies validatingadmissionpolicybindings", false},
	{"", "serviceaccounts services configmaps secrets", true}, // Helm keeps its release in a Secret.
	{"apps", "deployments", true},
	{"batch", "jobs", true},
	{"policy", "poddisruptionbudgets", true},
	{"rbac.authorization.k8s.io", "roles rolebindings", true},
	{"cert-manager.io", "certificates issuers", true},
}

// yours returns the rights for an installation that the user lacks.
func (g *gatherer) yours(ctx context.Context) (missing []string, err error) {
	var (
		mu  sync.Mutex
		run []func()
	)
	for _, kind := range created {
		for resource := range strings.FieldsSeq(kind.resources) {
			a := &authorizationv1.ResourceAttributes{Group: kind.group, Resource: resource, Verb: "create"}
			text := strings.TrimSuffix("create "+resource+"."+kind.group, ".")
			if kind.namespaced {
				a.Namespace = g.s.Namespace
				text += " -n " + g.s.Namespace
			}
			run = append(run, func() {
				review, failed := g.kube.AuthorizationV1().SelfSubjectAccessReviews().Create(ctx, &authorizationv1.SelfSubjectAccessReview{
					Spec: authorizationv1.SelfSubjectAccessReviewSpec{ResourceAttributes: a},
				}, metav1.CreateOptions{})
				mu.Lock()
				defer mu.Unlock()
				if failed != nil {
					err = failed
				} else if !review.Status.Allowed {
					missing = append(missing, text)
				}
			})
		}
	}
	all(run...)
	return missing, err
}

// tryCertificate creates a Certificate in a dry run, as cert-manager's own tool does. The API server stores nothing.
func (g *gatherer) tryCertificate(ctx context.Context) error {
	_, err := g.objects.Resource(certificatesResource).Namespace(metav1.NamespaceDefault).Create(ctx, &unstructured.Unstructured{Object: map[string]any{
		"apiVersion": "cert-manager.io/v1", "kind": "Certificate",
		"metadata": map[string]any{"generateName": "credence-check-"},
		"spec": map[string]any{
			"secretName": "credence-check", "dnsNames": []any{"credence-check.example.com"},
			"issuerRef": map[string]any{"name": "credence-check"},
		},
	}}, metav1.CreateOptions{DryRun: []string{metav1.DryRunAll}})
	return err
}
