//go:build unix

package integration

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/yaml"

	"github.com/credence-iam/credence/integration/await"
	"github.com/credence-iam/credence/integration/kubetest"
	"github.com/credence-iam/credence/integration/stack"
	"github.com/credence-iam/credence/integration/tools"
)

// tryRaw creates a pod in a dry run from its JSON text, which can have fields that our client does not know.
func tryRaw(t *testing.T, ns string, raw []byte, validation string) (*corev1.Pod, error) {
	t.Helper()
	var made corev1.Pod
	err := credence.Client.CoreV1().RESTClient().Post().Namespace(ns).Resource("pods").
		Param("dryRun", metav1.DryRunAll).Param("fieldValidation", validation).
		SetHeader("Content-Type", "application/json").Body(raw).Do(t.Context()).Into(&made)
	return &made, err
}

// TestGoldenPodsAreAccepted creates the pods of webhook/inject's golden tests in dry runs: the API server accepts them
// injected, and stores nothing.
func TestGoldenPodsAreAccepted(t *testing.T) {
	t.Parallel()
	ns := namespace(t, ".*")
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
			continue // it has the sidecar of another webhook
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
		made, err := tryRaw(t, ns, raw, metav1.FieldValidationIgnore)
		if err != nil {
			t.Errorf("%s: %v", filepath.Base(file), err)
		} else if has := sidecars(made) == 1; has != (pod.Metadata.Annotations[roleKey] != "") {
			t.Errorf("%s: it has a sidecar: %v", filepath.Base(file), has)
		}
	}
	if left, err := credence.Client.CoreV1().Pods(ns).List(t.Context(), metav1.ListOptions{}); err != nil || len(left.Items) > 0 {
		t.Errorf("dry runs stored %d pods (%v)", len(left.Items), err)
	}
}

// kubectl runs kubectl and returns its output.
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

// TestKubectl shows that the commands of users create injected pods, and that a repeated command changes nothing.
func TestKubectl(t *testing.T) {
	t.Parallel()
	if testing.Short() && !tools.Built(tools.Kubectl) {
		t.Skip("-short, and kubectl would have to be built first (go run ./integration/tools/install)")
	}
	ns := namespace(t, arn("cart"))
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

	// "kubectl describe" prints the refusal of a controller's pods.
	must(fmt.Sprintf(`apiVersion: apps/v1
kind: ReplicaSet
metadata: {name: greedy}
spec: {selector: {matchLabels: {app: greedy}}, template: {metadata: {labels: {app: greedy}, annotations: {%s: admin}}, spec: {containers: [{name: app, image: app}]}}}
`, roleKey), "apply", "-f", "-")
	await.Until(t, "kubectl describe prints the refusal", func() error {
		if out := must("", "describe", "replicaset", "greedy"); !strings.Contains(out, "does not permit role") {
			return fmt.Errorf("it prints:\n%s", out)
		}
		return nil
	})

	// The webhook does not change ephemeral containers, which are added later.
	must("", "debug", "run", "--image=debug:1", "--container=debugger", "--target=run", "--attach=false")
	pod := get("run")
	if len(pod.Spec.EphemeralContainers) != 1 || len(pod.Spec.EphemeralContainers[0].Env) != 0 {
		t.Errorf("kubectl debug: the pod has ephemeral containers %+v", pod.Spec.EphemeralContainers)
	}
	if err := injected(pod); err != nil {
		t.Errorf("after kubectl debug: %v", err)
	}
	// A copy of an injected pod keeps its sidecar and volume and gets no others.
	copied := []string{"debug", "run", "--copy-to=copy", "--image=debug:1", "--container=debugger", "--attach=false"}
	if strings.Contains(must("", "debug", "--help"), "--keep-labels") {
		copied = append(copied, "--keep-annotations", "--keep-labels", "--keep-init-containers=true")
	} // an older kubectl keeps the annotations and init containers, and no labels
	must("", copied...)
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

// TestLargePods shows that a pod of the maximum size that can be stored is injected. The API server accepts requests of
// 3 MB and stores half of that. The webhook refuses a larger pod with the reason, or the API server does.
func TestLargePods(t *testing.T) {
	t.Parallel()
	ns := namespace(t, ".*")
	large := func(bytes int) *corev1.Pod {
		pod := stack.Pod("", role("cart"))
		pod.GenerateName = "large-"
		// One long variable and many short ones.
		pod.Spec.Containers[0].Env = []corev1.EnvVar{{Name: "LONG", Value: strings.Repeat("x", bytes/3)}}
		for n := range bytes / 3 * 2 / 64 {
			pod.Spec.Containers[0].Env = append(pod.Spec.Containers[0].Env, corev1.EnvVar{Name: fmt.Sprintf("V_%06d", n), Value: strings.Repeat("y", 30)})
		}
		return pod
	}
	plain := large(3_000_000)
	plain.Annotations = nil
	if _, err := credence.Client.CoreV1().Pods(ns).Create(t.Context(), plain, metav1.CreateOptions{}); err == nil {
		t.Error("a pod of 3 MB without injection was stored: the webhook may refuse pods that can be stored")
	}
	pod, err := kubetest.Dry(t, credence.Client, ns, large(1_250_000))
	if err != nil {
		t.Fatalf("1.25 MB: %.500v", err)
	}
	if err := injected(pod); err != nil {
		t.Errorf("1.25 MB: %v", err)
	}
	_, err = kubetest.Dry(t, credence.Client, ns, large(2_500_000))
	if err == nil || !strings.Contains(err.Error(), "an API server accepts at most") || len(err.Error()) > 1000 {
		t.Errorf("2.5 MB: got %.500v", err)
	}
	_, err = kubetest.Dry(t, credence.Client, ns, large(4_000_000))
	if !apierrors.IsRequestEntityTooLargeError(err) || len(err.Error()) > 1000 {
		t.Errorf("4 MB: got %.500v", err)
	}
}

// resourcesOf returns a container's CPU request and limit, and its memory request and limit.
func resourcesOf(c corev1.Container) string {
	r := c.Resources
	return fmt.Sprint(r.Requests.Cpu(), " ", r.Limits.Cpu(), " ", r.Requests.Memory(), " ", r.Limits.Memory())
}

// TestLimitRangeAndQuota holds what docs/annotations.md says about LimitRanges and ResourceQuotas.
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
		pod := stack.Pod("", role("cart"))
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
		limits   *corev1.LimitRange
		quota    *corev1.ResourceQuota
		bare     bool              // the pod sets no resources: without the sidecar its class is BestEffort
		plain    bool              // the pod is not annotated
		settings map[string]string // the pod's annotations for its sidecar
		has      string            // the sidecar's requests and limits; empty: the defaults
		want     string            // part of the refusal; empty: the pod is created
	}{
		"defaults": {limits: limit(corev1.LimitRangeItem{Default: list("cpu", "1", "memory", "1Gi"), DefaultRequest: list("cpu", "500m", "memory", "512Mi")})},
		"defaults and no limit": {limits: limit(corev1.LimitRangeItem{Default: list("cpu", "1", "memory", "1Gi")}),
			settings: map[string]string{"sidecar-cpu-limit": "0"}, has: "5m 1 16Mi 16Mi"},
		"max":           {limits: limit(corev1.LimitRangeItem{Max: list("cpu", "100m", "memory", "64Mi")})},
		"min":           {limits: limit(corev1.LimitRangeItem{Min: list("cpu", "5m", "memory", "16Mi")})},
		"min of cpu":    {limits: limit(corev1.LimitRangeItem{Min: list("cpu", "10m")}), want: "minimum cpu usage per Container is 10m, but request is 5m"},
		"min of memory": {limits: limit(corev1.LimitRangeItem{Min: list("memory", "32Mi")}), want: "minimum memory usage per Container is 32Mi, but request is 16Mi"},
		"min and settings": {limits: limit(corev1.LimitRangeItem{Min: list("cpu", "50m", "memory", "64Mi")}),
			settings: map[string]string{"sidecar-memory": "64Mi", "sidecar-cpu-request": "50m"}, has: "50m 100m 64Mi 64Mi"},
		"min of cpu and memory settings": {limits: limit(corev1.LimitRangeItem{Min: list("cpu", "50m", "memory", "64Mi")}),
			settings: map[string]string{"sidecar-memory": "64Mi"}, want: "minimum cpu usage per Container is 50m, but request is 5m"},
		"ratio and settings": {limits: limit(corev1.LimitRangeItem{MaxLimitRequestRatio: list("cpu", "2")}),
			settings: map[string]string{"sidecar-cpu-request": "60m", "sidecar-cpu-limit": "60m"}, has: "60m 60m 16Mi 16Mi"},
		"ratio":            {limits: limit(corev1.LimitRangeItem{MaxLimitRequestRatio: list("cpu", "10")}), want: "cpu max limit to request ratio per Container is 10, but provided ratio is 20"},
		"quota":            {quota: hard("requests.cpu", "55m", "limits.cpu", "200m", "requests.memory", "80Mi", "limits.memory", "80Mi", "pods", "1")},
		"quota of less":    {quota: hard("limits.memory", "79Mi"), want: "exceeded quota: quota, requested: limits.memory=80Mi"},
		"quota of storage": {quota: hard("requests.ephemeral-storage", "1Gi")},
		// A BestEffort pod is Burstable after injection.
		"besteffort quota not injected":    {bare: true, plain: true, quota: scoped(corev1.ResourceQuotaScopeBestEffort, "pods", "0"), want: "exceeded quota: quota, requested: pods=1"},
		"besteffort quota":                 {bare: true, quota: scoped(corev1.ResourceQuotaScopeBestEffort, "pods", "0")},
		"notbesteffort quota not injected": {bare: true, plain: true, quota: scoped(corev1.ResourceQuotaScopeNotBestEffort, "pods", "0", "limits.memory", "1Gi")},
		"notbesteffort pods":               {bare: true, quota: scoped(corev1.ResourceQuotaScopeNotBestEffort, "pods", "0"), want: "exceeded quota: quota, requested: pods=1"},
		"notbesteffort memory":             {bare: true, quota: scoped(corev1.ResourceQuotaScopeNotBestEffort, "limits.memory", "1Gi"), want: "must specify limits.memory for: app"},
		"notbesteffort memory set":         {quota: scoped(corev1.ResourceQuotaScopeNotBestEffort, "limits.memory", "80Mi")},
		"notbesteffort memory default":     {bare: true, quota: scoped(corev1.ResourceQuotaScopeNotBestEffort, "limits.memory", "80Mi"), limits: limit(corev1.LimitRangeItem{Default: list("memory", "64Mi")})},
		"notbesteffort memory too little":  {bare: true, quota: scoped(corev1.ResourceQuotaScopeNotBestEffort, "limits.memory", "79Mi"), limits: limit(corev1.LimitRangeItem{Default: list("memory", "64Mi")}), want: "exceeded quota: quota, requested: limits.memory=80Mi"},
		"default of storage":               {limits: limit(corev1.LimitRangeItem{DefaultRequest: list("ephemeral-storage", "10Mi"), Default: list("ephemeral-storage", "1Gi")})},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			ns := namespace(t, ".*")
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
			await.Until(t, "the quota is in force", func() error {
				if tc.quota == nil {
					return nil
				}
				q, err := credence.Client.CoreV1().ResourceQuotas(ns).Get(t.Context(), "quota", metav1.GetOptions{})
				if err == nil && len(q.Status.Hard) == 0 {
					err = errors.New("it is not counted")
				}
				return err
			})
			requested := pod()
			if tc.bare {
				requested.Spec.Containers[0].Resources = corev1.ResourceRequirements{}
			}
			if tc.plain {
				requested.Annotations = nil
			}
			for key, value := range tc.settings {
				requested.Annotations["iam.amazonaws.com/"+key] = value
			}
			if tc.has == "" {
				tc.has = "5m 100m 16Mi 16Mi"
			}
			await.Until(t, "the pod gets its decision", func() error { // the API server watches LimitRanges
				made, err := kubetest.Dry(t, credence.Client, ns, requested)
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
					return fmt.Errorf("got %w, want %s", err, tc.want)
				}
				return nil
			})
		})
	}
}
