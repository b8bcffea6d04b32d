//go:build unix

package integration

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/yaml"

	"github.com/credence-iam/credence/integration/stack"
	"github.com/credence-iam/credence/integration/tools"
)

// injected says what pod lacks of what it should have been given, or nothing.
func injected(pod *corev1.Pod) error {
	sidecars := 0
	for _, c := range pod.Spec.InitContainers {
		if c.Name == stack.SidecarName {
			sidecars++
		}
	}
	if sidecars != 1 {
		return fmt.Errorf("pod %s has %d sidecars", pod.Name, sidecars)
	}
	for _, c := range slices.Concat(pod.Spec.InitContainers, pod.Spec.Containers) {
		if c.Name != stack.SidecarName && !slices.ContainsFunc(c.Env, func(e corev1.EnvVar) bool { return e.Name == "AWS_CONTAINER_CREDENTIALS_FULL_URI" }) {
			return fmt.Errorf("container %s of pod %s has no AWS_CONTAINER_CREDENTIALS_FULL_URI", c.Name, pod.Name)
		}
	}
	if pod.Labels["iam.amazonaws.com/injected"] != "true" {
		return fmt.Errorf("pod %s has labels %v", pod.Name, pod.Labels)
	}
	return nil
}

// scratch is namespace, for a test that leaves nothing behind: whoever waits for all opted-in namespaces, as a test of
// replaced certificates does, is not to wait for its.
func scratch(t *testing.T, permitted string) string {
	t.Helper()
	ns := namespace(t, permitted)
	discard(t, ns)
	return ns
}

// discard deletes a namespace when the test ends.
func discard(t *testing.T, ns string) {
	t.Cleanup(func() {
		if err := credence.Client.CoreV1().Namespaces().Delete(context.WithoutCancel(t.Context()), ns, metav1.DeleteOptions{}); err != nil {
			t.Error(err)
		}
	})
}

// The pods of webhook/inject's golden tests, in a dry run: what injection makes of them is a pod to the API server, and
// it stores nothing and has no effect elsewhere.
func TestGoldenPodsAreAccepted(t *testing.T) {
	t.Parallel()
	ns := scratch(t, ".*")
	files, err := filepath.Glob("../webhook/inject/testdata/*.in.yaml")
	if err != nil {
		t.Fatal(err)
	}
	if len(files) < 20 {
		t.Fatalf("there are %d golden pods, want at least 20", len(files))
	}
	accounts := map[string]bool{"": true, "default": true}
	for _, file := range files {
		if filepath.Base(file) == "reinvoked.in.yaml" {
			continue // it has a sidecar already, and not that of the webhook here
		}
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		raw, err := yaml.YAMLToJSON(text)
		if err != nil {
			t.Fatal(err)
		}
		var pod struct {
			Metadata metav1.ObjectMeta
			Spec     struct{ ServiceAccountName, ServiceAccount string }
		}
		if err := yaml.Unmarshal(text, &pod); err != nil {
			t.Fatalf("%s: %v", file, err)
		}
		for _, name := range []string{pod.Spec.ServiceAccountName, pod.Spec.ServiceAccount} {
			if !accounts[name] {
				accounts[name] = true
				account := &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Name: name}}
				if _, err := credence.Client.CoreV1().ServiceAccounts(ns).Create(t.Context(), account, metav1.CreateOptions{}); err != nil {
					t.Fatal(err)
				}
			}
		}
		// As the text is, with fields that no client of ours knows.
		var made corev1.Pod
		err = credence.Client.CoreV1().RESTClient().Post().Namespace(ns).Resource("pods").
			Param("dryRun", metav1.DryRunAll).SetHeader("Content-Type", "application/json").Body(raw).Do(t.Context()).Into(&made)
		if err != nil {
			t.Errorf("%s: %v", filepath.Base(file), err)
			continue
		}
		if has := slices.ContainsFunc(made.Spec.InitContainers, func(c corev1.Container) bool { return c.Name == stack.SidecarName }); has != (pod.Metadata.Annotations[roleKey] != "") {
			t.Errorf("%s: it has a sidecar: %v", filepath.Base(file), has)
		}
	}
	if left, err := credence.Client.CoreV1().Pods(ns).List(t.Context(), metav1.ListOptions{}); err != nil || len(left.Items) > 0 {
		t.Errorf("dry runs have left %d pods (%v)", len(left.Items), err)
	}
}

// Controllers make pods with names that the API server completes, in a namespace that only the request says.
func TestControllersPodsAreInjected(t *testing.T) {
	t.Parallel()
	ns := scratch(t, ".*")
	template := func(app string) (corev1.PodTemplateSpec, *metav1.LabelSelector) {
		labels := map[string]string{"app": app}
		return corev1.PodTemplateSpec{
			ObjectMeta: metav1.ObjectMeta{Labels: labels, Annotations: map[string]string{roleKey: "cart"}},
			Spec:       stack.Pod("", nil).Spec,
		}, &metav1.LabelSelector{MatchLabels: labels}
	}
	pod, selector := template("deployment")
	if _, err := credence.Client.AppsV1().Deployments(ns).Create(t.Context(), &appsv1.Deployment{
		ObjectMeta: metav1.ObjectMeta{Name: "deployment"}, Spec: appsv1.DeploymentSpec{Template: pod, Selector: selector},
	}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	pod, selector = template("statefulset")
	if _, err := credence.Client.AppsV1().StatefulSets(ns).Create(t.Context(), &appsv1.StatefulSet{
		ObjectMeta: metav1.ObjectMeta{Name: "statefulset"}, Spec: appsv1.StatefulSetSpec{Template: pod, Selector: selector},
	}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	pod, _ = template("job")
	pod.Spec.RestartPolicy = corev1.RestartPolicyNever
	if _, err := credence.Client.BatchV1().Jobs(ns).Create(t.Context(), &batchv1.Job{
		ObjectMeta: metav1.ObjectMeta{Name: "job"}, Spec: batchv1.JobSpec{Template: pod},
	}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	for _, app := range []string{"deployment", "statefulset", "job"} {
		await(t, func() error {
			pods, err := credence.Client.CoreV1().Pods(ns).List(t.Context(), metav1.ListOptions{LabelSelector: "app=" + app})
			if err != nil {
				return err
			}
			if len(pods.Items) != 1 {
				return fmt.Errorf("%s has %d pods", app, len(pods.Items))
			}
			return injected(&pods.Items[0])
		})
	}
}

// await calls done until it returns nil.
func await(t *testing.T, done func() error) {
	t.Helper()
	deadline := time.After(time.Minute) // for what takes well under a second
	for {
		err := done()
		if err == nil {
			return
		}
		select {
		case <-deadline:
			t.Fatal(err)
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// Updates are nobody's business: not of a pod that is injected, and not of one that was there before its namespace was
// opted in.
func TestUpdatesAreNotMutated(t *testing.T) {
	t.Parallel()
	ns := strings.ToLower(t.Name())
	discard(t, ns)
	if err := credence.MakeNamespace(t.Context(), &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: ns, Annotations: map[string]string{permittedKey: ".*"}}}); err != nil {
		t.Fatal(err)
	}
	pods := credence.Client.CoreV1().Pods(ns)
	early := create(t, ns, "early", map[string]string{roleKey: "cart"})
	text := fmt.Appendf(nil, `{"metadata":{"labels":{%q:"enabled"}}}`, injectLabel)
	if _, err := credence.Client.CoreV1().Namespaces().Patch(t.Context(), ns, types.MergePatchType, text, metav1.PatchOptions{}); err != nil {
		t.Fatal(err)
	}
	var late *corev1.Pod
	await(t, func() (err error) { // the webhook's and the API server's own watches of namespaces
		late, err = pods.Create(t.Context(), stack.Pod("late", map[string]string{roleKey: "cart"}), metav1.CreateOptions{DryRun: []string{metav1.DryRunAll}})
		if err == nil {
			err = injected(late)
		}
		return err
	})
	late = create(t, ns, "late", map[string]string{roleKey: "cart"})
	for _, pod := range []*corev1.Pod{early, late} {
		changed := pod.DeepCopy()
		changed.Labels = map[string]string{"x": "y"}
		maps.Copy(changed.Labels, pod.Labels)
		changed.Spec.Containers[0].Image = "app:2"
		updated, err := pods.Update(t.Context(), changed, metav1.UpdateOptions{})
		if err != nil {
			t.Fatal(err)
		}
		changed.Spec.DeepCopyInto(&pod.Spec)
		got, _ := json.Marshal(updated.Spec)
		want, _ := json.Marshal(pod.Spec)
		if !bytes.Equal(got, want) {
			t.Errorf("an update of pod %s was mutated:\n%s\nwant\n%s", pod.Name, got, want)
		}
	}
}

// kubectl is what users run.
func kubectl(t *testing.T, stdin string, args ...string) (string, error) {
	t.Helper()
	path, err := tools.Path(t.Context(), tools.Kubectl, t.Output())
	if err != nil {
		t.Fatal(err)
	}
	cmd := control.Command(t.Context(), path, args...)
	var out bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(stdin), &out, &out
	if err = control.Host().Launch(cmd); err == nil {
		err = cmd.Wait()
	}
	return out.String(), err
}

// What users type makes the pods that controllers make, and typing it again changes nothing.
func TestKubectl(t *testing.T) {
	t.Parallel()
	if testing.Short() && !tools.Built(tools.Kubectl) {
		t.Skip("-short, and kubectl would have to be built first (go run ./integration/tools/install)")
	}
	ns := scratch(t, arn("cart"))
	get := func(name string) *corev1.Pod {
		t.Helper()
		pod, err := credence.Client.CoreV1().Pods(ns).Get(t.Context(), name, metav1.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		return pod
	}
	must := func(stdin string, args ...string) string {
		t.Helper()
		out, err := kubectl(t, stdin, append(args, "--namespace="+ns)...)
		if err != nil {
			t.Fatalf("kubectl %q: %v\n%s", args, err, out)
		}
		return out
	}
	must("", "run", "run", "--image=app:1", "--annotations="+roleKey+"=cart")
	if err := injected(get("run")); err != nil {
		t.Errorf("kubectl run: %v", err)
	}
	if out, err := kubectl(t, "", "run", "greedy", "--image=app:1", "--annotations="+roleKey+"=admin", "--namespace="+ns); err == nil || !strings.Contains(out, `credence: namespace "`+ns+`" does not permit role`) {
		t.Errorf("kubectl run with a role that is not permitted: %v\n%s", err, out)
	}

	// An ephemeral container comes later, and does not concern us: it has what kubectl gives it.
	must("", "debug", "run", "--image=debug:1", "--container=debugger", "--target=run", "--attach=false")
	pod := get("run")
	if len(pod.Spec.EphemeralContainers) != 1 || len(pod.Spec.EphemeralContainers[0].Env) != 0 {
		t.Errorf("kubectl debug: the pod has ephemeral containers %+v", pod.Spec.EphemeralContainers)
	}
	if err := injected(pod); err != nil {
		t.Errorf("after kubectl debug: %v", err)
	}
	// A copy of an injected pod has its sidecar and its volume already, and gets no others.
	must("", "debug", "run", "--copy-to=copy", "--image=debug:1", "--container=debugger", "--keep-annotations", "--keep-labels", "--attach=false", "--keep-init-containers=true")
	if err := injected(get("copy")); err != nil {
		t.Errorf("kubectl debug --copy-to: %v", err)
	}

	manifest := fmt.Sprintf("apiVersion: v1\nkind: Pod\nmetadata: {name: applied, annotations: {%s: cart}}\nspec: {containers: [{name: app, image: 'app:1'}]}\n", roleKey)
	for _, side := range []string{"--server-side", "--server-side=false"} {
		must(manifest, "apply", "-f", "-", side)
		first := get("applied")
		if err := injected(first); err != nil {
			t.Errorf("kubectl apply %s: %v", side, err)
		}
		out := must(manifest, "apply", "-f", "-", side)
		if again := get("applied"); again.Generation != first.Generation || !strings.Contains(out, "applied") && !strings.Contains(out, "unchanged") {
			t.Errorf("kubectl apply %s again: generation %d, was %d\n%s", side, again.Generation, first.Generation, out)
		}
		must("", "delete", "pod", "applied", "--now")
	}
	out := must(manifest, "create", "-f", "-", "--dry-run=server", "-o", "name")
	if _, err := credence.Client.CoreV1().Pods(ns).Get(t.Context(), "applied", metav1.GetOptions{}); !apierrors.IsNotFound(err) {
		t.Errorf("kubectl create --dry-run=server (%s): the pod is there: %v", out, err)
	}
}

// The API server takes requests of 3 MB, and stores half of that. A pod as large as can be stored is injected. A larger one
// is refused by the webhook, with the reason, or by the API server.
func TestLargePods(t *testing.T) {
	t.Parallel()
	ns := scratch(t, ".*")
	large := func(bytes int) *corev1.Pod {
		pod := stack.Pod("", map[string]string{roleKey: "cart"})
		pod.GenerateName = "large-"
		// One variable of a megabyte, and many small ones, in escapes that are longer in JSON.
		pod.Spec.Containers[0].Env = []corev1.EnvVar{{Name: "LONG", Value: strings.Repeat("x", bytes/3)}}
		for n := range bytes / 3 * 2 / 64 {
			pod.Spec.Containers[0].Env = append(pod.Spec.Containers[0].Env, corev1.EnvVar{Name: fmt.Sprintf("V_%06d", n), Value: strings.Repeat("y", 30)})
		}
		return pod
	}
	dry := metav1.CreateOptions{DryRun: []string{metav1.DryRunAll}}
	plain := large(3_000_000)
	plain.Annotations = nil
	if _, err := credence.Client.CoreV1().Pods(ns).Create(t.Context(), plain, metav1.CreateOptions{}); err == nil {
		t.Error("a pod of 3 MB, not injected, was stored: larger ones may be, too")
	}
	pod, err := credence.Client.CoreV1().Pods(ns).Create(t.Context(), large(1_250_000), dry)
	if err != nil {
		t.Fatalf("1.25 MB: %.500v", err)
	}
	if err := injected(pod); err != nil {
		t.Errorf("1.25 MB: %v", err)
	}
	_, err = credence.Client.CoreV1().Pods(ns).Create(t.Context(), large(2_500_000), dry)
	if err == nil || !strings.Contains(err.Error(), "an API server takes") || len(err.Error()) > 1000 {
		t.Errorf("2.5 MB: answered %.500v", err)
	}
	_, err = credence.Client.CoreV1().Pods(ns).Create(t.Context(), large(4_000_000), dry)
	if !apierrors.IsRequestEntityTooLargeError(err) || len(err.Error()) > 1000 {
		t.Errorf("4 MB: answered %.500v", err)
	}
}

// resourcesOf writes a container's CPU request and limit and its memory request and limit.
func resourcesOf(c corev1.Container) string {
	r := c.Resources
	return fmt.Sprint(r.Requests.Cpu(), " ", r.Limits.Cpu(), " ", r.Requests.Memory(), " ", r.Limits.Memory())
}

// What docs/annotations.md says of LimitRanges and ResourceQuotas.
func TestLimitRangeAndQuota(t *testing.T) {
	t.Parallel()
	list := func(kv ...string) corev1.ResourceList {
		l := corev1.ResourceList{}
		for n := 0; n < len(kv); n += 2 {
			l[corev1.ResourceName(kv[n])] = resource.MustParse(kv[n+1])
		}
		return l
	}
	pod := func() *corev1.Pod {
		pod := stack.Pod("", map[string]string{roleKey: "cart"})
		pod.GenerateName = "app-"
		pod.Spec.Containers[0].Resources = corev1.ResourceRequirements{
			Requests: list("cpu", "50m", "memory", "64Mi", "ephemeral-storage", "1Gi"), Limits: list("cpu", "100m", "memory", "64Mi", "ephemeral-storage", "1Gi"),
		}
		return pod
	}
	limit := func(item corev1.LimitRangeItem) *corev1.LimitRange {
		item.Type = corev1.LimitTypeContainer
		return &corev1.LimitRange{ObjectMeta: metav1.ObjectMeta{Name: "limits"}, Spec: corev1.LimitRangeSpec{Limits: []corev1.LimitRangeItem{item}}}
	}
	hard := func(kv ...string) *corev1.ResourceQuota {
		return &corev1.ResourceQuota{ObjectMeta: metav1.ObjectMeta{Name: "quota"}, Spec: corev1.ResourceQuotaSpec{Hard: list(kv...)}}
	}
	scoped := func(scope corev1.ResourceQuotaScope, kv ...string) *corev1.ResourceQuota {
		quota := hard(kv...)
		quota.Spec.Scopes = []corev1.ResourceQuotaScope{scope}
		return quota
	}
	for name, tc := range map[string]struct {
		limits *corev1.LimitRange
		quota  *corev1.ResourceQuota
		bare   bool              // the pod says nothing of resources, so that its class is BestEffort without the sidecar
		plain  bool              // it is not annotated
		says   map[string]string // what the pod says of its sidecar
		has    string            // its sidecar's requests and limits then
		want   string            // in the refusal; empty: the pod is made
	}{
		"defaults": {limits: limit(corev1.LimitRangeItem{Default: list("cpu", "1", "memory", "1Gi"), DefaultRequest: list("cpu", "500m", "memory", "512Mi")})},
		"defaults and no limit": {limits: limit(corev1.LimitRangeItem{Default: list("cpu", "1", "memory", "1Gi")}),
			says: map[string]string{"sidecar-cpu-limit": "0"}, has: "5m 1 16Mi 16Mi"},
		"max":           {limits: limit(corev1.LimitRangeItem{Max: list("cpu", "100m", "memory", "64Mi")})},
		"min":           {limits: limit(corev1.LimitRangeItem{Min: list("cpu", "5m", "memory", "16Mi")})},
		"min of cpu":    {limits: limit(corev1.LimitRangeItem{Min: list("cpu", "10m")}), want: "minimum cpu usage per Container is 10m, but request is 5m"},
		"min of memory": {limits: limit(corev1.LimitRangeItem{Min: list("memory", "32Mi")}), want: "minimum memory usage per Container is 32Mi, but request is 16Mi"},
		"min and said": {limits: limit(corev1.LimitRangeItem{Min: list("cpu", "50m", "memory", "64Mi")}),
			says: map[string]string{"sidecar-memory": "64Mi", "sidecar-cpu-request": "50m"}, has: "50m 100m 64Mi 64Mi"},
		"min of cpu and memory said": {limits: limit(corev1.LimitRangeItem{Min: list("cpu", "50m", "memory", "64Mi")}),
			says: map[string]string{"sidecar-memory": "64Mi"}, want: "minimum cpu usage per Container is 50m, but request is 5m"},
		"ratio and said": {limits: limit(corev1.LimitRangeItem{MaxLimitRequestRatio: list("cpu", "2")}),
			says: map[string]string{"sidecar-cpu-request": "60m", "sidecar-cpu-limit": "60m"}, has: "60m 60m 16Mi 16Mi"},
		"ratio":            {limits: limit(corev1.LimitRangeItem{MaxLimitRequestRatio: list("cpu", "10")}), want: "cpu max limit to request ratio per Container is 10, but provided ratio is 20"},
		"quota":            {quota: hard("requests.cpu", "55m", "limits.cpu", "200m", "requests.memory", "80Mi", "limits.memory", "80Mi", "pods", "1")},
		"quota of less":    {quota: hard("limits.memory", "79Mi"), want: "exceeded quota: quota, requested: limits.memory=80Mi"},
		"quota of storage": {quota: hard("requests.ephemeral-storage", "1Gi")},
		// A pod of class BestEffort is Burstable once it is injected.
		"besteffort quota not injected":    {bare: true, plain: true, quota: scoped(corev1.ResourceQuotaScopeBestEffort, "pods", "0"), want: "exceeded quota: quota, requested: pods=1"},
		"besteffort quota":                 {bare: true, quota: scoped(corev1.ResourceQuotaScopeBestEffort, "pods", "0")},
		"notbesteffort quota not injected": {bare: true, plain: true, quota: scoped(corev1.ResourceQuotaScopeNotBestEffort, "pods", "0", "limits.memory", "1Gi")},
		"notbesteffort pods":               {bare: true, quota: scoped(corev1.ResourceQuotaScopeNotBestEffort, "pods", "0"), want: "exceeded quota: quota, requested: pods=1"},
		"notbesteffort memory":             {bare: true, quota: scoped(corev1.ResourceQuotaScopeNotBestEffort, "limits.memory", "1Gi"), want: "must specify limits.memory for: app"},
		"notbesteffort memory said":        {quota: scoped(corev1.ResourceQuotaScopeNotBestEffort, "limits.memory", "80Mi")},
		"notbesteffort memory default":     {bare: true, quota: scoped(corev1.ResourceQuotaScopeNotBestEffort, "limits.memory", "80Mi"), limits: limit(corev1.LimitRangeItem{Default: list("memory", "64Mi")})},
		"notbesteffort memory too little":  {bare: true, quota: scoped(corev1.ResourceQuotaScopeNotBestEffort, "limits.memory", "79Mi"), limits: limit(corev1.LimitRangeItem{Default: list("memory", "64Mi")}), want: "exceeded quota: quota, requested: limits.memory=80Mi"},
		"default of storage":               {limits: limit(corev1.LimitRangeItem{DefaultRequest: list("ephemeral-storage", "10Mi"), Default: list("ephemeral-storage", "1Gi")})},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			ns := scratch(t, ".*")
			if tc.limits != nil {
				if _, err := credence.Client.CoreV1().LimitRanges(ns).Create(t.Context(), tc.limits, metav1.CreateOptions{}); err != nil {
					t.Fatal(err)
				}
			}
			if tc.quota != nil {
				if _, err := credence.Client.CoreV1().ResourceQuotas(ns).Create(t.Context(), tc.quota, metav1.CreateOptions{}); err != nil {
					t.Fatal(err)
				}
			}
			// Until the API server's watch, and the controller that counts, have caught up.
			await(t, func() error {
				if tc.quota == nil {
					return nil
				}
				q, err := credence.Client.CoreV1().ResourceQuotas(ns).Get(t.Context(), "quota", metav1.GetOptions{})
				if err == nil && len(q.Status.Hard) == 0 {
					err = fmt.Errorf("the quota of %s is not counted", ns)
				}
				return err
			})
			asked := pod()
			if tc.bare {
				asked.Spec.Containers[0].Resources = corev1.ResourceRequirements{}
			}
			if tc.plain {
				asked.Annotations = nil
			}
			for key, value := range tc.says {
				asked.Annotations["iam.amazonaws.com/"+key] = value
			}
			if tc.has == "" {
				tc.has = "5m 100m 16Mi 16Mi"
			}
			await(t, func() error {
				made, err := credence.Client.CoreV1().Pods(ns).Create(t.Context(), asked, metav1.CreateOptions{DryRun: []string{metav1.DryRunAll}})
				switch {
				case tc.want == "" && err == nil && tc.plain:
					if len(made.Spec.InitContainers) > 0 {
						return fmt.Errorf("it was injected: %v", made.Spec.InitContainers)
					}
				case tc.want == "" && err == nil:
					if got := resourcesOf(made.Spec.InitContainers[0]); got != tc.has {
						return fmt.Errorf("the sidecar has resources %s, want %s", got, tc.has)
					}
					return injected(made)
				case tc.want == "":
					return err
				case err == nil || !strings.Contains(err.Error(), tc.want):
					return fmt.Errorf("answered %w, want %s", err, tc.want)
				}
				return nil
			})
		})
	}
}
