//go:build unix

package chart_test

import (
	"cmp"
	"testing"
	"time"

	cmv1 "github.com/cert-manager/cert-manager/pkg/apis/certmanager/v1"
	cmmeta "github.com/cert-manager/cert-manager/pkg/apis/meta/v1"
	gocmp "github.com/google/go-cmp/cmp"
	admissionregistrationv1 "k8s.io/api/admissionregistration/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"

	"github.com/credence-iam/credence/integration/chart"
)

// issued has the values from which the chart makes the certificates of the broker and the webhook.
type issued struct {
	issuer                      *cmmeta.IssuerReference // nil: the installation's own CA
	duration                    time.Duration           // zero: 90 days, cert-manager's default
	renewBeforePercentage       int32                   // zero: 33, which leaves a month to notice that renewal fails
	brokerSecret, webhookSecret string                  // empty: credence-broker-tls, credence-webhook-tls
}

// objects returns the specs of the Issuers and Certificates that an installation needs, by name.
func (l issued) objects() (issuers map[string]cmv1.IssuerSpec, certificates map[string]cmv1.CertificateSpec) {
	issuers, certificates = map[string]cmv1.IssuerSpec{}, map[string]cmv1.CertificateSpec{}
	reference := func(name string) *cmmeta.IssuerReference {
		return &cmmeta.IssuerReference{Group: "cert-manager.io", Kind: "Issuer", Name: name}
	}
	// ECDSA on P-256: fast, and every client of TLS 1.3 supports it.
	key := func(rotation cmv1.PrivateKeyRotationPolicy) *cmv1.CertificatePrivateKey {
		return &cmv1.CertificatePrivateKey{Algorithm: cmv1.ECDSAKeyAlgorithm, Size: 256, RotationPolicy: rotation}
	}
	if l.issuer == nil {
		l.issuer = reference("credence-ca")
		issuers["credence-selfsigned"] = cmv1.IssuerSpec{IssuerConfig: cmv1.IssuerConfig{SelfSigned: &cmv1.SelfSignedIssuer{}}}
		issuers["credence-ca"] = cmv1.IssuerSpec{IssuerConfig: cmv1.IssuerConfig{CA: &cmv1.CAIssuer{SecretName: "credence-ca"}}}
		certificates["credence-ca"] = cmv1.CertificateSpec{
			IsCA: true, CommonName: "credence-ca", SecretName: "credence-ca", IssuerRef: *reference("credence-selfsigned"),
			// Most clusters do not live that long. A renewed CA keeps its key, because cert-manager does not
			// renew a leaf when its CA changes.
			Duration: &metav1.Duration{Duration: 10 * 365 * 24 * time.Hour}, PrivateKey: key(cmv1.RotationPolicyNever),
			RenewBeforePercentage: new(int32(33)), Usages: []cmv1.KeyUsage{cmv1.UsageCertSign, cmv1.UsageCRLSign},
		}
	}
	for name, secret := range map[string]string{
		"credence-broker":  cmp.Or(l.brokerSecret, "credence-broker-tls"),
		"credence-webhook": cmp.Or(l.webhookSecret, "credence-webhook-tls"),
	} {
		certificates[name] = cmv1.CertificateSpec{
			SecretName: secret, IssuerRef: *l.issuer,
			DNSNames:              []string{name + "." + chart.Namespace + ".svc"}, // the one name that clients dial
			Duration:              &metav1.Duration{Duration: cmp.Or(l.duration, 90*24*time.Hour)},
			RenewBeforePercentage: new(cmp.Or(l.renewBeforePercentage, 33)),
			PrivateKey:            key(cmv1.RotationPolicyAlways),
			Usages:                []cmv1.KeyUsage{cmv1.UsageDigitalSignature, cmv1.UsageServerAuth},
		}
	}
	return issuers, certificates
}

func TestCertificatesAndIssuers(t *testing.T) {
	t.Parallel()
	for values, want := range map[string]issued{
		"defaults":  {},
		"openshift": {},
		"issuer": {
			issuer:   &cmmeta.IssuerReference{Group: "awspca.cert-manager.io", Kind: "AWSPCAClusterIssuer", Name: "company"},
			duration: 720 * time.Hour, renewBeforePercentage: 50,
		},
		"everything": {
			issuer:   &cmmeta.IssuerReference{Group: "issuers.example.com", Kind: "Issuer", Name: "ours"},
			duration: 90 * time.Minute, renewBeforePercentage: 40,
			brokerSecret: "broker-certificate", webhookSecret: "webhook-certificate",
		},
	} {
		issuers, certificates := map[string]cmv1.IssuerSpec{}, map[string]cmv1.CertificateSpec{}
		all := objects(t, values)
		for _, o := range chart.Of[*cmv1.Issuer](all) {
			issuers[o.Name] = o.Spec
		}
		for _, o := range chart.Of[*cmv1.Certificate](all) {
			certificates[o.Name] = o.Spec
		}
		wantIssuers, wantCertificates := want.objects()
		if diff := gocmp.Diff(wantIssuers, issuers); diff != "" {
			t.Errorf("%s: Issuers (- want, + got):\n%s", values, diff)
		}
		if diff := gocmp.Diff(wantCertificates, certificates); diff != "" {
			t.Errorf("%s: Certificates (- want, + got):\n%s", values, diff)
		}
	}
	all := objects(t, "secrets")
	if n := len(chart.Of[*cmv1.Issuer](all)) + len(chart.Of[*cmv1.Certificate](all)); n > 0 {
		t.Errorf("the user provides the Secrets, but the chart has %d objects of cert-manager, which may not be installed", n)
	}
}

// TestCertificatesReachTheirUsers checks that pods mount the Secret of their Certificate, and that the API server
// gets the webhook's roots either from cert-manager or from the user's values.
func TestCertificatesReachTheirUsers(t *testing.T) {
	t.Parallel()
	for name := range cases(t) {
		all := objects(t, name)
		for _, certificate := range chart.Of[*cmv1.Certificate](all) {
			if certificate.Spec.IsCA {
				continue
			}
			component := certificate.Name[len("credence-"):]
			volumes := deployment(t, all, component).Spec.Template.Spec.Volumes
			if len(volumes) == 0 || volumes[0].Name != "tls" || volumes[0].Secret.SecretName != certificate.Spec.SecretName {
				t.Errorf("%s: the %s mounts %v, its certificate is in Secret %s", name, component, volumes, certificate.Spec.SecretName)
			}
		}
		hook := webhookConfiguration(t, all)
		from := hook.Annotations["cert-manager.io/inject-ca-from"]
		bundle := hook.Webhooks[0].ClientConfig.CABundle
		roots := configMaps(all, "credence-roots")
		switch {
		case len(roots) == 0 && from == "credence/credence-webhook" && bundle == nil:
		case len(roots) == 1 && from == "" && string(bundle) == roots[0].Data["roots.pem"]:
		default:
			t.Errorf("%s: roots injected from %q, a bundle of %d bytes, and %d ConfigMaps: want cert-manager's injection, or the user's roots in both places",
				name, from, len(bundle), len(roots))
		}
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
