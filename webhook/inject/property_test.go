package inject_test

import (
	"encoding/json"
	"fmt"
	"maps"
	"math/rand/v2"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	utiljson "k8s.io/apimachinery/pkg/util/json"
	psaapi "k8s.io/pod-security-admission/api"
	psapolicy "k8s.io/pod-security-admission/policy"

	"github.com/credence-iam/credence/broker/policy"
	"github.com/credence-iam/credence/webhook/inject"
)

// allowed matches the paths where injection may add something.
var allowed = regexp.MustCompile(`^(` +
	`/metadata/labels|/metadata/labels/iam\.amazonaws\.com~injected|/metadata/annotations/iam\.amazonaws\.com~(service-account|warnings)|` +
	`/metadata/annotations/sidecar\.example~ports|/spec/imagePullSecrets|/spec/imagePullSecrets/(ours|registry)|` +
	`/spec/volumes|/spec/volumes/credence-identity|` +
	`/spec/initContainers|/spec/initContainers/credence-sidecar|` +
	`/spec/(initC|c)ontainers/[^/]+/env|/spec/(initC|c)ontainers/[^/]+/env/AWS_[A-Z0-9_]+)$`)

// embedded returns an error if out lacks, changes or reorders something of in, or has something that injection may not add.
func embedded(path string, in, out any) error {
	switch in := in.(type) {
	case map[string]any:
		out, ok := out.(map[string]any)
		if !ok {
			return fmt.Errorf("%s is no longer an object", path)
		}
		for key, value := range in {
			if _, ok := out[key]; !ok {
				return fmt.Errorf("%s/%s was removed", path, key)
			}
			if err := embedded(path+"/"+segment(key), value, out[key]); err != nil {
				return err
			}
		}
		for key := range out {
			if _, ok := in[key]; !ok && !allowed.MatchString(path+"/"+segment(key)) {
				return fmt.Errorf("%s/%s was added", path, key)
			}
		}
		return nil
	case []any:
		out, ok := out.([]any)
		if !ok {
			return fmt.Errorf("%s is no longer an array", path)
		}
		next := 0
		for _, element := range out {
			name := fmt.Sprintf("%s/%s", path, nameOf(element))
			if next < len(in) && nameOf(in[next]) == nameOf(element) {
				if err := embedded(name, in[next], element); err != nil {
					return err
				}
				next++
			} else if !allowed.MatchString(name) {
				return fmt.Errorf("%s was added or moved", name)
			}
		}
		if next < len(in) {
			return fmt.Errorf("%s/%s was removed or moved", path, nameOf(in[next]))
		}
		return nil
	case nil:
		if out != nil && !allowed.MatchString(path) {
			return fmt.Errorf("%s is no longer null", path)
		}
		return nil
	default:
		if !reflect.DeepEqual(in, out) {
			return fmt.Errorf("%s changed from %v to %v", path, in, out)
		}
		return nil
	}
}

func segment(key string) string { return strings.ReplaceAll(key, "/", "~") }

func nameOf(element any) string {
	if object, ok := element.(map[string]any); ok {
		return fmt.Sprint(object["name"])
	}
	return fmt.Sprint(element)
}

// generator makes pods as users, controllers and other webhooks send them, with unknown fields at every level.
type generator struct{ *rand.Rand }

func (g generator) some(percent int) bool { return g.IntN(100) < percent }

// list sets key to an array of up to limit elements or to null, or does not set it.
func (g generator) list(into map[string]any, key string, limit int, element func(n int) any) {
	switch g.IntN(4) {
	case 0:
		return
	case 1:
		into[key] = nil
	case 2:
		into[key] = []any{}
	default:
		var list []any
		for n := range 1 + g.IntN(limit) {
			list = append(list, element(n))
		}
		into[key] = list
	}
}

func (g generator) unknown(into map[string]any) {
	if g.some(40) {
		into["fieldOfTomorrow"] = []any{json.Number("9007199254740993"), nil, map[string]any{"a/b~c": g.IntN(9)}}
	}
	if g.some(10) {
		into["Name"] = "differs by case"
	}
}

func (g generator) container(name string) map[string]any {
	c := map[string]any{"name": name, "image": "registry.example/" + name}
	g.unknown(c)
	names := []string{"A", "AWS_REGION", "AWS_PROFILE", "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", "AWS_EC2_METADATA_SERVICE_ENDPOINT", "AWS_ACCESS_KEY_ID"}
	g.list(c, "env", 3, func(n int) any {
		v := map[string]any{"name": names[g.IntN(len(names))] + []string{"", "_"}[g.IntN(2)] + []string{"", "X", "Y", "Z"}[n], "value": "v"}
		g.unknown(v)
		return v
	})
	if g.some(30) {
		resources := map[string]any{"limits": map[string]any{"cpu": "1", "memory": "1Gi"}}
		g.unknown(resources)
		c["resources"] = resources
	}
	if g.some(20) {
		port := map[string]any{"containerPort": 8080}
		g.unknown(port)
		c["ports"] = []any{port}
	}
	if g.some(20) {
		from := map[string]any{"fieldRef": map[string]any{"fieldPath": "metadata.name"}}
		g.unknown(from)
		env, _ := c["env"].([]any)
		c["env"] = append(env, map[string]any{"name": "FROM", "valueFrom": from})
	}
	if g.some(60) {
		user := map[string]any{}
		g.user(user)
		c["securityContext"] = user
	}
	g.list(c, "envFrom", 2, func(int) any {
		source := map[string]any{"configMapRef": map[string]any{"name": "settings"}}
		g.unknown(source)
		return source
	})
	if g.some(20) {
		probe := map[string]any{"exec": map[string]any{"command": []any{"true"}}}
		g.unknown(probe)
		c["startupProbe"] = probe
	}
	return c
}

// user sets runAsUser in the securityContext of a pod or a container, often to the same user.
func (g generator) user(context map[string]any) {
	g.unknown(context)
	if g.some(80) {
		context["runAsUser"] = []any{1000, 1000, 1000, 1000, 1000, 2000, 0, nil}[g.IntN(8)]
	}
}

func (g generator) pod() map[string]any {
	annotations := map[string]any{"iam.amazonaws.com/role": "reader", "other/key": "x"}
	if g.some(30) {
		annotations["iam.amazonaws.com/region"] = "eu-central-1"
	}
	if g.some(20) {
		annotations["iam.amazonaws.com/skip-containers"] = "c0"
	}
	for key, values := range map[string][]string{
		"sidecar-memory": {"12Mi", "64Mi"}, "sidecar-cpu-request": {"1m", "50m", "1"}, "sidecar-cpu-limit": {"0", "1"}, "sidecar-port": {"9779", "9790"},
		"sidecar-log-level": {"info", "debug"},
	} {
		if g.some(10) {
			annotations["iam.amazonaws.com/"+key] = values[g.IntN(len(values))]
		}
	}
	if g.some(10) {
		annotations["sidecar.example/ports"] = "of-the-pod"
	}
	metadata := map[string]any{"annotations": annotations}
	switch g.IntN(4) {
	case 0:
		metadata["labels"] = nil
	case 1:
		metadata["labels"] = map[string]any{}
	case 2:
		metadata["labels"] = map[string]any{"a.example/b": "c"}
	}
	g.unknown(metadata)
	spec := map[string]any{}
	g.unknown(spec)
	if g.some(60) {
		context := map[string]any{}
		g.user(context)
		spec["securityContext"] = context
	}
	g.list(spec, "initContainers", 3, func(n int) any { return g.container(fmt.Sprintf("i%d", n)) })
	g.list(spec, "volumes", 3, func(n int) any {
		v := map[string]any{"name": fmt.Sprintf("v%d", n), "emptyDir": map[string]any{}}
		g.unknown(v)
		return v
	})
	var containers []any
	for n := range 1 + g.IntN(3) {
		containers = append(containers, g.container(fmt.Sprintf("c%d", n)))
	}
	spec["containers"] = containers
	g.list(spec, "imagePullSecrets", 2, func(n int) any {
		secret := map[string]any{"name": []string{"registry", "theirs"}[n]}
		g.unknown(secret)
		return secret
	})
	if g.some(20) {
		spec["resources"] = map[string]any{"limits": map[string]any{"cpu": "1"}}
	}
	pod := map[string]any{"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}
	g.unknown(pod)
	return pod
}

// settings makes sidecar settings.
func (g generator) settings() inject.Settings {
	s := inject.DefaultSettings()
	s.ImagePullPolicy = []corev1.PullPolicy{"", corev1.PullAlways}[g.IntN(2)]
	s.ImagePullSecrets = [][]string{nil, {"registry"}, {"ours", "registry"}}[g.IntN(3)]
	s.Memory = []policy.Memory{policy.MinMemory, 64, policy.MaxMemory}[g.IntN(3)]
	s.CPU.Request = []policy.CPU{policy.MinCPU, 5, 50}[g.IntN(3)]
	s.CPU.Limit = []policy.CPU{0, 50, 100, policy.MaxCPU}[g.IntN(4)]
	s.CPU.Guaranteed = []policy.CPU{policy.MinCPULimit, 50, policy.MaxCPU}[g.IntN(3)]
	s.Port = []int{policy.MinPort, s.Port, policy.MaxPort}[g.IntN(3)]
	s.RunAsUser = []int64{1, s.RunAsUser, inject.PlatformUser}[g.IntN(3)]
	s.LogLevel = []policy.LogLevel{policy.LogDebug, policy.LogInfo, policy.LogError}[g.IntN(3)]
	if g.some(50) {
		s.PodAnnotations = map[string]string{"sidecar.example/ports": []string{"9443", ""}[g.IntN(2)]}
	}
	return s
}

// addContainers does the work of another webhook: it adds a first init container and a last container.
func addContainers(pod map[string]any) map[string]any {
	spec := pod["spec"].(map[string]any)
	initial, _ := spec["initContainers"].([]any)
	spec["initContainers"] = append([]any{map[string]any{"name": "mesh-init"}}, initial...)
	spec["containers"] = append(spec["containers"].([]any), map[string]any{"name": "mesh"})
	return pod
}

// TestProperties holds the guarantees of the package for generated pods.
func TestProperties(t *testing.T) {
	with := func(t *testing.T, i *inject.Injector, pod any) any {
		t.Helper()
		raw, err := json.Marshal(pod)
		if err != nil {
			t.Fatal(err)
		}
		result, err := i.Inject(raw, namespace)
		if err != nil {
			t.Fatalf("%v: %s", err, raw)
		}
		return decode(t, apply(t, raw, result.Patch))
	}
	for seed := range uint64(500) {
		t.Run(fmt.Sprintf("seed=%d", seed), func(t *testing.T) {
			g := generator{rand.New(rand.NewPCG(seed, 0))}
			in := g.pod()
			i := newInjector(t, func(c *inject.Config) { c.Settings = g.settings() })
			injected := func(t *testing.T, pod any) any { return with(t, i, pod) }
			raw, err := json.Marshal(in)
			if err != nil {
				t.Fatal(err)
			}
			before := decode(t, raw)
			once := injected(t, in)
			if err := embedded("", before, once); err != nil {
				t.Errorf("%v: %s", err, raw)
			}
			if first := at(once, "spec", "initContainers", 0, "name"); first != "credence-sidecar" {
				t.Errorf("first init container is %v, want the sidecar", first)
			}
			checkOwner(t, i, before, once)
			if twice := injected(t, once); !reflect.DeepEqual(once, twice) {
				t.Errorf("second injection changes the pod: %s", raw)
			}
			// If settings change between two calls, the sidecar stays, and later additions match it.
			changed := newInjector(t, func(c *inject.Config) { c.Settings, c.Image = g.settings(), "registry.example/credence-sidecar:v2" })
			between := addContainers(decode(t, encode(t, once)).(map[string]any))
			later := with(t, changed, between)
			if err := embedded("", decode(t, encode(t, between)), later); err != nil {
				t.Errorf("with changed settings: %v: %s", err, raw)
			}
			if !reflect.DeepEqual(named(t, later, "initContainers", "credence-sidecar"), named(t, once, "initContainers", "credence-sidecar")) {
				t.Errorf("changed settings change the sidecar: %s", raw)
			}
			if uri, listen := variable(named(t, later, "containers", "mesh"), "AWS_CONTAINER_CREDENTIALS_FULL_URI"), variable(named(t, once, "initContainers", "credence-sidecar"), "CREDENCE_LISTEN"); uri != fmt.Sprintf("http://%s/v1/credentials", listen) {
				t.Errorf("added container calls %s, but the sidecar listens on %s: %s", uri, listen, raw)
			}
			if again := with(t, changed, later); !reflect.DeepEqual(later, again) {
				t.Errorf("with changed settings, another injection changes the pod: %s", raw)
			}
			// The order of two webhooks matters only for the order of init containers.
			reinvoked := injected(t, addContainers(once.(map[string]any)))
			last := injected(t, addContainers(decode(t, raw).(map[string]any)))
			byName(reinvoked)
			byName(last)
			// Class and common user of the pod may depend on the order of the webhooks, so the test does not compare the
			// sidecar's resources and user.
			if !reflect.DeepEqual(reinvoked, last) {
				t.Errorf("called before and after another webhook: %v\ncalled only after it: %v", reinvoked, last)
			}
		})
	}
}

// checkOwner fails the test if injection changes the owner of projected tokens, unless the owner is root or the platform
// chooses the sidecar's user.
func checkOwner(t *testing.T, i *inject.Injector, before, after any) {
	t.Helper()
	var pods [2]corev1.Pod
	for n, pod := range []any{before, after} {
		if err := utiljson.Unmarshal(encode(t, pod), &pods[n]); err != nil {
			t.Fatal(err)
		}
	}
	owner, now := fsUserFrom(&pods[0]), fsUserFrom(&pods[1])
	if i.Settings().RunAsUser == inject.PlatformUser || owner == nil || *owner == 0 {
		return
	}
	if now == nil || *now != *owner {
		t.Errorf("owner of projected tokens changed from %d to %v: %s", *owner, now, encode(t, before))
	}
}

// fsUserFrom is the kubelet's FsUserFrom (pkg/volume/util, Kubernetes 1.37).
func fsUserFrom(pod *corev1.Pod) *int64 {
	var fsUser *int64
	for _, c := range slices.Concat(pod.Spec.InitContainers, pod.Spec.Containers) {
		var user *int64
		if pod.Spec.SecurityContext != nil {
			user = pod.Spec.SecurityContext.RunAsUser
		}
		if c.SecurityContext != nil && c.SecurityContext.RunAsUser != nil {
			user = c.SecurityContext.RunAsUser
		}
		if user == nil || fsUser != nil && *fsUser != *user {
			return nil
		}
		fsUser = user
	}
	return fsUser
}

func encode(t *testing.T, v any) []byte {
	t.Helper()
	raw, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

// named returns a container of a pod.
func named(t *testing.T, pod any, list, name string) any {
	t.Helper()
	containers := at(pod, "spec", list).([]any)
	n := slices.IndexFunc(containers, func(c any) bool { return nameOf(c) == name })
	if n < 0 {
		t.Fatalf("pod has no container %s: %v", name, pod)
	}
	return containers[n]
}

// variable returns the value of a variable of a container.
func variable(container any, name string) any {
	env := at(container, "env").([]any)
	n := slices.IndexFunc(env, func(v any) bool { return nameOf(v) == name })
	if n < 0 {
		return nil
	}
	return at(env[n], "value")
}

func at(v any, path ...any) any {
	for _, step := range path {
		switch step := step.(type) {
		case string:
			v = v.(map[string]any)[step]
		case int:
			v = v.([]any)[step]
		}
	}
	return v
}

// byName replaces the list of init containers by an object with their names, and removes the sidecar's resources and user.
func byName(pod any) {
	spec := at(pod, "spec").(map[string]any)
	byName := map[string]any{}
	for _, c := range spec["initContainers"].([]any) {
		c := c.(map[string]any)
		if c["name"] == "credence-sidecar" {
			delete(c, "resources")
			delete(at(c, "securityContext").(map[string]any), "runAsUser")
		}
		byName[c["name"].(string)] = c
	}
	spec["initContainers"] = byName
}

// restrict makes PodSecurity admit the pod at level "restricted", by fields of its containers or of the pod.
func (g generator) restrict(pod map[string]any) {
	spec := pod["spec"].(map[string]any)
	identity := map[string]any{"runAsNonRoot": true, "seccompProfile": map[string]any{"type": "RuntimeDefault"}}
	delete(spec, "securityContext")
	onPod := g.some(50)
	if onPod {
		spec["securityContext"] = identity
	}
	for _, key := range []string{"containers", "initContainers"} {
		list, _ := spec[key].([]any)
		for _, c := range list {
			context := map[string]any{"allowPrivilegeEscalation": false, "capabilities": map[string]any{"drop": []any{"ALL"}}}
			if !onPod {
				maps.Copy(context, identity)
			}
			if g.some(30) {
				context["runAsUser"] = 1000
			}
			c.(map[string]any)["securityContext"] = context
		}
	}
}

// TestRestricted: PodSecurity still admits a pod at level "restricted" after injection.
func TestRestricted(t *testing.T) {
	evaluator, err := psapolicy.NewEvaluator(psapolicy.DefaultChecks(), nil)
	if err != nil {
		t.Fatal(err)
	}
	refusals := func(t *testing.T, raw []byte) psapolicy.AggregateCheckResult {
		t.Helper()
		var pod corev1.Pod
		// Keys match by case, as in the API server and unlike in encoding/json.
		if err := utiljson.Unmarshal(raw, &pod); err != nil {
			t.Fatal(err)
		}
		return psapolicy.AggregateCheckResults(evaluator.EvaluatePod(
			psaapi.LevelVersion{Level: psaapi.LevelRestricted, Version: psaapi.LatestVersion()},
			&metav1.ObjectMeta{Annotations: pod.Annotations}, &pod.Spec))
	}
	evaluated := 0
	pods := map[string][]byte{}
	for _, file := range golden(t) {
		pods[file] = readYAML(t, file)
	}
	for seed := range uint64(300) {
		g := generator{rand.New(rand.NewPCG(seed, 0))}
		pod := g.pod()
		g.restrict(pod)
		raw, err := json.Marshal(pod)
		if err != nil {
			t.Fatal(err)
		}
		if got := refusals(t, raw); !got.Allowed {
			t.Fatalf("seed %d: generated pod is not restricted: %s", seed, got.ForbiddenDetail())
		}
		pods[fmt.Sprintf("seed %d", seed)] = raw
	}
	for file, raw := range pods {
		if !refusals(t, raw).Allowed {
			continue
		}
		g := generator{rand.New(rand.NewPCG(uint64(evaluated), 1))}
		result, err := newInjector(t, func(c *inject.Config) { c.Settings = g.settings() }).Inject(raw, namespace)
		if err != nil {
			t.Fatal(err)
		}
		if result.Patch == nil {
			continue
		}
		evaluated++
		if got := refusals(t, apply(t, raw, result.Patch)); !got.Allowed {
			t.Errorf("%s: %s", file, got.ForbiddenDetail())
		}
	}
	if evaluated <= 300 {
		t.Error("testdata has no restricted pod")
	}
}
