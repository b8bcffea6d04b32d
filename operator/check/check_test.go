package check

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"flag"
	"fmt"
	"os"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	admissionv1 "k8s.io/api/admissionregistration/v1"
	appsv1 "k8s.io/api/apps/v1"
	authorizationv1 "k8s.io/api/authorization/v1"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/version"
	"sigs.k8s.io/yaml"

	"github.com/credence-iam/credence/broker/policy"
	"github.com/credence-iam/credence/certs/certstest"
	"github.com/credence-iam/credence/operator/finding"
	"github.com/credence-iam/credence/operator/installation"
	"github.com/credence-iam/credence/operator/metrics"
	"github.com/credence-iam/credence/operator/survey"
)

var update = flag.Bool("update", false, "regenerate docs/check.md and golden files")

// golden is the rendered chart, which tests of the chart compare with Helm's output.
const golden = "../../integration/chart/testdata/defaults.golden.yaml"

// documents are the objects of the chart, by kind.
var documents = sync.OnceValues(func() (map[string][]string, error) {
	text, err := os.ReadFile(golden)
	all := make(map[string][]string)
	for document := range strings.SplitSeq(string(text), "\n---\n") {
		var head metav1.TypeMeta
		err = errors.Join(err, yaml.Unmarshal([]byte(document), &head))
		all[head.Kind] = append(all[head.Kind], document)
	}
	return all, err
})

// chartObjects returns the objects of one kind in the chart.
func chartObjects[T any](t *testing.T, kind string) []T {
	t.Helper()
	byKind, err := documents()
	if err != nil || len(byKind[kind]) == 0 {
		t.Fatalf("the chart has no %s: %v", kind, err)
	}
	all := make([]T, len(byKind[kind]))
	for i, document := range byKind[kind] {
		if err := yaml.UnmarshalStrict([]byte(document), &all[i]); err != nil {
			t.Fatal(err)
		}
	}
	return all
}

// healthy returns what is seen of a new installation of the chart.
func healthy(t *testing.T) *snapshot {
	t.Helper()
	keys, err := policy.NewKeys(policy.DefaultPrefix)
	if err != nil {
		t.Fatal(err)
	}
	ca := certstest.NewCA(t)
	var found installation.Installation
	found.Namespace = "credence"
	for _, d := range chartObjects[appsv1.Deployment](t, "Deployment") {
		switch d.Name {
		case installation.BrokerName:
			found.Broker = &d
		case installation.WebhookName:
			found.Webhook = &d
		}
	}
	now := time.Now()
	s := &snapshot{Snapshot: &survey.Snapshot{
		Now: now, Version: "v0.1.0", Namespace: "credence", Found: &found, Keys: keys,
	}}
	s.Server.Value = &version.Info{Major: "1", Minor: "37", GitVersion: "v1.37.2"}
	s.Nodes.Value.Total = 3
	s.Configs.Value = chartObjects[admissionv1.MutatingWebhookConfiguration](t, "MutatingWebhookConfiguration")
	for i := range s.Configs.Value {
		for j := range s.Configs.Value[i].Webhooks {
			s.Configs.Value[i].Webhooks[j].ClientConfig.CABundle = ca.PEM
		}
	}
	s.Policies.Value = chartObjects[admissionv1.ValidatingAdmissionPolicy](t, "ValidatingAdmissionPolicy")
	s.Bindings.Value = chartObjects[admissionv1.ValidatingAdmissionPolicyBinding](t, "ValidatingAdmissionPolicyBinding")
	s.Injected.Value = true
	s.Rights.Value = []survey.Right{{Who: "broker", Allowed: true}}
	member := func(d *appsv1.Deployment, component, name string, m metrics.Values) survey.Member {
		return survey.Member{
			Pod: corev1.Pod{
				ObjectMeta: metav1.ObjectMeta{Name: name, Namespace: "credence", CreationTimestamp: metav1.NewTime(now.Add(-time.Hour))},
				Spec:       d.Spec.Template.Spec,
				Status:     corev1.PodStatus{Phase: corev1.PodRunning, Conditions: []corev1.PodCondition{{Type: corev1.PodReady, Status: corev1.ConditionTrue}}},
			},
			Served:  survey.Part[[]*x509.Certificate]{Value: chain(t, ca.Leaf("credence-"+component+".credence.svc").TLS())},
			Metrics: survey.Part[metrics.Values]{Value: m},
		}
	}
	s.Listed.Value = map[string]bool{}
	for i := range 2 {
		s.Webhooks = append(s.Webhooks, member(found.Webhook, "webhook", fmt.Sprintf("credence-webhook-%d", i), metrics.Values{"credence_webhook_sidecar_settings_file_ok": 1}))
		name := fmt.Sprintf("credence-broker-%d", i)
		s.Brokers = append(s.Brokers, member(found.Broker, "broker", name, metrics.Values{
			"credence_broker_sessions_kept": 4, "credence_broker_sessions_warm": 4, "credence_broker_stalest_session_seconds": 2000,
			"credence_broker_fetch_rate_share": 100, "credence_broker_fetch_rate_limit": 100, "credence_broker_fetch_rate_demand": 0.01,
			`credence_broker_sts_calls_total{action="AssumeRole",outcome="ok"}`:              8,
			`credence_broker_sts_call_duration_seconds_bucket{action="AssumeRole",le="0.5"}`: 8,
			`credence_broker_sts_call_duration_seconds_count{action="AssumeRole"}`:           8,
			`credence_broker_sts_calls_total{action="AssumeRole",outcome="STS_UNAVAILABLE"}`: 0,
		}))
		s.Listed.Value[name] = true
	}
	s.Published.Value = survey.Published{Roots: []*x509.Certificate{ca.Cert}, Digests: map[string][sha256.Size]byte{"credence": {1}, "shop": {1}}}
	s.Namespaces.Value = survey.Namespaces{Total: 5, OptedIn: map[string]bool{"shop": true}, Levels: map[string]int{"restricted": 1}}
	s.Pods.Value = survey.Pods{Total: 10, Annotated: 4, Injected: 4, Versions: map[string]int{"0.1.0": 4}}
	s.Grants.Value = survey.Grants{Active: 4}
	s.Issued.Value = []unstructured.Unstructured{certificate(now.Add(24*time.Hour), "True")}
	s.CertManager.Value = true
	return s
}

func certificate(renewal time.Time, ready string) unstructured.Unstructured {
	return unstructured.Unstructured{Object: map[string]any{
		"metadata": map[string]any{"name": "credence-broker"},
		"status": map[string]any{
			"renewalTime": renewal.UTC().Format(time.RFC3339),
			"conditions":  []any{map[string]any{"type": "Ready", "status": ready, "message": "Issuing certificate"}},
		},
	}}
}

func chain(t *testing.T, pair tls.Certificate) (all []*x509.Certificate) {
	t.Helper()
	for _, der := range pair.Certificate {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, c)
	}
	return all
}

// findings returns all findings that are not ok.
func findings(r *Result) (all []finding.Finding) {
	for _, g := range r.Groups {
		for _, f := range g.Findings {
			if f.State != finding.OK {
				all = append(all, f)
			}
		}
	}
	return all
}

func TestHealthy(t *testing.T) {
	for name, checks := range map[string][]check{"installed": installed, "before": before} {
		s := healthy(t)
		if name == "before" {
			s.Configs.Value = nil
		}
		result := s.report(checks, Config{})
		if bad := findings(result); len(bad) > 0 {
			t.Errorf("%s: %+v", name, bad)
		}
		shown := 0
		for _, g := range result.Groups {
			shown += len(g.Findings)
		}
		if shown < len(checks) || !result.Healthy() {
			t.Errorf("%s: %d findings of %d checks, state %s", name, shown, len(checks), result.State)
		}
		var out bytes.Buffer
		if err := result.Write(&out, finding.Style{Quiet: true}); err != nil || out.Len() > 0 {
			t.Errorf("%s, quiet: %v, %s", name, err, &out)
		}
	}
}

// faults are one or more faults for each check, in the order of the checks.
var faults = []struct {
	id    string
	state finding.State
	cause func(*testing.T, *snapshot)
	text  string
}{
	{"installation", finding.Failed, func(_ *testing.T, s *snapshot) {
		s.Found.Problems = []error{fmt.Errorf("reading configmap credence/credence-rules: %w", apierrors.NewNotFound(schema.GroupResource{Resource: "configmaps"}, "credence-rules"))}
	}, "configmap credence/credence-rules does not exist"},
	{"kubernetes-version", finding.Failed, func(_ *testing.T, s *snapshot) {
		s.Server.Value = &version.Info{Major: "1", Minor: "29+", GitVersion: "v1.29.4-eks"}
	}, "the API server is of v1.29.4-eks, Credence needs 1.30"},
	{"node-versions", finding.Failed, func(_ *testing.T, s *snapshot) { s.Nodes.Value.Old.Add("n1 (v1.28.1)", "kubectl drain n1") }, "1 node older than Kubernetes 1.29"},
	{"versions", finding.Failed, func(_ *testing.T, s *snapshot) { image(s, "credence-webhook:0.3.0") }, "more than one minor version apart"},
	{"versions", finding.Warning, func(_ *testing.T, s *snapshot) { image(s, "credence-webhook:0.2.0") }, "different versions, as during an upgrade: broker 0.1.0, sidecar 0.1.0, webhook 0.1.0, webhook 0.2.0"},
	{"versions", finding.Warning, func(_ *testing.T, s *snapshot) { s.Version = "v0.3.1" }, "this command is of version v0.3.1"},
	{"rights", finding.Failed, func(_ *testing.T, s *snapshot) {
		s.Rights.Value[0].Allowed, s.Rights.Value[0].What.ResourceAttributes = false, attributes("list", "pods")
	}, "1 right missing: broker: list pods --all-namespaces"},
	{"webhook-pods", finding.Failed, func(_ *testing.T, s *snapshot) { *s.Found.Webhook.Spec.Replicas, s.Webhooks = 0, nil }, "no webhook is wanted (replicas: 0)"},
	{"webhook-pods", finding.Warning, func(_ *testing.T, s *snapshot) {
		s.Webhooks[1].Pod.Status = corev1.PodStatus{Phase: corev1.PodPending, ContainerStatuses: []corev1.ContainerStatus{
			{Name: "webhook", State: corev1.ContainerState{Waiting: &corev1.ContainerStateWaiting{Reason: "ImagePullBackOff", Message: "no such image"}}},
		}}
	}, "not ready, while 1 of 2 are: container webhook waits with ImagePullBackOff: no such image"},
	{"webhook-configuration", finding.Failed, func(_ *testing.T, s *snapshot) { s.Configs.Value = s.Configs.Value[1:] }, "does not exist"},
	{"webhook-configuration", finding.Failed, func(_ *testing.T, s *snapshot) {
		s.Configs.Value[0].Webhooks[0].FailurePolicy = new(admissionv1.Ignore)
	}, "its failurePolicy is Ignore"},
	{"webhook-certificate", finding.Failed, func(_ *testing.T, s *snapshot) { s.Configs.Value[0].Webhooks[0].ClientConfig.CABundle = nil }, "its caBundle is empty"},
	{"webhook-certificate", finding.Failed, func(t *testing.T, s *snapshot) {
		s.Configs.Value[0].Webhooks[0].ClientConfig.CABundle = certstest.NewCA(t).PEM
	}, "certificate signed by unknown authority"},
	{"webhook-certificate", finding.Failed, func(_ *testing.T, s *snapshot) { s.Now = s.Now.AddDate(20, 0, 0) }, "its certificate expired at"},
	{"injection", finding.Failed, func(_ *testing.T, s *snapshot) {
		s.Injected.Err = errors.New(`Internal error occurred: failed calling webhook "check.credence-iam.github.io": context deadline exceeded`)
	}, "context deadline exceeded"},
	{"injection", finding.Failed, func(_ *testing.T, s *snapshot) { s.Injected.Value = false }, "does not call the webhook"},
	{"admission-policies", finding.Failed, func(_ *testing.T, s *snapshot) { s.Policies.Value = s.Policies.Value[1:] }, "does not exist: annotated pods could start without a sidecar"},
	{"admission-policies", finding.Failed, func(_ *testing.T, s *snapshot) {
		s.Bindings.Value[0].Spec.ValidationActions = []admissionv1.ValidationAction{admissionv1.Audit}
	}, "has no binding that denies"},
	{"other-webhooks", finding.Warning, func(_ *testing.T, s *snapshot) { s.Daemons.Value = []string{"kube-system/kiam-agent"} }, "daemonset kube-system/kiam-agent"},
	{"other-webhooks", finding.Warning, func(_ *testing.T, s *snapshot) {
		s.Configs.Value = append(s.Configs.Value, *s.Configs.Value[0].DeepCopy())
		s.Configs.Value[len(s.Configs.Value)-1].Name = "another"
	}, "it acts on pods with annotations iam.amazonaws.com/*, too"},
	{"broker-pods", finding.Failed, func(_ *testing.T, s *snapshot) {
		for i := range s.Brokers {
			s.Brokers[i].Pod.Status.Conditions, s.Brokers[i].Waits = nil, "AWS identity: AWS refuses the broker's own credentials (InvalidClientTokenId)"
		}
	}, "InvalidClientTokenId"},
	{"broker-agreement", finding.Warning, func(_ *testing.T, s *snapshot) {
		spec := s.Brokers[1].Pod.Spec.DeepCopy()
		spec.Containers[0].Args = append(spec.Containers[0].Args, "--sts-rate=1")
		s.Brokers[1].Pod.Spec = *spec
	}, "brokers differ in image or arguments"},
	{"broker-agreement", finding.Failed, func(_ *testing.T, s *snapshot) { delete(s.Listed.Value, "credence-broker-1") }, "it does not list ready brokers, so no sidecar calls them: credence-broker-1"},
	{"shared-arguments", finding.Failed, func(_ *testing.T, s *snapshot) {
		s.Found.Broker = s.Found.Broker.DeepCopy()
		args := s.Found.Broker.Spec.Template.Spec.Containers[0].Args
		s.Found.Broker.Spec.Template.Spec.Containers[0].Args = append(args, "--audience=other")
	}, `--audience is "credence-broker" for webhooks and "other" for brokers`},
	{"broker-certificate", finding.Failed, func(t *testing.T, s *snapshot) {
		s.Brokers[0].Served.Value = chain(t, certstest.NewCA(t).Leaf("credence-broker.credence.svc").TLS())
	}, "cannot be verified with the roots in ConfigMap credence/credence-trust"},
	{"certificates", finding.Failed, func(_ *testing.T, s *snapshot) { s.Issued.Value[0] = certificate(s.Now, "False") }, "it is not ready: Issuing certificate"},
	{"certificates", finding.Warning, func(_ *testing.T, s *snapshot) { s.Issued.Value[0] = certificate(s.Now.Add(-2*time.Hour), "True") }, "its renewal was due at"},
	{"config-files", finding.Failed, func(_ *testing.T, s *snapshot) { s.Found.Settings = "memroy: 16Mi" }, "memroy"},
	{"config-files", finding.Failed, func(_ *testing.T, s *snapshot) { s.Brokers[0].Metrics.Value["credence_broker_rules_file_ok"] = 0 }, "the rules file is invalid, so an earlier one is in force"},
	{"metrics", finding.Warning, metric("audit_lines_lost_total", 7), "7 audit lines were lost"},
	{"metrics", finding.Failed, metric("informer_age_seconds", 400), "have not worked for 400 s"},
	{"metrics", finding.Warning, metric(`events_total{outcome="dropped"}`, 2), "2 Kubernetes Events about refused pods were dropped"},
	{"metrics", finding.Warning, metric(`refusals_total{reason="INTERNAL"}`, 1), "it refused 1 calls since its start because of an error of its own"},
	{"metrics", finding.Failed, func(_ *testing.T, s *snapshot) {
		s.Webhooks[1].Metrics.Value["credence_webhook_informer_age_seconds"] = 301
	}, "its watch of namespaces has not worked for 301 s"},
	{"aws-identity", finding.Failed, metric(`sts_calls_total{action="AssumeRole",outcome="BROKER_CREDENTIALS"}`, 90), "AWS refused its own credentials in 90 of 98 calls"},
	{"aws-identity", finding.Failed, func(_ *testing.T, s *snapshot) {
		s.Brokers[0].Metrics.Value["credence_broker_base_credentials_expiry_timestamp_seconds"] = float64(s.Now.Unix() + 100)
	}, "its own credentials end in 100 s"},
	{"sts", finding.Warning, func(t *testing.T, s *snapshot) {
		metric(`sts_calls_total{action="AssumeRole",outcome="STS_UNAVAILABLE"}`, 30)(t, s)
		s.Grants.Err = errors.New("no port-forward")
	}, "30 of 46 STS calls failed"},
	{"sts", finding.Warning, func(_ *testing.T, s *snapshot) { s.Grants.Value.Failing.Add("cart (STS_UNAVAILABLE)", "") }, "the last fetch failed for 1 session that pods use: cart (STS_UNAVAILABLE)"},
	{"sts", finding.OK, metric(`sts_calls_total{action="AssumeRole",outcome="STS_UNAVAILABLE"}`, 30), "30 of 46 failed"},
	{"sts", finding.Warning, metric(`sts_call_duration_seconds_count{action="AssumeRole"}`, 50), "one in a hundred STS calls took more than 10 s"},
	{"clock-skew", finding.Warning, metric("clock_skew_seconds", -70), "AWS's clock is -70 s ahead of this broker's"},
	{"clock-skew", finding.Failed, metric("clock_skew_seconds", 290), "AWS's clock is 290 s ahead"},
	{"rate-budget", finding.Warning, metric("fetch_rate_demand", 90), "its renewals need 90.00 of the 100.00 STS calls a second"},
	{"rate-budget", finding.Warning, metric("sessions_late", 3), "3 sessions are renewed late"},
	{"sessions", finding.Warning, metric("sessions_kept", 9), "5 of 9 sessions that pods use are not cached"},
	{"sessions", finding.Warning, func(_ *testing.T, s *snapshot) {
		s.Grants.Value.Refused.Add("arn:aws:iam::123456789012:role/cart (STS_DENIED)", "")
	}, "1 session that AWS refuses: arn:aws:iam::123456789012:role/cart (STS_DENIED)"},
	{"sessions", finding.Warning, func(_ *testing.T, s *snapshot) { s.Grants.Value.Single = 2 }, "2 of 4 sessions are on one broker only"},
	{"opt-in-labels", finding.Warning, func(_ *testing.T, s *snapshot) { s.Namespaces.Value.BadLabel.Add("shop (true)", "kubectl label") }, "opts nothing in: shop (true)"},
	{"opt-in-labels", finding.Failed, func(_ *testing.T, s *snapshot) {
		s.Scope, s.Namespaces.Err = "shpo", apierrors.NewNotFound(schema.GroupResource{Resource: "namespaces"}, "shpo")
	}, "it does not exist"},
	{"opt-in-labels", finding.Warning, func(_ *testing.T, s *snapshot) { s.Scope, s.Namespaces.Value.OptedIn = "shop", nil }, "it is not opted in"},
	{"trust", finding.Failed, func(_ *testing.T, s *snapshot) { delete(s.Published.Value.Digests, "shop") }, "is missing in 1 opted-in namespace, whose pods cannot start: shop"},
	{"trust", finding.Failed, func(_ *testing.T, s *snapshot) { s.Published.Value.Digests["shop"] = [sha256.Size]byte{2} }, "has other roots than that of namespace credence"},
	{"permitted-roles", finding.Failed, func(_ *testing.T, s *snapshot) { s.Namespaces.Value.Invalid.Add("shop (is not an expression)", "") }, "1 namespace with an invalid annotation"},
	{"permitted-roles", finding.Warning, func(_ *testing.T, s *snapshot) { s.Namespaces.Value.Nothing.Add("shop", "") }, "opted in but permitting no role"},
	{"permits-any-role", finding.Warning, func(_ *testing.T, s *snapshot) { s.Namespaces.Value.AnyRole.Add("shop", "") }, "permitting all roles of all accounts: shop"},
	{"pod-security", finding.Warning, func(_ *testing.T, s *snapshot) { s.Namespaces.Value.BadLevel.Add("shop (restrictd)", "") }, "invalid value of label pod-security.kubernetes.io/enforce"},
	{"pods-not-injected", finding.Failed, func(_ *testing.T, s *snapshot) {
		s.Pods.Value.Without.Add("shop/app", "kubectl -n shop delete pod app")
	}, "1 pod of opted-in namespaces annotated but without a sidecar"},
	{"pods-not-injected", finding.Warning, func(_ *testing.T, s *snapshot) { s.Pods.Value.NotOptedIn.Add("old/app", "") }, "annotated in namespaces that are not opted in"},
	{"sidecar-versions", finding.Warning, func(_ *testing.T, s *snapshot) { s.Pods.Value.Apart.Add("shop/app (0.0.9)", "") }, "1 sidecar more than one minor version from the webhook's 0.1.0"},
	{"sidecar-contract", finding.Failed, func(_ *testing.T, s *snapshot) { s.Pods.Value.Outdated.Add("shop/app (audience x)", "") }, "shop/app (audience x)"},
	{"sidecars-waiting", finding.Warning, func(_ *testing.T, s *snapshot) { s.Pods.Value.Waiting.Add("shop/app", "kubectl logs") }, "1 sidecar waiting for over 2m0s"},
	{"sidecars-waiting", finding.Warning, func(_ *testing.T, s *snapshot) { s.Pods.Value.Restarting.Add("shop/app (9 times)", "") }, "restarted more than 3 times"},
	{"node-metadata", finding.Unknown, func(_ *testing.T, s *snapshot) { s.Nodes.Value.EC2 = 3 }, "3 nodes on EC2, whose hop limits the API server does not know"},

	{"cert-manager", finding.Failed, func(_ *testing.T, s *snapshot) { s.CertManager.Value = false }, "cert-manager is not installed"},
	{"cert-manager", finding.Failed, func(_ *testing.T, s *snapshot) { s.CertManager.Err = errors.New("failed calling webhook") }, "does not accept a Certificate in a dry run"},
	{"your-rights", finding.Failed, func(_ *testing.T, s *snapshot) {
		s.Yours.Value = []string{"create clusterroles.rbac.authorization.k8s.io"}
	}, "you lack 1 right"},
	{"existing-installation", finding.Warning, func(*testing.T, *snapshot) {}, "Credence is already installed"},
	{"target-pod-security", finding.Warning, func(_ *testing.T, s *snapshot) {
		s.Destination.Value = &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Labels: map[string]string{survey.EnforceLabel: "restrictd"}}}
	}, `has the invalid value "restrictd"`},
	{"target-network", finding.Warning, func(_ *testing.T, s *snapshot) {
		s.Network.Value = []networkingv1.NetworkPolicy{{ObjectMeta: metav1.ObjectMeta{Name: "deny"}, Spec: networkingv1.NetworkPolicySpec{PolicyTypes: []networkingv1.PolicyType{"Ingress"}}}}
	}, "it denies connections to all pods"},
}

func metric(name string, value float64) func(*testing.T, *snapshot) {
	return func(_ *testing.T, s *snapshot) { s.Brokers[0].Metrics.Value["credence_broker_"+name] = value }
}

func attributes(verb, resource string) *authorizationv1.ResourceAttributes {
	return &authorizationv1.ResourceAttributes{Verb: verb, Resource: resource}
}

// image gives one webhook another image.
func image(s *snapshot, image string) {
	spec := s.Webhooks[0].Pod.Spec.DeepCopy()
	spec.Containers[0].Image = "registry.example/" + image
	s.Webhooks[0].Pod.Spec = *spec
}

func TestFaults(t *testing.T) {
	seen := make(map[string]bool)
	for _, fault := range faults {
		seen[fault.id] = true
		t.Run(fault.id+"/"+string(fault.state), func(t *testing.T) {
			s := healthy(t)
			fault.cause(t, s)
			at := slices.IndexFunc(all, func(c check) bool { return c.id == fault.id })
			r := &results{id: fault.id}
			all[at].run(s, r)
			if len(r.findings) == 0 {
				t.Fatal("no finding")
			}
			f := r.findings[0]
			if f.State != fault.state || !strings.Contains(f.Text, fault.text) {
				t.Errorf("%s %q, want %s %q", f.State, f.Text, fault.state, fault.text)
			}
			if (f.Remedy == nil || f.Remedy.Who == "" || f.Remedy.What == "") && f.State != finding.OK {
				t.Errorf("remedy %+v", f.Remedy)
			}
			if f.Remedy != nil && f.Remedy.Page != "" {
				page, _, _ := strings.Cut(f.Remedy.Page, "#")
				if _, err := os.Stat("../../" + page); err != nil {
					t.Error(err)
				}
			}
			if order := []finding.State{finding.OK, finding.Unknown, finding.Warning, finding.Failed}; slices.Index(order, f.State) > slices.Index(order, all[at].worst) {
				t.Errorf("the table has %s as the worst of this check", all[at].worst)
			}
		})
	}
	for _, c := range all {
		if !seen[c.id] {
			t.Errorf("check %s has no fault", c.id)
		}
	}
}

// Each part that cannot be read makes the checks unknown that need it, and names the right.
func TestMissingRights(t *testing.T) {
	denied := apierrors.NewForbidden(schema.GroupResource{Resource: "pods"}, "", errors.New("no"))
	s := healthy(t)
	s.Nodes.Err, s.Nodes.Needs = denied, "list nodes"
	s.Configs.Err, s.Configs.Needs = denied, "list mutatingwebhookconfigurations"
	s.Rights.Err, s.Rights.Needs = errors.New("the API server is busy"), "create subjectaccessreviews"
	for i := range s.Brokers {
		s.Brokers[i].Metrics.Err, s.Brokers[i].Metrics.Needs = denied, "create pods/portforward in namespace credence"
	}
	result := s.report(installed, Config{Ignore: []string{"node-metadata"}})
	want := map[string]string{
		"node-versions": "not checked; needs: list nodes", "webhook-configuration": "not checked; needs: list mutatingwebhookconfigurations",
		"rights": "not checked: the API server is busy", "aws-identity": "not checked; needs: create pods/portforward in namespace credence",
	}
	for _, f := range findings(result) {
		if f.State != finding.Unknown || f.Step == "node-metadata" {
			t.Errorf("%+v", f)
		}
		if text := want[f.Step]; text != "" && f.Text != text {
			t.Errorf("%s: %s, want %s", f.Step, f.Text, text)
		}
		delete(want, f.Step)
	}
	if len(want) > 0 || !result.Healthy() {
		t.Errorf("without a finding: %v", want)
	}
}

// TestAnyTwoPartsMissing: whichever two parts cannot be read, each check has a result.
func TestAnyTwoPartsMissing(t *testing.T) {
	var parts []int
	snapshots := reflect.TypeFor[survey.Snapshot]()
	for i := range snapshots.NumField() {
		if strings.HasPrefix(snapshots.Field(i).Type.Name(), "Part[") {
			parts = append(parts, i)
		}
	}
	if len(parts) < 15 {
		t.Fatalf("there are %d parts", len(parts))
	}
	for _, first := range parts {
		for _, second := range parts {
			s := healthy(t)
			for _, part := range []int{first, second} {
				v := reflect.ValueOf(s.Snapshot).Elem().Field(part)
				v.SetZero()
				v.FieldByName("Err").Set(reflect.ValueOf(errors.New("no\x1b[2J" + strings.Repeat("x", 1<<16))))
			}
			for _, checks := range [][]check{installed, before} {
				result := s.report(checks, Config{})
				var out strings.Builder
				if err := result.Write(&out, finding.Style{}); err != nil || out.Len() > 64<<10 || strings.Contains(out.String(), "\x1b") {
					t.Fatalf("%v, %d bytes", err, out.Len())
				}
				seen := map[string]bool{}
				for _, g := range result.Groups {
					for _, f := range g.Findings {
						seen[f.Step] = true
					}
				}
				for _, c := range checks {
					if !seen[c.id] {
						t.Errorf("%s says nothing without %s and %s", c.id, snapshots.Field(first).Name, snapshots.Field(second).Name)
					}
				}
			}
		}
	}
}

// The output for a person who has never seen it.
func TestOutput(t *testing.T) {
	s := healthy(t)
	delete(s.Published.Value.Digests, "shop")
	s.Brokers[0].Metrics.Value["credence_broker_clock_skew_seconds"] = 70
	s.Nodes.Value.EC2 = 3
	result := s.report(installed, Config{})
	var out bytes.Buffer
	if err := result.Write(&out, finding.Style{Quiet: true}); err != nil {
		t.Fatal(err)
	}
	const file = "testdata/quiet.golden.txt"
	if *update {
		if err := os.WriteFile(file, out.Bytes(), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), out.String()); diff != "" {
		t.Error(diff)
	}
	out.Reset()
	if err := finding.WriteJSON(&out, result); err != nil || !strings.Contains(out.String(), `"state": "failed"`) || !strings.Contains(out.String(), `"who": "cluster admin"`) {
		t.Errorf("%v, %s", err, &out)
	}
	if quick := s.report(installed, Config{Quick: true}); len(quick.Groups) != 4 || quick.State != finding.Failed {
		t.Errorf("quick: %+v", quick)
	}
	if result := s.report(installed, Config{Ignore: []string{"trust", "clock-skew"}}); !result.Healthy() {
		t.Errorf("ignored: %+v", findings(result))
	}
}

// A fault that all brokers have is not 63 findings.
func TestManyBrokers(t *testing.T) {
	s := healthy(t)
	for len(s.Brokers) < 63 {
		s.Brokers = append(s.Brokers, s.Brokers[0])
	}
	s.Brokers[0].Metrics.Value["credence_broker_clock_skew_seconds"] = 70 // of all but one
	s.Brokers[1].Metrics.Value["credence_broker_clock_skew_seconds"] = 290
	bad := findings(s.report(installed, Config{}))
	if len(bad) != maxFindings || bad[0].State != finding.Failed || !strings.HasSuffix(bad[maxFindings-1].Text, "; and 58 more like this") {
		t.Errorf("%d findings: %+v", len(bad), bad)
	}
}

// The URL in the API server's message has a timeout, which is not that of the call.
func TestInjectionWithoutWebhook(t *testing.T) {
	s, r := healthy(t), &results{}
	s.Injected.Err = errors.New(`failed calling webhook "check.credence-iam.github.io": failed to call webhook: Post "https://credence-webhook.credence.svc:443/mutate?timeout=5s": no endpoints available for service "credence-webhook"`)
	injection(s, r)
	if len(r.findings) != 1 || r.findings[0].Remedy.What != "See the pods of the webhook" {
		t.Errorf("%+v", r.findings)
	}
}

// Texts of the cluster cannot move the cursor, and long ones are cut.
func TestHostileText(t *testing.T) {
	s := healthy(t)
	s.Injected.Err = errors.New("failed calling webhook \x1b[2J" + strings.Repeat("é", 10_000))
	var out bytes.Buffer
	if err := s.report(installed, Config{}).Write(&out, finding.Style{}); err != nil {
		t.Fatal(err)
	}
	if strings.Contains(out.String(), "\x1b") || out.Len() > 10_000 {
		t.Errorf("%d bytes: %.300q", out.Len(), out.String())
	}
}

func TestWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		bad := &Result{State: finding.Failed, Groups: []finding.Report{{Findings: []finding.Finding{{Step: "trust", State: finding.Failed, Text: "missing"}}}}}
		var calls int
		var causes []string
		began := time.Now()
		result, err := Wait(t.Context(), time.Minute, func(context.Context) (*Result, error) {
			switch calls++; {
			case calls == 1:
				return nil, errors.New("refused")
			case calls < 5:
				return bad, nil
			}
			return &Result{State: finding.OK}, nil
		}, func(cause string) { causes = append(causes, cause) })
		if err != nil || !result.Healthy() || time.Since(began) != 4*pause || !slices.Equal(causes, []string{"refused", "trust: missing"}) {
			t.Errorf("%+v, %v after %s: %q", result, err, time.Since(began), causes)
		}
		began = time.Now()
		result, err = Wait(t.Context(), time.Minute, func(context.Context) (*Result, error) { return bad, nil }, func(string) {})
		if err != nil || result != bad || time.Since(began) != time.Minute {
			t.Errorf("%+v, %v after %s", result, err, time.Since(began))
		}
		ended, stop := context.WithCancel(t.Context())
		stop()
		if _, err := Wait(ended, time.Minute, func(context.Context) (*Result, error) { return bad, nil }, func(string) {}); !errors.Is(err, context.Canceled) {
			t.Errorf("interrupted: %v", err)
		}
	})
}

// Each metric that a check looks at exists: docs/metrics.md is generated from them.
func TestMetricsExist(t *testing.T) {
	source, err := os.ReadFile("brokers.go")
	if err != nil {
		t.Fatal(err)
	}
	page, err := os.ReadFile("../../docs/metrics.md")
	if err != nil {
		t.Fatal(err)
	}
	found := regexp.MustCompile(`m\.Broker\("(\w+)"\)|credence_(?:broker|webhook)_\w+`).FindAllStringSubmatch(string(source), -1)
	if len(found) < 20 {
		t.Fatalf("found %d metrics", len(found))
	}
	for _, m := range found {
		name := m[0]
		if m[1] != "" {
			name = "credence_broker_" + m[1]
		}
		if !bytes.Contains(page, []byte("`"+name+"`")) {
			t.Errorf("there is no metric %s", name)
		}
	}
}

// docs/check.md has all checks.
func TestPage(t *testing.T) {
	const file, begin, end = "../../docs/check.md", "<!-- checks: generated by go test ./operator/check -update -->\n", "<!-- end of checks -->\n"
	page, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	head, rest, ok := strings.Cut(string(page), begin)
	_, tail, ok2 := strings.Cut(rest, end)
	if !ok || !ok2 {
		t.Fatalf("%s has no table", file)
	}
	var table strings.Builder
	table.WriteString("\n| check | worst state | what a finding means | what to do |\n|---|---|---|---|\n")
	for _, c := range all {
		fmt.Fprintf(&table, "| `%s` | %s | %s | %s |\n", c.id, c.worst, c.means, c.fix)
		if c.means == "" || c.fix == "" {
			t.Errorf("%s says nothing", c.id)
		}
	}
	table.WriteString("\n")
	want := head + begin + table.String() + end + tail
	if *update {
		if err := os.WriteFile(file, []byte(want), 0o600); err != nil {
			t.Fatal(err)
		}
	} else if want != string(page) {
		t.Errorf("the table of %s differs; run go test ./operator/check -update", file)
	}
}
