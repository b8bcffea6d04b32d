//go:build unix

package admission

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	policyv1 "k8s.io/api/policy/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"

	"github.com/credence-iam/credence/integration/kubetest"
)

// injected shows that an annotated pod of an opted-in namespace is admitted only with its sidecar.
func (w *world) injected(t *testing.T) {
	optedIn, plain := w.namespace(t, true), w.namespace(t, false)
	generated := func(p *corev1.Pod) { p.Name, p.GenerateName = "", "pod-" }
	initFirst := func(pod *corev1.Pod) {
		pod.Spec.InitContainers = append(pod.Spec.InitContainers, corev1.Container{Name: "init", Image: "init:1"})
	}
	for name, tc := range map[string]struct {
		namespace string
		pod       *corev1.Pod
		refused   bool
	}{
		"no sidecar":                           {optedIn, w.pod(w.annotated), true},
		"an init container, and no sidecar":    {optedIn, w.pod(w.annotated, initFirst), true},
		"a misspelt key":                       {optedIn, w.pod(annotate(w.prefix+"/roel", "cart")), true},
		"an empty role":                        {optedIn, w.pod(annotate(w.prefix+"/role", "")), true},
		"a sidecar that ends before the app":   {optedIn, w.pod(w.complete, func(p *corev1.Pod) { p.Spec.InitContainers[0].RestartPolicy = nil }), true},
		"another image by its name":            {optedIn, w.pod(w.completeWith("pause:3")), true},
		"another image below the name":         {optedIn, w.pod(w.completeWith("ghcr.io/credence-sidecar/other:1")), true},
		"another image from a host so called":  {optedIn, w.pod(w.completeWith("credence-sidecar:5000/other:1")), true},
		"another image that ends like ours":    {optedIn, w.pod(w.completeWith("ghcr.io/not-credence-sidecar:1")), true},
		"our image by another name":            {optedIn, w.pod(w.complete, func(p *corev1.Pod) { p.Spec.InitContainers[0].Name = "other" }), true},
		"an image with our name as its tag":    {optedIn, w.pod(w.completeWith("pause:credence-sidecar")), true},
		"an image with our name as its digest": {optedIn, w.pod(w.completeWith("pause@sha256:credence-sidecar")), true},
		"an image of a longer name":            {optedIn, w.pod(w.completeWith("ghcr.io/credence-iam/credence-sidecar-x:0.1.0")), true},
		"an image in another case":             {optedIn, w.pod(w.completeWith("ghcr.io/credence-iam/Credence-Sidecar:0.1.0")), true},
		"our command and more": {optedIn, w.pod(w.complete, func(p *corev1.Pod) {
			p.Spec.InitContainers[0].Command = []string{"/credence-sidecar", "probe"}
		}), true},
		"our command by another path": {optedIn, w.pod(w.complete, func(p *corev1.Pod) {
			p.Spec.InitContainers[0].Command = []string{"/tmp/../credence-sidecar"}
		}), true},
		"the label in another case":          {optedIn, w.pod(w.complete, label(w.prefix+"/injected", "True")), true},
		"our image with another command":     {optedIn, w.pod(w.complete, func(p *corev1.Pod) { p.Spec.InitContainers[0].Command = []string{"/bin/sh"} }), true},
		"our image with the image's command": {optedIn, w.pod(w.complete, func(p *corev1.Pod) { p.Spec.InitContainers[0].Command = nil }), true},
		"our image with arguments":           {optedIn, w.pod(w.complete, func(p *corev1.Pod) { p.Spec.InitContainers[0].Args = []string{"probe"} }), true},
		"without the label":                  {optedIn, w.pod(w.complete, func(p *corev1.Pod) { p.Labels = nil }), true},
		"with another label":                 {optedIn, w.pod(w.complete, label(w.prefix+"/injected", "false")), true},
		"our label alone":                    {optedIn, w.pod(w.annotated, label(w.prefix+"/injected", "true")), true},
		"a key in another case":              {optedIn, w.pod(annotate(w.prefix+"/Role", "cart")), true},
		"a generated name":                   {optedIn, w.pod(w.annotated, generated), true},
		"two incomplete sidecars": {optedIn, w.pod(w.complete, func(p *corev1.Pod) {
			p.Spec.InitContainers[0].Name = "other"
			p.Spec.InitContainers = append(p.Spec.InitContainers, corev1.Container{
				Name: "credence-sidecar", Image: "pause:3", Command: []string{"/credence-sidecar"}, RestartPolicy: new(corev1.ContainerRestartPolicyAlways),
			})
		}), true},
		"our image as an ordinary container": {optedIn, w.pod(w.annotated, label(w.prefix+"/injected", "true"), func(p *corev1.Pod) {
			p.Spec.Containers = append(p.Spec.Containers, corev1.Container{Name: "credence-sidecar", Image: sidecarImage, Command: []string{"/credence-sidecar"}})
		}), true},

		"injected, with a generated name":   {optedIn, w.pod(w.complete, generated), false},
		"injected":                          {optedIn, w.pod(w.complete), false},
		"injected, after another container": {optedIn, w.pod(initFirst, w.complete), false},
		"from a mirror":                     {optedIn, w.pod(w.completeWith("mirror.example:5000/gh/credence-sidecar:0.1.0")), false},
		"pinned":                            {optedIn, w.pod(w.completeWith("credence-sidecar@sha256:" + strings.Repeat("0", 64))), false},
		"with other resources": {optedIn, w.pod(w.complete, func(p *corev1.Pod) {
			p.Spec.InitContainers[0].Resources.Limits = corev1.ResourceList{corev1.ResourceCPU: resource.MustParse("1")}
		}), false},
		"of another version":                     {optedIn, w.pod(w.completeWith("ghcr.io/credence-iam/credence-sidecar:0.2.0")), false},
		"only annotations of the webhook":        {optedIn, w.pod(annotate(w.prefix+"/service-account", "default"), annotate(w.prefix+"/warnings", "x")), false},
		"a label without any annotation":         {optedIn, w.pod(label(w.prefix+"/injected", "true")), false},
		"a prefix in another case":               {optedIn, w.pod(annotate(strings.ToUpper(w.prefix)+"/role", "cart")), false},
		"a key that only looks like ours":        {optedIn, w.pod(annotate(w.prefix+".example.org/role", "cart"), annotate("x"+w.prefix+"/role", "cart")), false},
		"no annotation":                          {optedIn, w.pod(), false},
		"annotated, in a namespace not opted in": {plain, w.pod(w.annotated), false},
	} {
		err := try(t, tc.namespace, tc.pod)
		switch {
		case tc.refused:
			if err := refusedBy("credence-injected", err); err != nil {
				t.Errorf("%s: %v", name, err)
			}
		case err != nil:
			t.Errorf("%s: %v", name, err)
		}
	}
	if since(t, 35, "restart policies of init containers other than Always") {
		ends := w.pod(w.complete, func(p *corev1.Pod) {
			p.Spec.InitContainers[0].RestartPolicy = new(corev1.ContainerRestartPolicyOnFailure)
		})
		if err := refusedBy("credence-injected", try(t, optedIn, ends)); err != nil {
			t.Errorf("a restart policy that ends with the pod's: %v", err)
		}
	}
	// Server-side apply creates a missing pod. A dry run gets the same decision.
	missing := w.pod()
	missing.Namespace = optedIn
	text := fmt.Appendf(nil, `{"apiVersion":"v1","kind":"Pod","metadata":{"name":%q,"annotations":{%q:"admin"}},"spec":{"containers":[{"name":"app","image":"app:1"}]}}`, missing.Name, w.prefix+"/role")
	for _, dry := range [][]string{nil, {metav1.DryRunAll}} {
		_, err := client.CoreV1().Pods(optedIn).Patch(t.Context(), missing.Name, types.ApplyPatchType, text, metav1.PatchOptions{FieldManager: "test", DryRun: dry})
		if err := refusedBy("credence-injected", err); err != nil {
			t.Errorf("server-side apply of a missing pod, dry run %v: %v", dry, err)
		}
	}
	w.mirror(t, optedIn)
}

// mirror tests the mirror pods by which a kubelet reports static pods. A static pod cannot get a role, not even with a
// sidecar in its file, because a pod without a service account has no token.
func (w *world) mirror(t *testing.T, namespace string) {
	static := func(pod *corev1.Pod) {
		onNode(pod)
		annotate(corev1.MirrorPodAnnotationKey, "0")(pod)
		machine, err := client.CoreV1().Nodes().Get(t.Context(), nodeName, metav1.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		pod.OwnerReferences = []metav1.OwnerReference{{APIVersion: "v1", Kind: "Node", Name: nodeName, UID: machine.UID, Controller: new(true)}}
	}
	_, err := node.CoreV1().Pods(namespace).Create(t.Context(), w.pod(w.annotated, static), metav1.CreateOptions{})
	if err := refusedBy("credence-injected", err); err != nil {
		t.Errorf("an annotated mirror pod: %v", err)
	}
	withToken := func(pod *corev1.Pod) {
		pod.Spec.Volumes = []corev1.Volume{{Name: "credence-identity", VolumeSource: corev1.VolumeSource{Projected: &corev1.ProjectedVolumeSource{
			Sources: []corev1.VolumeProjection{{ServiceAccountToken: &corev1.ServiceAccountTokenProjection{Audience: "credence-broker", Path: "token"}}},
		}}}}
	}
	if _, err := node.CoreV1().Pods(namespace).Create(t.Context(), w.pod(w.complete, static, withToken), metav1.CreateOptions{}); err == nil {
		t.Error("a mirror pod has a token")
	}
	if _, err := node.CoreV1().Pods(namespace).Create(t.Context(), w.pod(static), metav1.CreateOptions{}); err != nil {
		t.Errorf("a mirror pod without our keys: %v", err)
	}
}

// attempt changes an existing pod, and returns the API server's error.
type attempt func(ctx context.Context, pod *corev1.Pod) error

// update replaces the pod, with all rights.
func update(change func(*corev1.Pod)) attempt {
	return func(ctx context.Context, pod *corev1.Pod) error {
		changed := pod.DeepCopy()
		change(changed)
		_, err := client.CoreV1().Pods(pod.Namespace).Update(ctx, changed, metav1.UpdateOptions{})
		return err
	}
}

// patch sends a merge patch of the metadata.
func patch(who kubernetes.Interface, metadata map[string]any, subresources ...string) attempt {
	return func(ctx context.Context, pod *corev1.Pod) error {
		text, err := json.Marshal(map[string]any{"metadata": metadata})
		if err != nil {
			return err
		}
		_, err = who.CoreV1().Pods(pod.Namespace).Patch(ctx, pod.Name, types.MergePatchType, text, metav1.PatchOptions{}, subresources...)
		return err
	}
}

// jsonPatch sends a JSON Patch.
func jsonPatch(operations string, subresources ...string) attempt {
	return func(ctx context.Context, pod *corev1.Pod) error {
		_, err := client.CoreV1().Pods(pod.Namespace).Patch(ctx, pod.Name, types.JSONPatchType, []byte(operations), metav1.PatchOptions{}, subresources...)
		return err
	}
}

// strategic sends a strategic merge patch.
func strategic(who kubernetes.Interface, text string, subresources ...string) attempt {
	return func(ctx context.Context, pod *corev1.Pod) error {
		_, err := who.CoreV1().Pods(pod.Namespace).Patch(ctx, pod.Name, types.StrategicMergePatchType, []byte(text), metav1.PatchOptions{}, subresources...)
		return err
	}
}

// applyTo sends a server-side apply that takes the fields of other managers.
func applyTo(metadata map[string]any, subresources ...string) attempt {
	return func(ctx context.Context, pod *corev1.Pod) error {
		metadata["name"], metadata["namespace"] = pod.Name, pod.Namespace
		text, err := json.Marshal(map[string]any{"apiVersion": "v1", "kind": "Pod", "metadata": metadata})
		if err != nil {
			return err
		}
		_, err = client.CoreV1().Pods(pod.Namespace).Patch(ctx, pod.Name, types.ApplyPatchType, text, metav1.PatchOptions{FieldManager: "test", Force: new(true)}, subresources...)
		return err
	}
}

// fixedKeys shows that nobody can change the keys that admission has checked, by any request, in any namespace.
func (w *world) fixedKeys(t *testing.T) {
	role, session, injected := w.prefix+"/role", w.prefix+"/session-name", w.prefix+"/injected"
	annotations := func(kv map[string]any) map[string]any { return map[string]any{"annotations": kv} }
	labels := func(kv map[string]any) map[string]any { return map[string]any{"labels": kv} }
	attempts := map[string]attempt{
		"update of the role":                      update(annotate(role, "admin")),
		"update that adds another key":            update(annotate(session, "admin")),
		"update that adds an unknown key":         update(annotate(w.prefix+"/unknown", "x")),
		"update that removes a key":               update(func(p *corev1.Pod) { delete(p.Annotations, role) }),
		"update that removes all annotations":     update(func(p *corev1.Pod) { p.Annotations = nil }),
		"update of the label":                     update(label(injected, "false")),
		"update that removes all labels":          update(func(p *corev1.Pod) { p.Labels = nil }),
		"update that adds a label":                update(label(w.prefix+"/inject", "enabled")),
		"update of the webhook's own annotation":  update(annotate(w.prefix+"/service-account", "admin")),
		"update of the webhook's warnings":        update(annotate(w.prefix+"/warnings", "none")),
		"the warnings by its node":                patch(node, annotations(map[string]any{w.prefix + "/warnings": "none"}), "status"),
		"patch of the role":                       patch(client, annotations(map[string]any{role: "admin"})),
		"patch that removes a key":                patch(client, annotations(map[string]any{role: nil})),
		"patch that removes all annotations":      patch(client, map[string]any{"annotations": nil}),
		"server-side apply of the role":           applyTo(annotations(map[string]any{role: "admin"})),
		"server-side apply of another key":        applyTo(annotations(map[string]any{session: "admin"})),
		"server-side apply of the label":          applyTo(labels(map[string]any{injected: "no"})),
		"patch of the status by its node":         patch(node, annotations(map[string]any{role: "admin"}), "status"),
		"another key by its node":                 patch(node, annotations(map[string]any{session: "admin"}), "status"),
		"the label through the status":            patch(client, labels(map[string]any{injected: "no"}), "status"),
		"server-side apply through the status":    applyTo(annotations(map[string]any{role: "admin"}), "status"),
		"update of the status":                    updateStatus(client, annotate(role, "admin")),
		"update of the status that removes a key": updateStatus(node, func(p *corev1.Pod) { delete(p.Annotations, role) }),
		"operation that replaces the role":        jsonPatch(fmt.Sprintf(`[{"op":"replace","path":"/metadata/annotations/%s","value":"admin"}]`, pointer(role))),
		"operation that adds a key":               jsonPatch(fmt.Sprintf(`[{"op":"add","path":"/metadata/annotations/%s","value":"admin"}]`, pointer(session))),
		"operation that removes the role":         jsonPatch(fmt.Sprintf(`[{"op":"remove","path":"/metadata/annotations/%s"}]`, pointer(role))),
		"operation that moves the role":           jsonPatch(fmt.Sprintf(`[{"op":"move","from":"/metadata/annotations/%s","path":"/metadata/annotations/x"}]`, pointer(role))),
		"operation that copies it":                jsonPatch(fmt.Sprintf(`[{"op":"copy","from":"/metadata/annotations/%s","path":"/metadata/annotations/%s"}]`, pointer(role), pointer(session))),
		"operation on the status":                 jsonPatch(fmt.Sprintf(`[{"op":"add","path":"/metadata/annotations/%s","value":"admin"}]`, pointer(session)), "status"),
		"operation that removes all annotations":  jsonPatch(`[{"op":"remove","path":"/metadata/annotations"}]`),
		"strategic merge of the role":             strategic(client, fmt.Sprintf(`{"metadata":{"annotations":{%q:"admin"}}}`, role)),
		"strategic merge that replaces all":       strategic(client, fmt.Sprintf(`{"metadata":{"annotations":{"$patch":"replace",%q:"admin"}}}`, session)),
		"strategic merge that deletes all":        strategic(client, `{"metadata":{"annotations":{"$patch":"delete"}}}`),
		"strategic merge of the label, as status": strategic(client, fmt.Sprintf(`{"metadata":{"labels":{%q:"no"}}}`, injected), "status"),
		"a key in another case":                   update(annotate(w.prefix+"/Role", "admin")),
		"a key with a value that is empty":        update(annotate(session, "")),
		"a key together with an ordinary change":  update(func(p *corev1.Pod) { annotate("other", "x")(p); annotate(role, "admin")(p) }),
		"one key's value moved to another":        update(func(p *corev1.Pod) { annotate(session, p.Annotations[role])(p); delete(p.Annotations, role) }),
	}
	for where, newNamespace := range map[string]func() string{
		"opted in":       func() string { return w.namespace(t, true) },
		"never opted in": func() string { return w.namespace(t, false) },
		"opted out since": func() string {
			namespace := w.namespace(t, true)
			w.setOptIn(t, namespace, "null")
			return namespace
		},
	} {
		namespace := newNamespace()
		pod := create(t, namespace, w.pod(w.complete, onNode))
		for name, change := range attempts {
			if err := refusedBy("credence-fixed-keys", change(t.Context(), pod)); err != nil {
				t.Errorf("%s, namespace %s: %v", name, where, err)
			}
		}
		w.unchanged(t, pod)
		w.uninjected(t, namespace, where)
	}
	t.Run("OtherSubresources", w.otherSubresources)
	t.Run("Bindings", w.bindings)
}

// uninjected shows that a pod without a sidecar may be annotated, as users of kube2iam and kiam do, but never gets the
// label by which the broker finds pods.
func (w *world) uninjected(t *testing.T, namespace, where string) {
	t.Helper()
	role, injected := w.prefix+"/role", w.prefix+"/injected"
	meta := func(labels, annotations map[string]any) map[string]any {
		metadata := map[string]any{}
		if labels != nil { // null removes them
			metadata["labels"] = labels
		}
		if annotations != nil {
			metadata["annotations"] = annotations
		}
		return metadata
	}
	isInjected := map[string]any{injected: "true"}
	steps := map[string]attempt{
		"the label by an update":                       update(label(injected, "true")),
		"the label by a patch":                         patch(client, meta(isInjected, nil)),
		"the label by server-side apply":               applyTo(map[string]any{"labels": isInjected}),
		"the label by an operation":                    jsonPatch(fmt.Sprintf(`[{"op":"add","path":"/metadata/labels","value":{%q:"true"}}]`, injected)),
		"the label by a strategic merge":               strategic(client, fmt.Sprintf(`{"metadata":{"labels":{%q:"true"}}}`, injected)),
		"the label through the status":                 patch(client, meta(isInjected, nil), "status"),
		"the label and a role":                         patch(client, meta(isInjected, map[string]any{role: "admin"})),
		"the label and a role, by server-side apply":   applyTo(meta(isInjected, map[string]any{role: "admin"})),
		"the label and no role":                        patch(client, meta(isInjected, map[string]any{role: nil})),
		"the label and an annotation that is not ours": patch(client, meta(isInjected, map[string]any{"other": "x"})),
		"the label, and all that the webhook adds, by an update": update(func(p *corev1.Pod) {
			w.annotated(p)
			annotate(w.prefix+"/service-account", "default")(p)
			label(injected, "true")(p)
		}),
	}
	allowed := map[string]attempt{
		"a role":                     patch(client, meta(nil, map[string]any{role: "admin"})),
		"another role":               update(annotate(role, "other")),
		"another role by its node":   patch(node, meta(nil, map[string]any{role: "of-its-node"}), "status"),
		"the service account":        patch(client, meta(nil, map[string]any{w.prefix + "/service-account": "admin"})),
		"the label's key, not true":  patch(client, meta(map[string]any{injected: "false"}, nil)),
		"the label's key, otherwise": patch(client, meta(map[string]any{injected: "True"}, nil)),
		"no role":                    patch(client, meta(nil, map[string]any{role: nil})),
	}
	for start, first := range map[string]*corev1.Pod{
		"without keys":                   w.pod(onNode),
		"annotated":                      w.pod(onNode, annotate(w.prefix+"/service-account", "default")),
		"with the label's key":           w.pod(onNode, label(injected, "false")),
		"with the webhook's own sidecar": w.pod(onNode, sidecar(sidecarImage)),
	} {
		pod := create(t, namespace, first)
		current := func() *corev1.Pod {
			t.Helper()
			stored, err := client.CoreV1().Pods(namespace).Get(t.Context(), pod.Name, metav1.GetOptions{})
			if err != nil {
				t.Fatal(err)
			}
			return stored
		}
		refused := func(before string) {
			t.Helper()
			for name, change := range steps {
				if err := refusedBy("credence-fixed-keys", change(t.Context(), current())); err != nil {
					t.Errorf("a pod %s, %s, gets %s, namespace %s: %v", start, before, name, where, err)
				}
			}
		}
		refused("as it was created")
		for name, change := range allowed {
			if err := change(t.Context(), current()); err != nil {
				t.Errorf("a pod %s gets %s, namespace %s: %v", start, name, where, err)
			}
		}
		refused("after it was annotated and labelled")
		// Other subresources do not add it either.
		debug := fmt.Sprintf(`{"metadata":{"labels":{%q:"true"}},"spec":{"ephemeralContainers":[{"name":"debug","image":"debug:1"}]}}`, injected)
		_ = strategic(client, debug, "ephemeralcontainers")(t.Context(), pod)
		_ = strategic(client, debug, "resize")(t.Context(), pod)
		if labels := current().Labels; labels[injected] == "true" {
			t.Errorf("a pod %s has got the broker's label: %v", start, labels)
		}
	}
}

// pointer escapes a key for a JSON pointer.
func pointer(key string) string { return strings.ReplaceAll(key, "/", "~1") }

func onNode(pod *corev1.Pod) { pod.Spec.NodeName = nodeName }

func updateStatus(who kubernetes.Interface, change func(*corev1.Pod)) attempt {
	return func(ctx context.Context, pod *corev1.Pod) error {
		changed := pod.DeepCopy()
		change(changed)
		_, err := who.CoreV1().Pods(pod.Namespace).UpdateStatus(ctx, changed, metav1.UpdateOptions{})
		return err
	}
}

// unchanged checks that a pod has the keys that it was created with.
func (w *world) unchanged(t *testing.T, created *corev1.Pod) {
	t.Helper()
	stored, err := client.CoreV1().Pods(created.Namespace).Get(t.Context(), created.Name, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	keys := func(pod *corev1.Pod) map[string]string {
		ours := map[string]string{}
		for kind, all := range map[string]map[string]string{"annotation ": pod.Annotations, "label ": pod.Labels} {
			for key, value := range all {
				if strings.HasPrefix(key, w.prefix+"/") {
					ours[kind+key] = value
				}
			}
		}
		return ours
	}
	if diff := cmp.Diff(keys(created), keys(stored)); diff != "" {
		t.Errorf("the keys of pod %s have changed (- created, + now):\n%s", created.Name, diff)
	}
}

// otherSubresources shows that other subresources ignore metadata, and so change no key.
func (w *world) otherSubresources(t *testing.T) {
	cpu := func(amount string) func(*corev1.Pod) {
		return func(p *corev1.Pod) {
			p.Spec.Containers[0].Resources.Requests = corev1.ResourceList{corev1.ResourceCPU: resource.MustParse(amount)}
		}
	}
	pod := create(t, w.namespace(t, true), w.pod(w.complete, onNode, cpu("20m")))
	pods := client.CoreV1().Pods(pod.Namespace)
	changed := func() *corev1.Pod {
		current, err := pods.Get(t.Context(), pod.Name, metav1.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		annotate(w.prefix+"/role", "admin")(current)
		label(w.prefix+"/injected", "no")(current)
		return current
	}
	if since(t, 33, "pods/resize") {
		resized := changed()
		cpu("10m")(resized)
		if _, err := pods.UpdateResize(t.Context(), pod.Name, resized, metav1.UpdateOptions{}); err != nil {
			t.Errorf("resize: %v", err)
		}
		w.unchanged(t, pod)
	}
	debugged := changed()
	debugged.Spec.EphemeralContainers = []corev1.EphemeralContainer{{EphemeralContainerCommon: corev1.EphemeralContainerCommon{Name: "debug", Image: "debug:1"}}}
	if _, err := pods.UpdateEphemeralContainers(t.Context(), pod.Name, debugged, metav1.UpdateOptions{}); err != nil {
		t.Errorf("ephemeral containers: %v", err)
	}
	w.unchanged(t, pod)
	for _, subresource := range []string{"resize", "ephemeralcontainers"} {
		_ = patch(client, map[string]any{"annotations": map[string]any{w.prefix + "/role": "admin"}}, subresource)(t.Context(), pod)
		w.unchanged(t, pod)
	}
}

// bindings shows that a Binding cannot set our keys. The API server copies its annotations to the pod.
func (w *world) bindings(t *testing.T) {
	namespace := w.namespace(t, true)
	bind := func(pod *corev1.Pod, annotations map[string]string) *corev1.Binding {
		return &corev1.Binding{
			ObjectMeta: metav1.ObjectMeta{Name: pod.Name, Annotations: annotations},
			Target:     corev1.ObjectReference{Kind: "Node", Name: nodeName},
		}
	}
	stolen := map[string]string{w.prefix + "/role": "admin"}
	pod := create(t, namespace, w.pod(w.complete))
	err := client.CoreV1().Pods(namespace).Bind(t.Context(), bind(pod, stolen), metav1.CreateOptions{})
	if err := refusedBy("credence-fixed-keys", err); err != nil {
		t.Errorf("pods/binding: %v", err)
	}
	err = client.CoreV1().RESTClient().Post().Namespace(namespace).Resource("bindings").Body(bind(pod, stolen)).Do(t.Context()).Error()
	if err := refusedBy("credence-fixed-keys", err); err != nil {
		t.Errorf("bindings: %v", err)
	}
	w.unchanged(t, pod)
	labelled := bind(pod, nil)
	labelled.Labels = map[string]string{w.prefix + "/injected": "no"}
	err = client.CoreV1().Pods(namespace).Bind(t.Context(), labelled, metav1.CreateOptions{})
	if err := refusedBy("credence-fixed-keys", err); err != nil {
		t.Errorf("pods/binding with a label: %v", err)
	}
	w.unchanged(t, pod)
	// The API server does not copy the metadata of an eviction.
	eviction := &policyv1.Eviction{ObjectMeta: metav1.ObjectMeta{Name: pod.Name, Annotations: stolen}, DeleteOptions: &metav1.DeleteOptions{DryRun: []string{metav1.DryRunAll}}}
	if err := client.CoreV1().Pods(namespace).EvictV1(t.Context(), eviction); err != nil {
		t.Errorf("an eviction: %v", err)
	}
	w.unchanged(t, pod)
	// A scheduler can still bind pods.
	for _, annotations := range []map[string]string{nil, {"scheduler.example.com/score": "1"}} {
		pod := create(t, namespace, w.pod(w.complete))
		if err := client.CoreV1().Pods(namespace).Bind(t.Context(), bind(pod, annotations), metav1.CreateOptions{}); err != nil {
			t.Errorf("a binding with annotations %v: %v", annotations, err)
		}
		w.unchanged(t, pod)
	}
}

// othersAreUnaffected shows that requests which do not change our keys succeed, for pods with and without them.
func (w *world) othersAreUnaffected(t *testing.T) {
	namespace := w.namespace(t, true)
	many := func(pod *corev1.Pod) {
		for n := range 4000 { // of about 40 bytes each; the limit is 256 KiB
			annotate(fmt.Sprintf("example.com/annotation-number-%d", n), "0123456789")(pod)
		}
	}
	for name, first := range map[string]*corev1.Pod{
		"an injected pod":                       w.pod(w.complete, onNode),
		"a pod without annotations or labels":   w.pod(onNode),
		"a pod with others":                     w.pod(annotate("other", "x"), label("other", "x"), onNode),
		"an injected pod with many annotations": w.pod(w.complete, many, onNode),
	} {
		pod := create(t, namespace, first)
		pods := client.CoreV1().Pods(namespace)
		for step, change := range map[string]attempt{
			"an annotation":             patch(client, map[string]any{"annotations": map[string]any{"example.com/x": "y"}}),
			"a label":                   patch(client, map[string]any{"labels": map[string]any{"example.com/x": "y"}}),
			"server-side apply":         applyTo(map[string]any{"labels": map[string]any{"example.com/y": "z"}}),
			"an annotation by the node": patch(node, map[string]any{"annotations": map[string]any{"example.com/node": "y"}}, "status"),
			"a finalizer":               patch(client, map[string]any{"finalizers": []string{"example.com/hold"}}),
			"a new image":               strategic(client, `{"spec":{"containers":[{"name":"app","image":"app:2"}]}}`),
			"the kubelet's status": strategic(node,
				`{"status":{"phase":"Running","podIPs":[{"ip":"10.0.0.1"}],"conditions":[{"type":"Ready","status":"True"}]}}`, "status"),
			"an ephemeral container": strategic(client, `{"spec":{"ephemeralContainers":[{"name":"debug","image":"debug:1"}]}}`, "ephemeralcontainers"),
		} {
			if err := change(t.Context(), pod); err != nil {
				t.Errorf("%s: %s: %v", name, step, err)
			}
		}
		// The finalizer is removed while the pod terminates.
		if err := pods.Delete(t.Context(), pod.Name, metav1.DeleteOptions{GracePeriodSeconds: new(int64)}); err != nil {
			t.Errorf("%s: deletion: %v", name, err)
		}
		if err := patch(client, map[string]any{"finalizers": nil})(t.Context(), pod); err != nil {
			t.Errorf("%s: removing the finalizer of a terminating pod: %v", name, err)
		}
		kubetest.AwaitDeleted(t, client, namespace, pod.Name)
	}
}
