//go:build unix

package chart_test

import (
	"slices"
	"testing"
	"time"

	cmv1 "github.com/cert-manager/cert-manager/pkg/apis/certmanager/v1"
	cmmeta "github.com/cert-manager/cert-manager/pkg/apis/meta/v1"
	"github.com/google/go-cmp/cmp"
	admissionregistrationv1 "k8s.io/api/admissionregistration/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"

	"github.com/credence-iam/credence/certs/pki"
	"github.com/credence-iam/credence/integration/chart"
)

// TestCertificatesEqualPKI: what programs compare a cluster with is what the chart installs.
func TestCertificatesEqualPKI(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		values string
		cfg    pki.Config
		count  int
	}{
		{"defaults", pki.Config{}, 5},
		{"openshift", pki.Config{}, 5},
		{"issuer", pki.Config{
			Issuer:   &cmmeta.IssuerReference{Group: "awspca.cert-manager.io", Kind: "AWSPCAClusterIssuer", Name: "company"},
			Duration: 720 * time.Hour, RenewBeforePercentage: 50,
		}, 2},
		{"everything", pki.Config{
			Issuer:   &cmmeta.IssuerReference{Group: "issuers.example.com", Kind: "Issuer", Name: "ours"},
			Duration: 90 * time.Minute, RenewBeforePercentage: 40,
			BrokerSecret: "broker-certificate", WebhookSecret: "webhook-certificate",
		}, 2},
	} {
		t.Run(tc.values, func(t *testing.T) {
			t.Parallel()
			type pair struct {
				Issuers      map[string]*cmv1.Issuer
				Certificates map[string]*cmv1.Certificate
			}
			all := objects(t, tc.values)
			got := pair{byName(chart.Of[*cmv1.Issuer](all)), byName(chart.Of[*cmv1.Certificate](all))}
			tc.cfg.Namespace = chart.Namespace
			issuers, certificates := pki.Objects(tc.cfg)
			want := pair{byName(issuers), byName(certificates)}
			if n := len(issuers) + len(certificates); n != tc.count {
				t.Errorf("package pki makes %d objects, want %d", n, tc.count)
			}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("the chart differs from package pki (- pki, + chart):\n%s", diff)
			}
		})
	}
	all := objects(t, "secrets")
	if n := len(chart.Of[*cmv1.Issuer](all)) + len(chart.Of[*cmv1.Certificate](all)); n > 0 {
		t.Errorf("with Secrets that the user keeps, the chart has %d objects of cert-manager, which need not be there", n)
	}
}

// byName indexes objects, and drops the labels, which package pki leaves to its callers.
func byName[T metav1.Object](objects []T) map[string]T {
	named := map[string]T{}
	for _, object := range objects {
		object.SetLabels(nil)
		named[object.GetName()] = object
	}
	return named
}

// TestCertificatesReachTheirUsers: each Secret is the one that its pods mount, its name is the one that clients
// dial, and the API server learns the webhook's roots in one of two ways.
func TestCertificatesReachTheirUsers(t *testing.T) {
	t.Parallel()
	for name := range cases(t) {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			all := objects(t, name)
			for _, certificate := range chart.Of[*cmv1.Certificate](all) {
				if certificate.Spec.IsCA {
					continue
				}
				component := certificate.Name[len("credence-"):]
				volumes := deployment(t, all, component).Spec.Template.Spec.Volumes
				if len(volumes) == 0 || volumes[0].Name != "tls" || volumes[0].Secret.SecretName != certificate.Spec.SecretName {
					t.Errorf("%s mounts %v, its certificate is in Secret %s", component, volumes, certificate.Spec.SecretName)
				}
				if got, want := certificate.Spec.DNSNames, []string{"credence-" + component + "." + chart.Namespace + ".svc"}; !cmp.Equal(got, want) {
					t.Errorf("the certificate of %s is for %q, want %q", component, got, want)
				}
			}
			hook := webhookConfiguration(t, all)
			from := hook.Annotations["cert-manager.io/inject-ca-from"]
			bundle := hook.Webhooks[0].ClientConfig.CABundle
			roots := slices.DeleteFunc(chart.Of[*corev1.ConfigMap](all), func(c *corev1.ConfigMap) bool { return c.Name != "credence-roots" })
			switch {
			case len(roots) == 0 && from == "credence/credence-webhook" && bundle == nil:
			case len(roots) == 1 && from == "" && string(bundle) == roots[0].Data["roots.pem"]:
			default:
				t.Errorf("roots injected from %q, a bundle of %d bytes, and %d ConfigMaps: want cert-manager's injection, or what the user gave in both places", from, len(bundle), len(roots))
			}
		})
	}
}

func webhookConfiguration(t *testing.T, all []runtime.Object) *admissionregistrationv1.MutatingWebhookConfiguration {
	t.Helper()
	found := chart.Of[*admissionregistrationv1.MutatingWebhookConfiguration](all)
	if len(found) != 1 || len(found[0].Webhooks) != 1 {
		t.Fatalf("there are %d MutatingWebhookConfigurations, want one with one webhook", len(found))
	}
	return found[0]
}
