//go:build unix

package admission

import (
	"fmt"
	"strings"
	"sync"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"github.com/credence-iam/credence/integration/chart"
)

// heard collects the warnings that a client is shown.
type heard struct {
	mu       sync.Mutex
	warnings []string // guarded by mu
}

// HandleWarningHeader implements rest.WarningHandler.
func (h *heard) HandleWarningHeader(code int, _, text string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if code == 299 && text != "" {
		h.warnings = append(h.warnings, text)
	}
}

// from returns the warnings of one policy since the last call, and forgets all.
func (h *heard) from(policy string) (found []string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, text := range h.warnings {
		if strings.Contains(text, fmt.Sprintf("'%s'", policy)) {
			found = append(found, text)
		}
	}
	h.warnings = nil
	return found
}

func listening(t *testing.T) (kubernetes.Interface, *heard) {
	t.Helper()
	h := &heard{}
	config := rest.CopyConfig(control.Config())
	config.WarningHandler = h
	c, err := kubernetes.NewForConfig(config)
	if err != nil {
		t.Fatal(err)
	}
	return c, h
}

// warned: what starts without credentials because its namespace is not opted in starts with a warning, for pods and for
// what makes them; nothing else is warned of.
func (w *world) warned(t *testing.T) {
	client, h := listening(t)
	dry := metav1.CreateOptions{DryRun: []string{metav1.DryRunAll}}
	optIn := w.prefix + "/inject"
	labelled := func(value string) string {
		namespace := w.namespace(t, false)
		changed := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: namespace, Labels: map[string]string{optIn: value}}}
		if _, err := client.CoreV1().Namespaces().Update(t.Context(), changed, metav1.UpdateOptions{}); err != nil {
			t.Fatal(err)
		}
		return namespace
	}
	plain, optedIn, misspelt, disabled := w.namespace(t, false), w.namespace(t, true), labelled("enable"), labelled("disabled")
	h.from("")
	selector := &metav1.LabelSelector{MatchLabels: map[string]string{"a": "b"}}
	template := func(pod *corev1.Pod) corev1.PodTemplateSpec {
		pod.Labels = map[string]string{"a": "b"}
		return corev1.PodTemplateSpec{ObjectMeta: metav1.ObjectMeta{Labels: pod.Labels, Annotations: pod.Annotations}, Spec: pod.Spec}
	}
	meta := func() metav1.ObjectMeta { return metav1.ObjectMeta{Name: name("w")} }
	kinds := map[string]struct {
		policy string
		create func(namespace string, pod *corev1.Pod) error
	}{
		"pod": {"credence-not-opted-in", func(namespace string, pod *corev1.Pod) error {
			_, err := client.CoreV1().Pods(namespace).Create(t.Context(), pod, dry)
			return err
		}},
		"deployment": {"credence-not-opted-in-templates", func(namespace string, pod *corev1.Pod) error {
			_, err := client.AppsV1().Deployments(namespace).Create(t.Context(), &appsv1.Deployment{ObjectMeta: meta(), Spec: appsv1.DeploymentSpec{Selector: selector, Template: template(pod)}}, dry)
			return err
		}},
		"stateful set": {"credence-not-opted-in-templates", func(namespace string, pod *corev1.Pod) error {
			_, err := client.AppsV1().StatefulSets(namespace).Create(t.Context(), &appsv1.StatefulSet{ObjectMeta: meta(), Spec: appsv1.StatefulSetSpec{Selector: selector, Template: template(pod)}}, dry)
			return err
		}},
		"daemon set": {"credence-not-opted-in-templates", func(namespace string, pod *corev1.Pod) error {
			_, err := client.AppsV1().DaemonSets(namespace).Create(t.Context(), &appsv1.DaemonSet{ObjectMeta: meta(), Spec: appsv1.DaemonSetSpec{Selector: selector, Template: template(pod)}}, dry)
			return err
		}},
		"job": {"credence-not-opted-in-templates", func(namespace string, pod *corev1.Pod) error {
			pod.Spec.RestartPolicy = corev1.RestartPolicyNever
			_, err := client.BatchV1().Jobs(namespace).Create(t.Context(), &batchv1.Job{ObjectMeta: meta(), Spec: batchv1.JobSpec{Template: template(pod)}}, dry)
			return err
		}},
	}
	const advice = "is not opted in (no label %s=enabled): "
	// The API server hears of a new policy a moment later.
	if err := poll(t.Context(), func() error {
		if err := kinds["deployment"].create(plain, w.pod(w.annotated)); err != nil {
			return err
		}
		if len(h.from("credence-not-opted-in-templates")) == 0 {
			return fmt.Errorf("there is no warning")
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	for kind, k := range kinds {
		for where, tt := range map[string]struct {
			namespace string
			pod       *corev1.Pod
			warned    bool
		}{
			"no label":           {plain, w.pod(w.annotated), true},
			"another label":      {misspelt, w.pod(w.annotated), true},
			"left out":           {disabled, w.pod(w.annotated), true},
			"by another key":     {plain, w.pod(annotate(w.prefix+"/session-name", "x")), true},
			"not annotated":      {plain, w.pod(annotate("example.com/role", "x")), false},
			"no annotations":     {plain, w.pod(), false},
			"opted in":           {optedIn, w.pod(w.complete), false},
			"opted in, no role":  {optedIn, w.pod(), false},
			"what webhooks note": {plain, w.pod(annotate(w.prefix+"/service-account", "x"), annotate(w.prefix+"/warnings", "x")), false},
		} {
			if err := k.create(tt.namespace, tt.pod); err != nil {
				t.Errorf("%s, %s: %v", kind, where, err)
			}
			got := h.from(k.policy)
			if len(got) == 1 != tt.warned || tt.warned && !strings.Contains(got[0], fmt.Sprintf(advice, optIn)) {
				t.Errorf("%s, %s: warned of %q", kind, where, got)
			}
		}
	}
	for value, want := range map[string]string{
		"enabled": "", "disabled": "",
		"enable": `did you mean "enabled"?`, "Enabled": `did you mean "enabled"?`, "true": `did you mean "enabled"?`, "yes": `did you mean "enabled"?`, "": `did you mean "enabled"?`,
		"no": `use "enabled" to opt it in`,
	} {
		ns := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name("ns"), Labels: map[string]string{optIn: value}}}
		if _, err := client.CoreV1().Namespaces().Create(t.Context(), ns, dry); err != nil {
			t.Errorf("namespace labelled %q: %v", value, err)
		}
		got := h.from("credence-opt-in-label")
		if len(got) != min(len(want), 1) || want != "" && (!strings.Contains(got[0], want) || !strings.Contains(got[0], fmt.Sprintf(`is "%s"`, value))) {
			t.Errorf("namespace labelled %q: warned of %q, want %q", value, got, want)
		}
	}
	ns := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name("ns")}}
	if _, err := client.CoreV1().Namespaces().Create(t.Context(), ns, dry); err != nil || len(h.from("credence-opt-in-label")) > 0 {
		t.Errorf("a namespace without the label is warned of (%v)", err)
	}
}

// TestWarningsAreOff: the warnings of pods can be left out, for clusters where kube2iam or kiam serve namespaces.
func TestWarningsAreOff(t *testing.T) {
	rendered, err := chart.Render(t.Context(), chart.Config{Set: []string{"webhook.warnNotOptedIn=false", "aws.region=eu-central-1"}})
	if err != nil {
		t.Fatal(err)
	}
	text := string(rendered)
	if strings.Contains(text, "credence-not-opted-in") || !strings.Contains(text, "name: credence-opt-in-label") {
		t.Error("the policies that warn of pods are still there, or that of namespaces is not")
	}
}
