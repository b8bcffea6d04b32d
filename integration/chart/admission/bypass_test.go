//go:build unix

package admission

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/credence-iam/credence/integration/tools"
)

// kubectl runs what users run, and returns what it prints, as an error if it fails.
func kubectl(ctx context.Context, path, stdin string, args ...string) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	cmd := control.Command(ctx, path, args...)
	var out bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(stdin), &out, &out
	err := control.Host().Launch(cmd)
	if err == nil {
		err = cmd.Wait()
	}
	if err != nil {
		return fmt.Errorf("kubectl %q: %w: %s", args, err, out.String())
	}
	return nil
}

// commands: what kubectl offers for changing a pod is refused, and it says why; what it makes anew is judged anew.
func (w *world) commands(t *testing.T) {
	path, err := tools.Path(t.Context(), tools.Kubectl, t.Output())
	if err != nil {
		t.Fatal(err)
	}
	namespace := w.namespace(t, true)
	role, session, injected := w.prefix+"/role", w.prefix+"/session-name", w.prefix+"/injected"
	pod := create(t, namespace, w.pod(w.complete)) // on no node, whose kubelet kubectl would wait for
	manifest := func(annotations string) string {
		return fmt.Sprintf("apiVersion: v1\nkind: Pod\nmetadata: {name: %s, annotations: {%s}}\nspec: {containers: [{name: app, image: 'app:1'}]}\n", pod.Name, annotations)
	}
	const fixed, sidecarless = "cannot be changed on an existing pod", "but has no sidecar"
	for _, tc := range []struct {
		args  []string
		stdin string
		want  string // in what it prints; empty: it succeeds
	}{
		{[]string{"annotate", "pod", pod.Name, "--overwrite", role + "=admin"}, "", fixed},
		{[]string{"annotate", "pod", pod.Name, session + "=admin"}, "", fixed},
		{[]string{"annotate", "pod", pod.Name, role + "-"}, "", fixed},
		{[]string{"annotate", "pods", "--all", "--overwrite", role + "=admin"}, "", fixed},
		{[]string{"label", "pod", pod.Name, "--overwrite", injected + "=false"}, "", fixed},
		{[]string{"label", "pod", pod.Name, injected + "-"}, "", fixed},
		{[]string{"apply", "--server-side", "--force-conflicts", "-f", "-"}, manifest(role + ": admin"), fixed},
		{[]string{"apply", "-f", "-"}, manifest(role + ": admin"), fixed},
		{[]string{"patch", "pod", pod.Name, "--subresource=status", "--type=merge", "-p", fmt.Sprintf(`{"metadata":{"annotations":{%q:"admin"}}}`, role)}, "", fixed},
		{[]string{"annotate", "pod", pod.Name, "example.com/note=x"}, "", ""},
		// It deletes the pod and makes another one of the name.
		{[]string{"replace", "--force", "-f", "-"}, manifest(role + ": admin"), sidecarless},
	} {
		if tc.args[0] == "replace" {
			w.unchanged(t, pod)
		}
		err := kubectl(t.Context(), path, tc.stdin, append(tc.args, "--namespace="+namespace)...)
		if tc.want == "" && err != nil || tc.want != "" && (err == nil || !strings.Contains(err.Error(), tc.want)) {
			t.Errorf("kubectl %q: answered %v, want %q", tc.args, err, tc.want)
		}
	}
}

// recreated: a pod that takes the place of another is judged as what it is, and one that is being deleted keeps its
// keys until it is gone.
func (w *world) recreated(t *testing.T) {
	namespace := w.namespace(t, true)
	pods := client.CoreV1().Pods(namespace)
	held := func(pod *corev1.Pod) {
		pod.Finalizers = []string{"example.com/hold"}
		label("game", "recreate")(pod)
	}
	pod := create(t, namespace, w.pod(w.complete, onNode, held))
	now := int64(0)
	if err := pods.DeleteCollection(t.Context(), metav1.DeleteOptions{GracePeriodSeconds: &now}, metav1.ListOptions{LabelSelector: "game=recreate"}); err != nil {
		t.Fatal(err)
	}
	going, err := pods.Get(t.Context(), pod.Name, metav1.GetOptions{})
	if err != nil || going.DeletionTimestamp == nil {
		t.Fatalf("the pod is not being deleted (%v)", err)
	}
	for name, try := range map[string]attempt{
		"an update":                 update(annotate(w.prefix+"/role", "admin")),
		"a patch":                   patch(client, map[string]any{"annotations": map[string]any{w.prefix + "/role": "admin"}}),
		"a patch by its node":       patch(node, map[string]any{"annotations": map[string]any{w.prefix + "/role": "admin"}}, "status"),
		"together with its release": patch(client, map[string]any{"finalizers": nil, "annotations": map[string]any{w.prefix + "/role": "admin"}}),
	} {
		if err := refusedBy("credence-fixed-keys", try(t.Context(), going)); err != nil {
			t.Errorf("%s of a pod that is being deleted: %v", name, err)
		}
	}
	w.unchanged(t, going)
	if err := patch(client, map[string]any{"finalizers": nil})(t.Context(), going); err != nil {
		t.Fatal(err)
	}
	if err := poll(t.Context(), func() error {
		_, err := pods.Get(t.Context(), pod.Name, metav1.GetOptions{})
		if err == nil {
			return errors.New("it is still there")
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	named := func(p *corev1.Pod) { p.Name = pod.Name }
	for name, again := range map[string]*corev1.Pod{
		"as a user writes it": w.pod(w.annotated, named),
		"with what the API server said of the first, and no sidecar": func() *corev1.Pod {
			stale := pod.DeepCopy()
			stale.ResourceVersion, stale.Spec.InitContainers = "", nil
			return stale
		}(),
	} {
		_, err := pods.Create(t.Context(), again, metav1.CreateOptions{})
		if err := refusedBy("credence-injected", err); err != nil {
			t.Errorf("made anew, %s: %v", name, err)
		}
	}
	create(t, namespace, w.pod(w.complete, named))
}

// relabelled: what was made while its namespace was not opted in gets nothing by having it opted in afterwards, and the
// first pod from then on is judged.
func (w *world) relabelled(t *testing.T) {
	namespace := w.namespace(t, false)
	optIn := w.prefix + "/inject"
	set := func(value string) {
		t.Helper()
		text := fmt.Appendf(nil, `{"metadata":{"labels":{%q:%s}}}`, optIn, value)
		if _, err := client.CoreV1().Namespaces().Patch(t.Context(), namespace, types.MergePatchType, text, metav1.PatchOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	dry := metav1.CreateOptions{DryRun: []string{metav1.DryRunAll}}
	early := map[string]*corev1.Pod{
		"annotated": create(t, namespace, w.pod(w.annotated, onNode)),
		"plain":     create(t, namespace, w.pod(onNode)),
	}
	for _, value := range []string{`"enabled"`, `"disabled"`, `"enabled"`} { // and off, and on again
		set(value)
		// The API server selects namespaces by a watch of its own.
		if err := poll(t.Context(), func() error {
			_, err := client.CoreV1().Pods(namespace).Create(t.Context(), w.pod(w.annotated), dry)
			if value == `"enabled"` {
				return refusedBy("credence-injected", err)
			}
			return err
		}); err != nil {
			t.Fatalf("the namespace is labelled %s: %v", value, err)
		}
		for what, pod := range early {
			isInjected := map[string]any{w.prefix + "/injected": "true"}
			for name, try := range map[string]attempt{
				"the label by which the broker finds it": patch(client, map[string]any{"labels": isInjected}),
				"the label and a role":                   patch(client, map[string]any{"labels": isInjected, "annotations": map[string]any{w.prefix + "/role": "admin"}}),
			} {
				if err := refusedBy("credence-fixed-keys", try(t.Context(), pod)); err != nil {
					t.Errorf("pod %s of before gets %s, with its namespace labelled %s: %v", what, name, value, err)
				}
			}
			w.unchanged(t, pod)
			// Whatever role it is annotated with, the broker does not find it.
			for name, try := range map[string]attempt{
				"a role":              patch(client, map[string]any{"annotations": map[string]any{w.prefix + "/role": "admin"}}),
				"a role, by its node": patch(node, map[string]any{"annotations": map[string]any{w.prefix + "/role": "of-its-node"}}, "status"),
				"the role of before":  patch(client, map[string]any{"annotations": map[string]any{w.prefix + "/role": pod.Annotations[w.prefix+"/role"]}}),
			} {
				if err := try(t.Context(), pod); err != nil {
					t.Errorf("pod %s of before gets %s, with its namespace labelled %s: %v", what, name, value, err)
				}
			}
			restored, err := client.CoreV1().Pods(namespace).Get(t.Context(), pod.Name, metav1.GetOptions{})
			if err != nil || restored.Labels[w.prefix+"/injected"] != "" {
				t.Fatalf("pod %s of before has labels %v (%v)", what, restored.Labels, err)
			}
			early[what] = restored
		}
	}
	// A label that only looks like ours opts nothing in: neither webhook nor broker knows it.
	set("null")
	text := fmt.Appendf(nil, `{"metadata":{"labels":{%q:"Enabled"}}}`, optIn)
	if _, err := client.CoreV1().Namespaces().Patch(t.Context(), namespace, types.MergePatchType, text, metav1.PatchOptions{}); err != nil {
		t.Fatal(err)
	}
	if err := poll(t.Context(), func() error {
		_, err := client.CoreV1().Pods(namespace).Create(t.Context(), w.pod(w.annotated), dry)
		return err
	}); err != nil {
		t.Errorf("an annotated pod of a namespace that is labelled otherwise: %v", err)
	}
}

// forged: a pod that brings what the webhook would have added is admitted only as what the webhook adds, in whatever
// way it comes into the cluster.
func (w *world) forged(t *testing.T) {
	namespace := w.namespace(t, true)
	generated := func(p *corev1.Pod) { p.Name, p.GenerateName = "", "pod-" }
	for name, pod := range map[string]*corev1.Pod{
		"our name, image and command, as an ordinary container": w.pod(w.annotated, label(w.prefix+"/injected", "true"), func(p *corev1.Pod) {
			p.Spec.Containers = append(p.Spec.Containers, corev1.Container{Name: "credence-sidecar", Image: sidecarImage, Command: []string{"/credence-sidecar"}})
		}),
		"a restart policy that ends with the pod's": w.pod(w.complete, func(p *corev1.Pod) {
			p.Spec.InitContainers[0].RestartPolicy = new(corev1.ContainerRestartPolicyOnFailure)
		}),
		"a command that begins like ours": w.pod(w.complete, func(p *corev1.Pod) {
			p.Spec.InitContainers[0].Command = []string{"/credence-sidecar", "probe"}
		}),
		"a command by another path": w.pod(w.complete, func(p *corev1.Pod) {
			p.Spec.InitContainers[0].Command = []string{"/tmp/../credence-sidecar"}
		}),
		"an image with our name as its tag":    w.pod(w.completeWith("pause:credence-sidecar")),
		"an image with our name as its digest": w.pod(w.completeWith("pause@sha256:credence-sidecar")),
		"an image of a longer name":            w.pod(w.completeWith("ghcr.io/credence-iam/credence-sidecar-x:0.1.0")),
		"an image in another case":             w.pod(w.completeWith("ghcr.io/credence-iam/Credence-Sidecar:0.1.0")),
		"a generated name":                     w.pod(w.completeWith("pause:3"), generated),
		"the label in another case":            w.pod(w.complete, label(w.prefix+"/injected", "True")),
	} {
		_, err := client.CoreV1().Pods(namespace).Create(t.Context(), pod, metav1.CreateOptions{})
		if err := refusedBy("credence-injected", err); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	made := create(t, namespace, w.pod(w.complete, generated))
	if err := refusedBy("credence-fixed-keys", update(annotate(w.prefix+"/role", "admin"))(t.Context(), made)); err != nil {
		t.Errorf("an update of a pod whose name was generated: %v", err)
	}
	w.unchanged(t, made)
	// By ephemeral containers a pod does not get a sidecar afterwards, nor lose it.
	debug := `{"spec":{"ephemeralContainers":[{"name":"credence-sidecar","image":"pause:3"}]}}`
	if err := strategic(client, debug, "ephemeralcontainers")(t.Context(), made); err == nil {
		t.Error("an ephemeral container has the sidecar's name")
	}
	if err := strategic(client, `{"spec":{"initContainers":[{"name":"credence-sidecar","image":"pause:3"}]}}`, "ephemeralcontainers")(t.Context(), made); err == nil {
		stored, err := client.CoreV1().Pods(namespace).Get(t.Context(), made.Name, metav1.GetOptions{})
		if err != nil || stored.Spec.InitContainers[0].Image != sidecarImage {
			t.Errorf("through ephemeralcontainers the sidecar has become %v (%v)", stored.Spec.InitContainers, err)
		}
	}
}
