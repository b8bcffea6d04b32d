//go:build unix

package chart_test

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	policyv1 "k8s.io/api/policy/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/pod-security-admission/api"
	psapolicy "k8s.io/pod-security-admission/policy"

	"github.com/credence-iam/credence/integration/chart"
)

// TestPodsAreRestricted shows that the broker and the webhook run in a namespace that enforces the strictest PodSecurity
// level, of this version and of the oldest one that the chart supports.
func TestPodsAreRestricted(t *testing.T) {
	t.Parallel()
	evaluator, err := psapolicy.NewEvaluator(psapolicy.DefaultChecks(), nil)
	if err != nil {
		t.Fatal(err)
	}
	for name := range cases(t) {
		all := objects(t, name)
		for _, component := range []string{"broker", "webhook"} {
			template := deployment(t, all, component).Spec.Template
			for _, version := range []api.Version{api.LatestVersion(), api.MajorMinorVersion(1, 30)} {
				result := psapolicy.AggregateCheckResults(evaluator.EvaluatePod(
					api.LevelVersion{Level: api.LevelRestricted, Version: version}, &template.ObjectMeta, &template.Spec))
				if !result.Allowed {
					t.Errorf("%s: %s, version %s: %s", name, component, version.String(), result.ForbiddenDetail())
				}
			}
			// PodSecurity does not require this.
			context := template.Spec.Containers[0].SecurityContext
			if context.ReadOnlyRootFilesystem == nil || !*context.ReadOnlyRootFilesystem {
				t.Errorf("%s: %s can write to its image", name, component)
			}
			if name == "openshift" && (template.Spec.SecurityContext.RunAsUser != nil || template.Spec.SecurityContext.RunAsGroup != nil) {
				t.Errorf("%s sets a user; OpenShift accepts only its own", component)
			}
		}
	}
}

// TestPodsAreFoundAndKept shows that Services and PodDisruptionBudgets select the right pods, and that no upgrade or drain
// leaves too few.
func TestPodsAreFoundAndKept(t *testing.T) {
	t.Parallel()
	for name := range cases(t) {
		all := objects(t, name)
		services, budgets := chart.Of[*corev1.Service](all), chart.Of[*policyv1.PodDisruptionBudget](all)
		if len(services) != 2 || len(budgets) != 2 {
			t.Fatalf("%s: %d Services and %d PodDisruptionBudgets, want two of each", name, len(services), len(budgets))
		}
		for _, component := range []string{"broker", "webhook"} {
			d := deployment(t, all, component)
			pod := labels.Set(d.Spec.Template.Labels)
			selects := func(what string, selector labels.Selector, owner string) {
				if got, want := selector.Matches(pod), owner == "credence-"+component; got != want {
					t.Errorf("%s: %s %s selects pods of the %s: %t, want %t", name, what, owner, component, got, want)
				}
			}
			for _, s := range services {
				selects("Service", labels.SelectorFromSet(s.Spec.Selector), s.Name)
				if s.Name != d.Name {
					continue
				}
				target := s.Spec.Ports[0].TargetPort.StrVal
				var port int32
				for _, p := range d.Spec.Template.Spec.Containers[0].Ports {
					if p.Name == target {
						port = p.ContainerPort
					}
				}
				if port != 9443 {
					t.Errorf("%s: Service %s has target port %q, %d; both programs serve on 9443", name, s.Name, target, port)
				}
				if headless := s.Spec.ClusterIP == corev1.ClusterIPNone; headless != (component == "broker") {
					t.Errorf("%s: Service %s is headless: %t", name, s.Name, headless)
				}
			}
			for _, b := range budgets {
				selector, err := metav1.LabelSelectorAsSelector(b.Spec.Selector)
				if err != nil {
					t.Fatal(err)
				}
				selects("PodDisruptionBudget", selector, b.Name)
				if b.Spec.MinAvailable != nil || b.Spec.MaxUnavailable.IntValue() != 1 {
					t.Errorf("%s: PodDisruptionBudget %s blocks the drain of a single replica's node, or blocks none", name, b.Name)
				}
			}
			if d.Spec.Strategy.RollingUpdate.MaxUnavailable.IntValue() != 0 {
				t.Errorf("%s: an upgrade of the %s starts with one pod fewer", name, component)
			}
		}
	}
}

// TestProbesReachThePrograms shows that each probe has a port of the container and a path that the program serves.
func TestProbesReachThePrograms(t *testing.T) {
	t.Parallel()
	all := objects(t, "defaults")
	type probe struct {
		Path   string
		Port   int32
		Scheme corev1.URIScheme
	}
	for component, want := range map[string][2]probe{
		"broker":  {{"/healthz", 8080, ""}, {"/readyz", 8080, ""}},
		"webhook": {{"/healthz", 9443, "HTTPS"}, {"/readyz", 9443, "HTTPS"}},
	} {
		c := deployment(t, all, component).Spec.Template.Spec.Containers[0]
		var got [2]probe
		for at, p := range []*corev1.Probe{c.LivenessProbe, c.ReadinessProbe} {
			get := p.HTTPGet
			got[at] = probe{get.Path, 0, get.Scheme}
			for _, port := range c.Ports {
				if port.Name == get.Port.StrVal {
					got[at].Port = port.ContainerPort
				}
			}
			if get.Host != "" {
				t.Errorf("%s: a probe names host %s, which PodSecurity refuses", component, get.Host)
			}
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%s (- want, + got):\n%s", component, diff)
		}
	}
}

// TestNamespaced shows that all namespaced objects are in the namespace of the release, and that all references to it
// follow its name.
func TestNamespaced(t *testing.T) {
	t.Parallel()
	const namespace = "elsewhere"
	rendered, err := chart.Render(t.Context(), chart.Config{Helm: helm, Namespace: namespace, ValueFiles: []string{cases(t)["defaults"]}})
	if err != nil {
		t.Fatal(err)
	}
	all, err := chart.Decode(rendered)
	if err != nil {
		t.Fatal(err)
	}
	clusterScoped := map[string]bool{
		"ClusterRole": true, "ClusterRoleBinding": true, "MutatingWebhookConfiguration": true,
		"ValidatingAdmissionPolicy": true, "ValidatingAdmissionPolicyBinding": true,
	}
	for _, object := range all {
		kind := object.GetObjectKind().GroupVersionKind().Kind
		want := namespace
		if clusterScoped[kind] {
			want = ""
		}
		meta := object.(metav1.Object)
		if meta.GetNamespace() != want {
			t.Errorf("%s %s is in namespace %q, want %q", kind, meta.GetName(), meta.GetNamespace(), want)
		}
	}
	text := strings.ReplaceAll(string(rendered), "credence-", "")
	for _, stale := range []string{".credence.", "namespace: credence\n", "credence/credence"} {
		if strings.Contains(text, stale) {
			t.Errorf("the chart for namespace %s has %q", namespace, stale)
		}
	}
}
