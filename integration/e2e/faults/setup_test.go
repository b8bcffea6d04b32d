//go:build linux

package faults

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/credence-iam/credence/broker/assume/ststest"
	"github.com/credence-iam/credence/integration/certmanager"
	"github.com/credence-iam/credence/integration/deployment"
	"github.com/credence-iam/credence/integration/stack"
	"github.com/credence-iam/credence/operator/finding"
	"github.com/credence-iam/credence/operator/netpolicy"
)

// elsewhere are the faults of faults.yaml that no test makes here, with the reason.
var elsewhere = map[string]string{
	"IRSA by the service account":      "it needs the webhook of EKS",
	"NetworkPolicy without DNS":        "the cluster's network has no policies, and its DNS is not in a pod",
	"clock of the brokers' node ahead": "all nodes have the clock of this machine; TestClock sets that of AWS",
	"clock of the pod's node behind":   "all nodes have the clock of this machine",
}

// long are the faults of the installation that make soak alone makes: each takes half a minute, and resembles another one.
var long = []string{
	"rules file without the namespace", "invalid rules file, and everything restarted", "unreachable STS, and new brokers",
	"pod with a token of an earlier audience", "audience of the webhook only", "NetworkPolicy of the brokers' namespace",
}

// further are faults as they are on a cluster with nodes.
var further = []fault{{
	Name: "connections to the brokers are dropped", Setup: []string{"network: drop"},
	Step: "network", Cause: "the sidecar cannot reach the brokers, which are ready", Who: finding.ClusterAdmin, Fix: "get networkpolicies",
}}

// externalID is what the role's trust policy requires in the fault of that name.
const externalID = "acme"

// fill replaces what only a person knows in a command.
func fill(command string) string {
	id, secret := d.STS.Keys()
	return strings.NewReplacer(`"SECRET_ACCESS_KEY"`, `"`+secret.Reveal()+`"`, `"ACCESS_KEY_ID"`, `"`+id+`"`, `"EXTERNAL_ID"`, `"`+externalID+`"`).Replace(command)
}

// editor returns an editor that corrects the rules file.
func editor() string { return filepath.Join(d.Cluster.Run().Dir(), "faults", "correct") }

// prepare carries out a line of faults.yaml.
func (b *broken) prepare(line string) {
	b.t.Helper()
	kind, what, _ := strings.Cut(line, ": ")
	switch kind {
	case "helm":
		b.helm(what)
	case "sts":
		b.sts(what)
	case "certificate":
		b.expire()
	case "network":
		b.person = drop(b.t)
	default:
		b.shell(strings.ReplaceAll(line, "OTHER_ROOT", base64.StdEncoding.EncodeToString(certificate(b.t, nil, nil, "other", time.Hour).roots)))
		if strings.Contains(line, `"kind":"NetworkPolicy"`) {
			b.enforce()
		}
	}
	script := "#!/bin/sh\nsed -i -e 's/namespace: \\[\\]/namespaces: [{match: [" + b.namespace + "], accounts: [\"*\"], roles: [\"*\"]}]/' -e 's/- till$/- " + b.namespace + "/' \"$1\"\n"
	if err := os.WriteFile(editor(), []byte(script), 0o700); err != nil {
		b.t.Fatal(err)
	}
}

// helm sets a value of the chart, such as a.b=c.
func (b *broken) helm(setting string) {
	b.t.Helper()
	path, value, _ := strings.Cut(setting, "=")
	keys := strings.Split(path, ".")
	text := "{" + strings.Join(keys, ": {") + ": " + value + strings.Repeat("}", len(keys))
	file := filepath.Join(b.t.TempDir(), "values.yaml")
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		b.t.Fatal(err)
	}
	args := []string{"--values=" + file}
	if path == "broker.env" {
		args = append(args, "--wait=hookOnly", "--no-hooks") // The brokers do not become ready.
		b.person = func() {                                  // No command can know which credentials the brokers should have.
			if err := d.Upgrade(b.t.Context()); err != nil {
				b.t.Fatal(err)
			}
		}
	}
	if err := d.Upgrade(b.t.Context(), args...); err != nil {
		b.t.Fatal(err)
	}
}

// sts sets how the STS behaves, until the person acts who can change AWS.
func (b *broken) sts(what string) {
	b.t.Helper()
	role := stack.RoleARN(b.app)
	b.person = func() { d.STS.SetRole(role, ststest.Behavior{}) }
	switch {
	case strings.HasPrefix(what, "deny"):
		d.STS.SetRole(role, ststest.Behavior{Deny: true})
	case strings.HasPrefix(what, "require external id"):
		d.STS.SetRole(role, ststest.Behavior{ExternalID: externalID})
		b.person = nil
	case strings.HasPrefix(what, "throttle"):
		d.STS.SetRole(role, ststest.Behavior{Fault: ststest.Throttling()})
	case strings.HasPrefix(what, "forget"):
		d.STS.SetRole(role, ststest.Behavior{Fault: &ststest.Fault{Code: "InvalidClientTokenId", Message: "The security token included in the request is invalid", Status: 403}})
	case what == "stop":
		d.STS.SetOutage(ststest.Refusing)
		b.person = func() { d.STS.SetOutage(ststest.NoOutage) }
	default:
		b.t.Fatalf("unknown: %s", what)
	}
}

// drop makes the nodes drop connections of pods to the brokers, until the returned function is called or the test ends.
func drop(t *testing.T) (accept func()) {
	t.Helper()
	brokers, err := d.Pods(t.Context(), "broker")
	if err != nil {
		t.Fatal(err)
	}
	rules := func(action string) (err error) {
		for _, p := range brokers {
			for _, node := range d.Cluster.Nodes() {
				_, failed := node.Output(context.WithoutCancel(t.Context()), nil, "iptables", "-w", action, "FORWARD", "-d", p.Status.PodIP, "-p", "tcp", "--dport", "9443", "-j", "DROP")
				err = errors.Join(err, failed)
			}
		}
		return err
	}
	if err := rules("-I"); err != nil {
		t.Fatal(err)
	}
	accept = sync.OnceFunc(func() {
		if err := rules("-D"); err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(accept)
	return accept
}

// enforce stands for a network plugin: it drops connections to the brokers until the policies allow those of the pod.
func (b *broken) enforce() {
	accept := drop(b.t)
	b.person = func() {
		ctx := b.t.Context()
		own, err := d.Client.NetworkingV1().NetworkPolicies(b.namespace).List(ctx, metav1.ListOptions{})
		brokers, err2 := d.Client.NetworkingV1().NetworkPolicies(deployment.Namespace).List(ctx, metav1.ListOptions{})
		pods, err3 := d.Client.CoreV1().Pods(b.namespace).List(ctx, metav1.ListOptions{LabelSelector: "app=" + b.app})
		targets, err4 := d.Pods(ctx, "broker")
		namespace, err5 := d.Client.CoreV1().Namespaces().Get(ctx, b.namespace, metav1.GetOptions{})
		credence, err6 := d.Client.CoreV1().Namespaces().Get(ctx, deployment.Namespace, metav1.GetOptions{})
		if err := errors.Join(err, err2, err3, err4, err5, err6); err != nil || len(pods.Items) == 0 {
			b.t.Fatalf("%d pods: %v", len(pods.Items), err)
		}
		from, to := netpolicy.End{Pod: &pods.Items[0], Namespace: namespace}, netpolicy.End{Pod: &targets[0], Namespace: credence}
		all := append(own.Items, brokers.Items...)
		if blocking := append(netpolicy.Egress(all, from, to, 9443, corev1.ProtocolTCP), netpolicy.Ingress(all, from, to, 9443, corev1.ProtocolTCP)...); len(blocking) > 0 {
			b.t.Fatalf("after the remedy, %v do not allow the connection", blocking)
		}
		accept()
	}
}

// expire makes the certificate of the webhook expire while cert-manager does not run.
func (b *broken) expire() {
	scale := func(replicas int) string {
		return fmt.Sprintf("kubectl -n %s scale deployment cert-manager --replicas=%d", certmanager.Namespace, replicas)
	}
	b.shell(scale(0) + " && kubectl -n " + certmanager.Namespace + " wait --for=delete pod -l " + deployment.Selector("controller"))
	b.person = func() { b.shell(scale(1)) }
	secrets := d.Client.CoreV1().Secrets(deployment.Namespace)
	ca, err := secrets.Get(b.t.Context(), "credence-ca", metav1.GetOptions{})
	if err != nil {
		b.t.Fatal(err)
	}
	expired := certificate(b.t, ca.Data["tls.crt"], ca.Data["tls.key"], "credence-webhook.credence.svc", -time.Minute)
	patch := fmt.Appendf(nil, `{"data":{"tls.crt":%q,"tls.key":%q}}`, base64.StdEncoding.EncodeToString(expired.roots), base64.StdEncoding.EncodeToString(expired.key))
	if _, err := secrets.Patch(b.t.Context(), "credence-webhook-tls", types.MergePatchType, patch, metav1.PatchOptions{}); err != nil {
		b.t.Fatal(err)
	}
	b.shell("kubectl -n credence delete pods -l " + deployment.Selector("webhook")) // Nodes would take a minute to update the files.
}

// pair is a certificate with its key, in PEM.
type pair struct{ roots, key []byte }

// certificate makes a certificate that is valid for this time from now on. Without a CA, it signs itself.
func certificate(t *testing.T, ca, caKey []byte, name string, valid time.Duration) pair {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: name}, DNSNames: []string{name},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(valid), IsCA: ca == nil, BasicConstraintsValid: true,
	}
	parent, signer := template, any(key)
	if ca != nil {
		block, _ := pem.Decode(ca)
		if parent, err = x509.ParseCertificate(block.Bytes); err != nil {
			t.Fatal(err)
		}
		block, _ = pem.Decode(caKey)
		if signer, err = x509.ParseECPrivateKey(block.Bytes); err != nil {
			if signer, err = x509.ParsePKCS8PrivateKey(block.Bytes); err != nil {
				t.Fatal(err)
			}
		}
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, key.Public(), signer)
	if err != nil {
		t.Fatal(err)
	}
	private, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return pair{pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: private})}
}

// restore undoes what faults and remedies have changed in the installation.
func (b *broken) restore(t *testing.T) {
	t.Helper()
	ctx := context.WithoutCancel(t.Context())
	started := time.Now()
	d.STS.SetOutage(ststest.NoOutage)
	id, secret := d.STS.Keys()
	_, err := d.Client.CoreV1().Secrets(deployment.Namespace).Patch(ctx, "credence-aws-keys", types.MergePatchType,
		fmt.Appendf(nil, `{"stringData":{"id":%q,"secret":%q}}`, id, secret.Reveal()), metav1.PatchOptions{})
	_, err2 := run(ctx, "kubectl -n credence delete networkpolicy deny credence-sidecars --ignore-not-found && kubectl -n "+certmanager.Namespace+" scale deployment --all --replicas=1")
	var force []string
	if strings.Contains(strings.Join(b.Setup, "\n"), " patch ") { // by another owner of the fields than Helm
		force = []string{"--force-conflicts"}
	}
	if err := errors.Join(err, err2, d.Upgrade(ctx, force...)); err != nil {
		t.Fatal(err)
	}
	t.Logf("restored in %.0f s", time.Since(started).Seconds())
}
