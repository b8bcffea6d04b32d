// Package pki says how Credence's certificates are issued: the cert-manager Issuers and Certificates of
// an installation, as typed objects.
//
// The Helm chart renders the same objects, and a test holds both equal, so that what a program compares a
// cluster with is what the chart installs. Unless somebody brings an issuer of their own, a self-signed
// Issuer issues a CA once in ten years, and an Issuer of that CA issues what broker and webhook serve.
//
// It makes objects and nothing else: it neither talks to a cluster nor issues anything. What happens to
// the files in the end is package certs' concern.
package pki

import (
	"cmp"
	"time"

	cmv1 "github.com/cert-manager/cert-manager/pkg/apis/certmanager/v1"
	cmmeta "github.com/cert-manager/cert-manager/pkg/apis/meta/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// Names of the objects, the same in every installation.
const (
	// SelfSigned is the Issuer of the CA's certificate.
	SelfSigned = "credence-selfsigned"
	// CA is the CA's Certificate, its Secret, and the Issuer that signs with it.
	CA = "credence-ca"
	// Broker is the broker's Certificate, and the name of its Service.
	Broker = "credence-broker"
	// Webhook is the webhook's Certificate, and the name of its Service.
	Webhook = "credence-webhook"

	// BrokerSecret is the Secret of the broker's certificate, unless another one is asked for.
	BrokerSecret = "credence-broker-tls"
	// WebhookSecret is the Secret of the webhook's certificate, unless another one is asked for.
	WebhookSecret = "credence-webhook-tls"
)

const (
	// caDuration outlives every cluster that is upgraded by replacing it, and most others. A CA that is
	// renewed keeps its key: cert-manager signs no leaf anew when its CA changes.
	caDuration = 10 * 365 * 24 * time.Hour
	// defaultDuration is cert-manager's own, 90 days.
	defaultDuration = 90 * 24 * time.Hour
	// renewBeforePercentage leaves a month of 90 days to notice that renewal fails.
	renewBeforePercentage = 33
	keyBits               = 256 // ECDSA on P-256: fast, and spoken by everything that speaks TLS 1.3
)

// Config configures [Objects].
type Config struct {
	// Namespace is where Credence is installed. Required.
	Namespace string
	// Issuer issues the certificates of broker and webhook. Nil: a CA of the installation's own.
	Issuer *cmmeta.IssuerReference
	// Duration is how long those certificates are valid. Default 90 days.
	Duration time.Duration
	// RenewBeforePercentage is how much of it is left when they are renewed. Default 33.
	RenewBeforePercentage int32
	// BrokerSecret and WebhookSecret take the certificates. Default [BrokerSecret] and [WebhookSecret].
	BrokerSecret, WebhookSecret string
}

// Objects returns the Issuers and Certificates of an installation, in the order in which they depend on
// each other. Labels are left to the caller.
func Objects(cfg Config) (issuers []*cmv1.Issuer, certificates []*cmv1.Certificate) {
	issuer := cfg.Issuer
	if issuer == nil {
		issuer = reference(CA)
		issuers = append(issuers, selfSigned(cfg.Namespace), caIssuer(cfg.Namespace))
		certificates = append(certificates, ca(cfg.Namespace))
	}
	return issuers, append(certificates,
		cfg.leaf(Broker, cmp.Or(cfg.BrokerSecret, BrokerSecret), *issuer),
		cfg.leaf(Webhook, cmp.Or(cfg.WebhookSecret, WebhookSecret), *issuer))
}

func selfSigned(namespace string) *cmv1.Issuer {
	return &cmv1.Issuer{
		TypeMeta:   typeMeta(cmv1.IssuerKind),
		ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: SelfSigned},
		Spec:       cmv1.IssuerSpec{IssuerConfig: cmv1.IssuerConfig{SelfSigned: &cmv1.SelfSignedIssuer{}}},
	}
}

func caIssuer(namespace string) *cmv1.Issuer {
	return &cmv1.Issuer{
		TypeMeta:   typeMeta(cmv1.IssuerKind),
		ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: CA},
		Spec:       cmv1.IssuerSpec{IssuerConfig: cmv1.IssuerConfig{CA: &cmv1.CAIssuer{SecretName: CA}}},
	}
}

func ca(namespace string) *cmv1.Certificate {
	return &cmv1.Certificate{
		TypeMeta:   typeMeta(cmv1.CertificateKind),
		ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: CA},
		Spec: cmv1.CertificateSpec{
			IsCA:                  true,
			CommonName:            CA,
			SecretName:            CA,
			Duration:              &metav1.Duration{Duration: caDuration},
			RenewBeforePercentage: new(int32(renewBeforePercentage)),
			PrivateKey:            privateKey(cmv1.RotationPolicyNever),
			Usages:                []cmv1.KeyUsage{cmv1.UsageCertSign, cmv1.UsageCRLSign},
			IssuerRef:             *reference(SelfSigned),
		},
	}
}

// leaf is the certificate of a Service, for the one name that its clients dial.
func (cfg Config) leaf(name, secret string, issuer cmmeta.IssuerReference) *cmv1.Certificate {
	return &cmv1.Certificate{
		TypeMeta:   typeMeta(cmv1.CertificateKind),
		ObjectMeta: metav1.ObjectMeta{Namespace: cfg.Namespace, Name: name},
		Spec: cmv1.CertificateSpec{
			SecretName:            secret,
			DNSNames:              []string{name + "." + cfg.Namespace + ".svc"},
			Duration:              &metav1.Duration{Duration: cmp.Or(cfg.Duration, defaultDuration)},
			RenewBeforePercentage: new(cmp.Or(cfg.RenewBeforePercentage, int32(renewBeforePercentage))),
			PrivateKey:            privateKey(cmv1.RotationPolicyAlways),
			Usages:                []cmv1.KeyUsage{cmv1.UsageDigitalSignature, cmv1.UsageServerAuth},
			IssuerRef:             issuer,
		},
	}
}

func privateKey(rotation cmv1.PrivateKeyRotationPolicy) *cmv1.CertificatePrivateKey {
	return &cmv1.CertificatePrivateKey{Algorithm: cmv1.ECDSAKeyAlgorithm, Size: keyBits, RotationPolicy: rotation}
}

// reference refers to an Issuer of the same namespace.
func reference(name string) *cmmeta.IssuerReference {
	return &cmmeta.IssuerReference{Group: cmv1.SchemeGroupVersion.Group, Kind: cmv1.IssuerKind, Name: name}
}

func typeMeta(kind string) metav1.TypeMeta {
	return metav1.TypeMeta{APIVersion: cmv1.SchemeGroupVersion.String(), Kind: kind}
}
