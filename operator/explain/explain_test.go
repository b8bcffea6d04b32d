package explain_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	jsonpatch "github.com/evanphx/json-patch/v5"
	admissionregistrationv1 "k8s.io/api/admissionregistration/v1"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/yaml"

	"github.com/credence-iam/credence/broker/assume"
	"github.com/credence-iam/credence/broker/assume/ststest"
	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/broker/debugapi"
	"github.com/credence-iam/credence/broker/policy"
	"github.com/credence-iam/credence/broker/rulesfile"
	"github.com/credence-iam/credence/operator/explain"
	"github.com/credence-iam/credence/operator/finding"
	"github.com/credence-iam/credence/operator/installation"
	"github.com/credence-iam/credence/operator/snapshot"
	"github.com/credence-iam/credence/sidecar"
	"github.com/credence-iam/credence/webhook/inject"
)

const roleARN = "arn:aws:iam::123456789012:role/cart"

// fault is an entry of testdata/faults.yaml.
type fault struct {
	Name, Subject, Step, Cause, What, Fix string
	Setup                                 []string
	Keep                                  bool
	State                                 finding.State
	Who                                   finding.Person
}

func faults(t *testing.T) (all []fault) {
	t.Helper()
	text, err := os.ReadFile("testdata/faults.yaml")
	if err != nil {
		t.Fatal(err)
	}
	if err := yaml.UnmarshalStrict(text, &all); err != nil {
		t.Fatal(err)
	}
	if len(all) == 0 {
		t.Fatal("there is no fault")
	}
	for _, f := range all {
		if len(f.Setup) == 0 || f.Step == "" || f.Cause == "" || f.Who == "" || f.Fix == "" {
			t.Errorf("%s is incomplete: %+v", f.Name, f)
		}
	}
	return all
}

// world makes snapshots. The pod is injected by the webhook's code, decisions are those of package policy, errors are those
// of an STS, and log lines are those of a sidecar that gets such an error.
type world struct {
	*snapshot.Snapshot
	t     *testing.T
	rules *policy.Rules
}

func newRules(t *testing.T, base string, files ...string) *policy.Rules {
	t.Helper()
	keys, err := policy.NewKeys(policy.DefaultPrefix)
	if err != nil {
		t.Fatal(err)
	}
	arn := credential.RoleBase{}
	if base != "" {
		if arn, err = credential.ParseRoleBase(base); err != nil {
			t.Fatal(err)
		}
	}
	rules, err := policy.New(policy.Config{Keys: keys, Base: arn})
	if err != nil {
		t.Fatal(err)
	}
	for _, text := range files {
		file, err := rulesfile.Parse([]byte(text))
		if err == nil {
			err = rules.Use(file)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	return rules
}

func newInjector(t *testing.T, image, audience string) *inject.Injector {
	t.Helper()
	keys, _ := policy.NewKeys(policy.DefaultPrefix)
	injector, err := inject.New(inject.Config{Keys: keys, Image: image, Broker: "credence-broker.credence.svc:9443", Audience: audience, Settings: inject.DefaultSettings()})
	if err != nil {
		t.Fatal(err)
	}
	return injector
}

const sidecarImage = "localhost/credence-sidecar:local"

// healthy returns the snapshot of a Deployment's pod that has credentials.
func healthy(t *testing.T) *world {
	t.Helper()
	now := time.Now().UTC().Truncate(time.Second)
	created := metav1.NewTime(now.Add(-time.Hour))
	w := &world{t: t, rules: newRules(t, "arn:aws:iam::123456789012:role/"), Snapshot: &snapshot.Snapshot{
		Now: now, NamespaceName: "shop",
		Namespace: &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{
			Name: "shop", Labels: map[string]string{"iam.amazonaws.com/inject": "enabled", "kubernetes.io/metadata.name": "shop"},
			Annotations: map[string]string{"iam.amazonaws.com/permitted": roleARN}, CreationTimestamp: metav1.NewTime(now.Add(-24 * time.Hour)),
		}},
		BrokersNamespace: &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "credence", Labels: map[string]string{"kubernetes.io/metadata.name": "credence"}}},
		Trust:            &corev1.ConfigMap{}, Problems: map[string]snapshot.Problem{}, Variables: map[string]*corev1.ConfigMap{},
		Workload: &snapshot.Workload{Kind: "Deployment", Meta: metav1.ObjectMeta{Name: "cart", Namespace: "shop"}, Wanted: 1, Pods: 1, Template: corev1.PodTemplateSpec{
			ObjectMeta: metav1.ObjectMeta{Labels: map[string]string{"app": "cart"}, Annotations: map[string]string{"iam.amazonaws.com/role": "cart"}},
			Spec:       corev1.PodSpec{Containers: []corev1.Container{{Name: "app", Image: "registry.example/cart:v1"}}},
		}},
	}}
	deployment := func(name, component, image string, args ...string) *appsv1.Deployment {
		return &appsv1.Deployment{
			ObjectMeta: metav1.ObjectMeta{Name: name, Namespace: "credence", Annotations: map[string]string{"meta.helm.sh/release-name": "credence"}},
			Spec: appsv1.DeploymentSpec{Replicas: new(int32(2)), Template: corev1.PodTemplateSpec{Spec: corev1.PodSpec{
				Containers: []corev1.Container{{Name: component, Image: image, Args: args}},
				Volumes:    []corev1.Volume{{Name: "tls", VolumeSource: corev1.VolumeSource{Secret: &corev1.SecretVolumeSource{SecretName: name + "-tls"}}}},
			}}},
		}
	}
	pod := func(name, component, ip string) corev1.Pod {
		return corev1.Pod{
			ObjectMeta: metav1.ObjectMeta{Name: name, Namespace: "credence", Labels: map[string]string{"app.kubernetes.io/component": component}},
			Spec:       corev1.PodSpec{NodeName: "node-2", Containers: []corev1.Container{{Name: component, Ports: []corev1.ContainerPort{{Name: "grpc", ContainerPort: 9443}}}}},
			Status: corev1.PodStatus{Phase: corev1.PodRunning, PodIP: ip, Conditions: []corev1.PodCondition{
				{Type: corev1.PodReady, Status: corev1.ConditionTrue}}},
		}
	}
	broker := deployment("credence-broker", "broker", "localhost/credence-broker:local", "--annotation-prefix=iam.amazonaws.com", "--audience=credence-broker")
	for _, name := range []string{"ID", "SECRET"} {
		key := map[string]string{"ID": "AWS_ACCESS_KEY_ID", "SECRET": "AWS_SECRET_ACCESS_KEY"}[name]
		broker.Spec.Template.Spec.Containers[0].Env = append(broker.Spec.Template.Spec.Containers[0].Env, corev1.EnvVar{Name: key, ValueFrom: &corev1.EnvVarSource{
			SecretKeyRef: &corev1.SecretKeySelector{LocalObjectReference: corev1.LocalObjectReference{Name: "credence-aws-keys"}, Key: strings.ToLower(name)}}})
	}
	w.Installation = snapshot.Installation{
		Found: &installation.Installation{
			Namespace: "credence", Broker: broker,
			Webhook: deployment("credence-webhook", "webhook", "localhost/credence-webhook:local", "--annotation-prefix=iam.amazonaws.com", "--audience=credence-broker", "--sidecar-image="+sidecarImage),
		},
		Configuration: &admissionregistrationv1.MutatingWebhookConfiguration{Webhooks: []admissionregistrationv1.MutatingWebhook{{
			NamespaceSelector: &metav1.LabelSelector{MatchLabels: map[string]string{"iam.amazonaws.com/inject": "enabled"}}}}},
		WebhookPods: []corev1.Pod{pod("credence-webhook-1", "webhook", "10.0.0.1")},
		WebhookTLS:  &snapshot.Serving{From: now.Add(-time.Hour), Until: now.Add(time.Hour)},
		Brokers: []snapshot.Broker{
			{Pod: pod("credence-broker-1", "broker", "10.0.0.2"), Known: true}, {Pod: pod("credence-broker-2", "broker", "10.0.0.3"), Known: true},
		},
	}
	w.inject(sidecarImage, "credence-broker", created)
	w.judge()
	w.receives()
	return w
}

// judge makes the judge from the rules and the webhook's arguments.
func (w *world) judge() {
	args := w.Installation.Found.WebhookArgs()
	w.Judge = snapshot.Judge{Rules: w.rules, Injector: newInjector(w.t, installation.Arg(args, "sidecar-image"), installation.Arg(args, "audience"))}
}

// inject makes the pod from the template, as the webhook and the kubelet do.
func (w *world) inject(image, audience string, created metav1.Time) {
	w.t.Helper()
	w.Pod = w.made(created)
	raw, err := json.Marshal(w.Pod)
	if err != nil {
		w.t.Fatal(err)
	}
	result, err := newInjector(w.t, image, audience).Inject(raw, "shop")
	if err != nil {
		w.t.Fatal(err)
	}
	patch, err := json.Marshal(result.Patch)
	if err != nil {
		w.t.Fatal(err)
	}
	operations, err := jsonpatch.DecodePatch(patch)
	if err != nil {
		w.t.Fatal(err)
	}
	if raw, err = operations.Apply(raw); err != nil {
		w.t.Fatal(err)
	}
	w.Pod = new(corev1.Pod)
	if err := json.Unmarshal(raw, w.Pod); err != nil {
		w.t.Fatal(err)
	}
	w.Pod.Status = corev1.PodStatus{Phase: corev1.PodRunning, StartTime: &created, InitContainerStatuses: []corev1.ContainerStatus{{
		Name: "credence-sidecar", Started: new(true), State: corev1.ContainerState{Running: &corev1.ContainerStateRunning{StartedAt: created}}}}}
}

// made returns a pod of the template, without injection.
func (w *world) made(created metav1.Time) *corev1.Pod {
	template := w.Workload.Template.DeepCopy()
	pod := &corev1.Pod{ObjectMeta: template.ObjectMeta, Spec: template.Spec}
	pod.Name, pod.Namespace, pod.UID, pod.CreationTimestamp, pod.Spec.NodeName = "cart-1", "shop", "11111111-2222-3333-4444-555555555555", created, "node-1"
	return pod
}

// uninjected replaces the pod by one that admission did not see.
func (w *world) uninjected() {
	w.Pod = w.made(w.Pod.CreationTimestamp)
	w.Pod.Status.Phase, w.Log = corev1.PodRunning, nil
}

// source gives a sidecar one result.
type source func() (credential.Lease, error)

func (s source) Credentials(context.Context) (credential.Lease, error) { return s() }

// log returns what a real sidecar logs when it gets a result.
func (w *world) log(result source) {
	w.t.Helper()
	read, write := io.Pipe()
	s, err := sidecar.New(sidecar.Config{Source: result, Authorization: "x", Metadata: policy.MetadataV2, Logger: slog.New(slog.NewJSONHandler(write, nil))})
	if err != nil {
		w.t.Fatal(err)
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		w.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(w.t.Context())
	done := make(chan error, 1)
	go func() {
		done <- s.Run(ctx, listener)
		write.Close()
	}()
	var text bytes.Buffer
	buffer := make([]byte, 64<<10)
	for !strings.Contains(text.String(), `"reason"`) && !strings.Contains(text.String(), `"access_key_id"`) {
		n, err := read.Read(buffer)
		if err != nil {
			w.t.Fatal(err)
		}
		text.Write(buffer[:n])
	}
	cancel()
	read.Close()
	if err := <-done; err != nil {
		w.t.Fatal(err)
	}
	w.Log = snapshot.ParseLog(text.String())
}

// receives makes the sidecar and the brokers have a session.
func (w *world) receives() {
	role, err := credential.ParseRoleARN(roleARN)
	if err != nil {
		w.t.Fatal(err)
	}
	expiration := w.Now.Add(50 * time.Minute)
	w.log(func() (credential.Lease, error) {
		return credential.Lease{Role: role, RefreshAfter: time.Minute, Credential: credential.Credential{
			AccessKeyID: "ASIA0000000000000000", SecretAccessKey: credential.NewSecret("s"), SessionToken: credential.NewSecret("t"), Issued: w.Now, Expiration: expiration}}, nil
	})
	w.grant(func(g *debugapi.Grant) { g.AccessKeyID, g.Expiration = "ASIA0000000000000000", &expiration })
}

// grant gives each broker the grant of the pod.
func (w *world) grant(change func(*debugapi.Grant)) {
	basis, _ := w.rules.Basis(w.PolicyPod(), w.PolicyNamespace())
	for i := range w.Installation.Brokers {
		g := debugapi.Grant{Grant: basis.Grant.String(), Role: roleARN, Pods: 1, Namespaces: []string{"shop"}, Duration: basis.Grant.Duration().Seconds()}
		change(&g)
		w.Installation.Brokers[i].Grants = []debugapi.Grant{g}
	}
}

// fails makes the sidecar get this error at its start.
func (w *world) fails(err error) {
	w.log(func() (credential.Lease, error) { return credential.Lease{}, err })
	w.Pod.Status.InitContainerStatuses[0].Started = new(false)
	w.grant(func(g *debugapi.Grant) {
		if e, ok := errors.AsType[*credential.Error](err); ok {
			g.Reason, g.Message, g.Failures = string(e.Reason), e.Message, 3
		}
	})
}

// unreachable makes the sidecar fail as package client reports it.
func (w *world) unreachable(cause string) {
	w.fails(fmt.Errorf("calling broker credence-broker.credence.svc.cluster.local.:9443 at 10.0.0.2 (2 called, 0 not): %w", &credential.Error{
		Kind: credential.ErrUnavailable, Reason: credential.ReasonBrokerUnreachable, Cause: errors.New(cause),
		Message: "cannot reach any broker; the sidecar keeps retrying"}))
}

// sts returns the error of a real call for the pod's grant of an STS that behaves so.
func (w *world) sts(b ststest.Behavior, keys func(id string) string) error {
	w.t.Helper()
	server, err := ststest.Start(w.t.Context(), ststest.Config{Default: b})
	if err != nil {
		w.t.Fatal(err)
	}
	for _, variable := range os.Environ() {
		if name, _, _ := strings.Cut(variable, "="); strings.HasPrefix(name, "AWS_") {
			w.t.Setenv(name, "")
		}
	}
	id, secret := server.Keys()
	for name, value := range map[string]string{
		"AWS_ACCESS_KEY_ID": keys(id), "AWS_SECRET_ACCESS_KEY": secret.Reveal(), "AWS_EC2_METADATA_DISABLED": "true",
		"AWS_CONFIG_FILE": os.DevNull, "AWS_SHARED_CREDENTIALS_FILE": os.DevNull,
	} {
		w.t.Setenv(name, value)
	}
	client, err := assume.New(w.t.Context(), assume.Config{Region: "eu-central-1", Endpoint: server.URL()})
	if err != nil {
		w.t.Fatal(err)
	}
	grant, err := w.rules.Grant(w.PolicyPod(), w.PolicyNamespace())
	if err != nil {
		w.t.Fatal(err)
	}
	_, err = client.Credential(w.t.Context(), grant)
	if err == nil {
		w.t.Fatal("STS gave a session")
	}
	return err
}

func right(id string) string { return id }

// unidentified makes no broker ready, with the problem that package assume has of such keys.
func (w *world) unidentified(problem string) {
	w.unreachable("DNS has no address for the broker's host credence-broker.credence.svc: no such host")
	for i := range w.Installation.Brokers {
		b := &w.Installation.Brokers[i]
		b.Pod.Status.Conditions[0].Status = corev1.ConditionFalse
		b.Problem = "AWS identity: " + problem + "\nsessions: 0 of 1 are warm, and prefetch has not looked at 0 pods"
	}
}

// refused makes the API server refuse the pods of the Deployment.
func (w *world) refused(message string) {
	w.Pod, w.Log, w.Workload.Pods = nil, nil, 0
	w.Messages = []snapshot.Message{{Object: "replicaset/cart-7d4b9c", Reason: "FailedCreate", Text: "Error creating: " + message, Time: w.Now.Add(-time.Minute)}}
}

// refusedByWebhook makes the webhook refuse the pods, as it does now.
func (w *world) refusedByWebhook() {
	w.t.Helper()
	w.judge()
	raw, err := json.Marshal(w.made(w.Pod.CreationTimestamp))
	if err != nil {
		w.t.Fatal(err)
	}
	if _, err = w.Judge.Injector.Inject(raw, "shop"); err == nil {
		_, err = w.rules.Grant(w.PolicyPod(), w.PolicyNamespace())
	}
	if err == nil {
		w.t.Fatal("the webhook would admit the pod")
	}
	w.refused(`admission webhook "inject.credence-iam.github.io" denied the request: credence: ` + err.Error())
}

// permits changes an annotation of the namespace.
func (w *world) permits(key, value string) {
	w.Namespace.Annotations = map[string]string{"iam.amazonaws.com/" + key: value}
	w.refusedByWebhook()
}

// managed returns when a client set a key, as the API server notes it.
func managed(at time.Time, key string) []metav1.ManagedFieldsEntry {
	return []metav1.ManagedFieldsEntry{{Time: new(metav1.NewTime(at)), FieldsV1: metav1.NewFieldsV1(`{"f:metadata":{"f:labels":{"f:` + key + `":{}}}}`)}}
}

func denyAll(name, namespace string, direction networkingv1.PolicyType, egress ...networkingv1.NetworkPolicyEgressRule) networkingv1.NetworkPolicy {
	return networkingv1.NetworkPolicy{ObjectMeta: metav1.ObjectMeta{Name: name, Namespace: namespace}, Spec: networkingv1.NetworkPolicySpec{
		PolicyTypes: []networkingv1.PolicyType{direction}, Egress: egress}}
}

// container returns the application's container in the template.
func (w *world) container() *corev1.Container { return &w.Workload.Template.Spec.Containers[0] }

func (w *world) setArg(d *appsv1.Deployment, name, value string) {
	for i, arg := range d.Spec.Template.Spec.Containers[0].Args {
		if strings.HasPrefix(arg, "--"+name+"=") {
			d.Spec.Template.Spec.Containers[0].Args[i] = "--" + name + "=" + value
		}
	}
}

const audienceError = `the token is made for audience %q, and this broker accepts %q: set --audience of the webhook and of the broker to the same value (the chart value audience sets both), then recreate the pod`

func (w *world) wrongAudience(of, accepted string) {
	w.fails(credential.Errorf(credential.ErrUnauthenticated, credential.ReasonTokenAudience, audienceError, of, accepted))
}

// broken makes the snapshots of testdata/faults.yaml from healthy ones.
var broken = map[string]func(*world){
	"namespace without a label": func(w *world) {
		delete(w.Namespace.Labels, "iam.amazonaws.com/inject")
		w.uninjected()
	},
	"misspelt label": func(w *world) {
		delete(w.Namespace.Labels, "iam.amazonaws.com/inject")
		w.Namespace.Labels["iam.amazonaws.com/injekt"] = "enabled"
		w.uninjected()
	},
	"wrong value of the label": func(w *world) {
		w.Namespace.Labels["iam.amazonaws.com/inject"] = "true"
		w.uninjected()
	},
	"label set after the pod": func(w *world) {
		w.uninjected()
		w.Namespace.ManagedFields = managed(w.Pod.CreationTimestamp.Add(5*time.Minute), "iam.amazonaws.com/inject")
	},
	"pod annotated after its creation": func(w *world) {
		w.uninjected()
		w.Pod.Name, w.Workload = "bare", nil
		w.Pod.ManagedFields = managed(w.Pod.CreationTimestamp.Add(2*time.Minute), "iam.amazonaws.com/role")
	},
	"pod of a controller annotated after its creation": func(w *world) {
		w.uninjected()
		w.Workload.Template.Annotations = nil
	},
	"annotation on the Deployment": func(w *world) {
		w.Workload.Meta.Annotations, w.Workload.Template.Annotations = w.Workload.Template.Annotations, nil
		w.uninjected()
	},
	"misspelt annotation": func(w *world) {
		w.Workload.Template.Annotations = map[string]string{"iam.amazonaws.com/rloe": "cart"}
		w.refusedByWebhook()
	},
	"expression without a group": func(w *world) {
		w.permits("permitted", "arn:aws:iam::123456789012:role/ca|arn:aws:iam::123456789012:role/till")
	},
	"expression of kiam 3":                 func(w *world) { w.permits("permitted", "^(cart|till)$") },
	"list of kube2iam that lacks the role": func(w *world) { w.permits("allowed-roles", `["till-*"]`) },
	"expression that does not parse":       func(w *world) { w.permits("permitted", "arn:aws:iam::123456789012:role/(cart") },
	"namespace that permits nothing":       func(w *world) { w.permits("other", "") },
	"role that the namespace denies":       func(w *world) { w.permits("permitted", "arn:aws:iam::123456789012:role/till") },
	"rules file without the namespace": func(w *world) {
		w.rules = newRules(w.t, "arn:aws:iam::123456789012:role/", "namespaces: [{match: [till]}]")
		w.refusedByWebhook()
	},
	"invalid rules file": func(w *world) { _, w.Judge.RulesErr = rulesfile.Parse([]byte("namespace: []")) },
	"invalid rules file, and everything restarted": func(w *world) {
		_, w.Judge.RulesErr = rulesfile.Parse([]byte("namespace: []"))
		w.Installation.WebhookPods[0].Status.Conditions[0].Status = corev1.ConditionFalse
		w.Installation.WebhookTLS = nil
		w.refused(`Internal error occurred: failed calling webhook "inject.credence-iam.github.io": failed to call webhook: Post "https://credence-webhook.credence.svc:443/mutate?timeout=5s": no endpoints available for service "credence-webhook"`)
	},
	"role that AWS does not have": func(w *world) { w.fails(w.sts(ststest.Behavior{Deny: true}, right)) },
	"missing external id":         func(w *world) { w.fails(w.sts(ststest.Behavior{ExternalID: "acme"}, right)) },
	"wrong keys that replaced right ones": func(w *world) {
		w.fails(w.sts(ststest.Behavior{}, func(string) string { return "AKIAAAAAAAAAAAAAAAAA" }))
	},
	"unreachable STS": func(w *world) { w.fails(w.sts(ststest.Behavior{Fault: ststest.Unavailable()}, right)) },
	"throttling STS":  func(w *world) { w.fails(w.sts(ststest.Behavior{Fault: ststest.Throttling()}, right)) },
	"wrong keys of the brokers": func(w *world) {
		w.unidentified("AWS refuses the broker's own credentials (InvalidClientTokenId): their access key does not exist or is inactive; correct the key in its Secret, file or variable")
	},
	"no keys of the brokers": func(w *world) {
		w.unidentified("the broker has no AWS credentials; give it keys, a web identity or EKS Pod Identity, see docs/aws.md (no EC2 IMDS role found)")
	},
	"unreachable STS, and new brokers": func(w *world) {
		w.unidentified("the broker cannot reach STS; it keeps trying; check egress, DNS, --region and proxies (dial tcp: lookup sts.eu-central-1.amazonaws.com: no such host)")
	},
	"webhook with 0 replicas": func(w *world) {
		w.Installation.Found.Webhook.Spec.Replicas, w.Installation.WebhookPods, w.Installation.WebhookTLS = new(int32(0)), nil, nil
		w.refused(`Internal error occurred: failed calling webhook "inject.credence-iam.github.io": failed to call webhook: Post "https://credence-webhook.credence.svc:443/mutate?timeout=5s": no endpoints available for service "credence-webhook"`)
	},
	"webhook without its configuration": func(w *world) {
		w.Installation.Configuration, w.Installation.ConfigurationGone = nil, true
		w.refused(`pods "cart-7d4b9c-x2x5q" is forbidden: ValidatingAdmissionPolicy 'credence-injected' with binding 'credence-injected' denied request: credence: the pod is annotated with iam.amazonaws.com/* but has no sidecar: MutatingWebhookConfiguration credence is missing, or another webhook removed the sidecar`)
	},
	"webhook and admission policy gone": func(w *world) {
		w.Installation.Configuration, w.Installation.ConfigurationGone = nil, true
		w.uninjected()
	},
	"wrong caBundle": func(w *world) {
		w.Installation.WebhookTLS.Untrusted = "x509: certificate signed by unknown authority"
		w.refused(`Internal error occurred: failed calling webhook "inject.credence-iam.github.io": failed to call webhook: Post "https://credence-webhook.credence.svc:443/mutate?timeout=5s": tls: failed to verify certificate: x509: certificate signed by unknown authority`)
	},
	"expired certificate of the webhook": func(w *world) {
		w.Installation.WebhookTLS.Until = w.Now.Add(-time.Minute)
		w.Installation.WebhookPods[0].Status.Conditions[0].Status = corev1.ConditionFalse
		w.refused(`Internal error occurred: failed calling webhook "inject.credence-iam.github.io": failed to call webhook: Post "https://credence-webhook.credence.svc:443/mutate?timeout=5s": no endpoints available for service "credence-webhook"`)
	},
	"trust ConfigMap gone, without brokers": func(w *world) {
		w.brokerless()
		w.untrusting()
	},
	"trust ConfigMap gone, and brokers that cannot write it again": func(w *world) {
		w.untrusting()
		w.Installation.MissingRights = []string{"ClusterRoleBinding credence-broker"}
	},
	"brokers with 0 replicas": (*world).brokerless,
	"NetworkPolicy of the pod's namespace": func(w *world) {
		w.unreachable("connection error: dial tcp 10.0.0.2:9443: i/o timeout")
		w.Policies = append(w.Policies, denyAll("deny", "shop", networkingv1.PolicyTypeEgress, networkingv1.NetworkPolicyEgressRule{
			Ports: []networkingv1.NetworkPolicyPort{{Protocol: new(corev1.ProtocolUDP), Port: nil}}}))
	},
	"NetworkPolicy without DNS": func(w *world) {
		w.unreachable("DNS has no address for the broker's host credence-broker.credence.svc.cluster.local.: lookup: i/o timeout")
		w.Policies = append(w.Policies, denyAll("deny", "shop", networkingv1.PolicyTypeEgress))
	},
	"NetworkPolicy of the brokers' namespace": func(w *world) {
		w.unreachable("connection error: dial tcp 10.0.0.2:9443: i/o timeout")
		w.Policies = append(w.Policies, denyAll("deny", "credence", networkingv1.PolicyTypeIngress))
	},
	"brokers without their rights": func(w *world) {
		w.unidentified("")
		for i := range w.Installation.Brokers {
			w.Installation.Brokers[i].Problem = "informers: not all pods, namespaces and service accounts are listed yet"
		}
		w.Installation.MissingRights = []string{"ClusterRoleBinding credence-broker"}
	},
	"ResourceQuota": func(w *world) {
		w.refused(`pods "cart-7d4b9c-x2x5q" is forbidden: exceeded quota: pods, requested: pods=1, used: pods=0, limited: pods=0`)
	},
	"IRSA in the template": (*world).federated,
	"IRSA by the service account": func(w *world) {
		w.federated()
		w.container().Env = nil // EKS's webhook adds it to pods.
	},
	"EKS Pod Identity": func(w *world) {
		w.container().Env = []corev1.EnvVar{{Name: "AWS_CONTAINER_CREDENTIALS_FULL_URI", Value: "http://169.254.170.23/v1/credentials"}}
		w.refusedByWebhook()
	},
	"static keys": func(w *world) {
		w.container().Env = []corev1.EnvVar{{Name: "AWS_ACCESS_KEY_ID", Value: "AKIAAAAAAAAAAAAAAAAA"}}
		w.inject(sidecarImage, "credence-broker", w.Pod.CreationTimestamp)
	},
	"profile in a ConfigMap": func(w *world) {
		w.container().EnvFrom = []corev1.EnvFromSource{{ConfigMapRef: &corev1.ConfigMapEnvSource{LocalObjectReference: corev1.LocalObjectReference{Name: "settings"}}}}
		w.Variables["settings"] = &corev1.ConfigMap{Data: map[string]string{"AWS_PROFILE": "other", "COLOR": "red"}}
		w.inject(sidecarImage, "credence-broker", w.Pod.CreationTimestamp)
	},
	"audience of the brokers only": func(w *world) {
		w.setArg(w.Installation.Found.Broker, "audience", "other")
		w.wrongAudience("credence-broker", "other")
	},
	"audience of the webhook only": func(w *world) {
		w.setArg(w.Installation.Found.Webhook, "audience", "other")
		w.inject(sidecarImage, "other", w.Pod.CreationTimestamp)
		w.judge()
		w.wrongAudience("other", "credence-broker")
	},
	"pod with a token of an earlier audience": func(w *world) {
		w.setArg(w.Installation.Found.Broker, "audience", "other")
		w.setArg(w.Installation.Found.Webhook, "audience", "other")
		w.judge()
		w.wrongAudience("credence-broker", "other")
	},
	"wrong image of the sidecar": func(w *world) {
		const absent = "localhost/credence-sidecar:absent"
		w.setArg(w.Installation.Found.Webhook, "sidecar-image", absent)
		w.inject(absent, "credence-broker", w.Pod.CreationTimestamp)
		w.judge()
		w.Log = nil
		w.Pod.Status.Phase = corev1.PodPending
		w.Pod.Status.InitContainerStatuses[0].State = corev1.ContainerState{Waiting: &corev1.ContainerStateWaiting{
			Reason: "ImagePullBackOff", Message: `Back-off pulling image "localhost/credence-sidecar:absent": ErrImagePull: failed to pull and unpack image: not found`}}
		w.Pod.Status.InitContainerStatuses[0].Started = new(false)
	},
	"clock of the brokers' node ahead": func(w *world) {
		w.fails(credential.Errorf(credential.ErrUnauthenticated, credential.ReasonTokenExpired, "the token expired at 2026-01-02T15:04:05Z, and it is 2026-01-02T15:14:05Z"))
		for i := range w.Installation.Brokers {
			w.Installation.Brokers[i].Clock = 10*time.Minute + 3*time.Second
		}
	},
	"clock of the pod's node behind": func(w *world) {
		w.fails(&credential.Error{Kind: credential.ErrUnavailable, Reason: credential.ReasonInternal, Message: "another"})
		w.Pod.Status.StartTime = new(metav1.NewTime(w.Pod.CreationTimestamp.Add(-10 * time.Minute)))
	},
}

// brokerless scales the brokers to 0.
func (w *world) brokerless() {
	w.unreachable("DNS has no address for the broker's host credence-broker.credence.svc: no such host")
	w.Installation.Found.Broker.Spec.Replicas, w.Installation.Brokers = new(int32(0)), nil
}

// federated gives the application's container IRSA.
func (w *world) federated() {
	w.container().Env = []corev1.EnvVar{{Name: "AWS_WEB_IDENTITY_TOKEN_FILE", Value: "/token"}, {Name: "AWS_ROLE_ARN", Value: "arn:aws:iam::123456789012:role/other"}}
	w.refusedByWebhook()
}

// untrusting makes the kubelet wait for the ConfigMap that the sidecar mounts.
func (w *world) untrusting() {
	w.Trust, w.TrustGone, w.Log = nil, true, nil
	w.Pod.Status.Phase = corev1.PodPending
	w.Pod.Status.InitContainerStatuses[0].State = corev1.ContainerState{Waiting: &corev1.ContainerStateWaiting{Reason: "PodInitializing"}}
	w.Pod.Status.InitContainerStatuses[0].Started = new(false)
	w.Messages = []snapshot.Message{{Object: "pod/cart-1", Reason: "FailedMount", Text: `MountVolume.SetUp failed for volume "credence-identity" : configmap "credence-trust" not found`, Time: w.Now.Add(-time.Second)}}
}

// TestFaults: of each broken set-up, the first finding is the cause, with a remedy that ends it.
func TestFaults(t *testing.T) {
	all := faults(t)
	for name := range broken {
		if !slices.ContainsFunc(all, func(f fault) bool { return f.Name == name }) {
			t.Errorf("%s is not in testdata/faults.yaml", name)
		}
	}
	for _, f := range all {
		t.Run(f.Name, func(t *testing.T) {
			w := healthy(t)
			if broken[f.Name] == nil {
				t.Fatal("there is no such snapshot")
			}
			broken[f.Name](w)
			x := explain.Explain(w.Snapshot)
			var out strings.Builder
			if err := x.Write(&out, finding.Style{}); err != nil {
				t.Fatal(err)
			}
			t.Logf("\n%s", out.String())
			cause, ok := x.Cause()
			if f.State == "" {
				f.State = finding.Failed
			}
			if !ok || x.Healthy || cause.Step != f.Step || cause.State != f.State || !strings.Contains(cause.Text, f.Cause) {
				t.Fatalf("cause is %s %s: %s\nwant %s %s: %s", cause.State, cause.Step, cause.Text, f.State, f.Step, f.Cause)
			}
			if cause.Remedy == nil || cause.Remedy.Who != f.Who || !strings.Contains(cause.Remedy.What, f.What) {
				t.Errorf("remedy is %+v, want one for the %s: %s", cause.Remedy, f.Who, f.What)
			}
			var commands []string
			for _, found := range x.Findings {
				if (found.State == finding.Failed || found.State == finding.Warning) && found.Remedy == nil {
					t.Errorf("%s has no remedy", found.Step)
				}
				if found.Remedy != nil && found.Remedy.Page != "" {
					checkPage(t, found.Remedy.Page)
				}
				if found.Step == f.Step && found.Remedy != nil {
					commands = append(commands, found.Remedy.Commands...)
				}
			}
			if f.Fix == "" || !strings.Contains(strings.Join(commands, "\n"), f.Fix) {
				t.Errorf("commands are\n%s\nwant %s", strings.Join(commands, "\n"), f.Fix)
			}
			if !strings.Contains(x.Conclusion, cause.Text) || !strings.Contains(x.Conclusion, cause.Remedy.What) {
				t.Errorf("conclusion is %s", x.Conclusion)
			}
		})
	}
}

func reasonOf(text string) credential.Reason { return credential.Reason(text) }

// checkPage requires that a page of the documentation has the section.
func checkPage(t *testing.T, page string) {
	t.Helper()
	file, section, _ := strings.Cut(page, "#")
	text, err := os.ReadFile("../../" + file)
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		title := strings.ToLower(strings.TrimSpace(strings.TrimLeft(line, "#")))
		if section == "" || strings.HasPrefix(line, "#") && strings.NewReplacer(" ", "-", ".", "", "'", "", "?", "").Replace(title) == section {
			return
		}
	}
	t.Errorf("%s has no such section", page)
}
