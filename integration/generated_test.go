//go:build unix

package integration

import (
	"encoding/json"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/yaml"

	"github.com/credence-iam/credence/integration/stack"
)

// object is a JSON object.
type object = map[string]any

// parts are the parts of generated pods. Their file explains them.
type parts struct {
	Fields               map[string]map[string]map[string][]json.RawMessage
	Env, Volumes, NoRoom []json.RawMessage
}

// generator makes random pods. The API server accepts nearly all of them.
type generator struct {
	*rand.Rand
	parts parts
}

func (g generator) some(percent int) bool { return g.IntN(100) < percent }

// one returns one of the choices, with this name.
func (g generator) one(name string, choices []json.RawMessage) any {
	return json.RawMessage(strings.ReplaceAll(string(choices[g.IntN(len(choices))]), "NAME", name))
}

// put sets the fields of a kind of object, each with its probability.
func (g generator) put(into object, kind string) {
	fields := g.parts.Fields[kind]
	for _, key := range slices.Sorted(maps.Keys(fields)) { // so that a seed always makes the same pod
		for percent, choices := range fields[key] {
			if n, err := strconv.Atoi(percent); err != nil || len(choices) == 0 {
				panic("invalid field " + key)
			} else if g.some(n) {
				into[key] = g.one("", choices)
			}
		}
	}
}

func (g generator) container(name string, volumes []string, kind string) any {
	c := object{"name": name, "image": "registry.example/" + name + ":1"}
	g.put(c, kind)
	if kind == "application" || c["restartPolicy"] != nil {
		g.put(c, "lasting")
	}
	g.put(c, "container")
	if g.some(60) {
		var env []any
		for n := range g.IntN(5) {
			env = append(env, g.one(fmt.Sprintf("V%d", n), g.parts.Env))
		}
		c["env"] = env
	}
	var mounts []any
	for _, volume := range volumes {
		if g.some(50) {
			mount := object{"name": volume, "mountPath": "/mnt/" + volume}
			g.put(mount, "volumeMount")
			mounts = append(mounts, mount)
		}
	}
	if mounts != nil {
		c["volumeMounts"] = mounts
	}
	return c
}

func (g generator) pod() object {
	annotations := object{roleKey: "cart", "example.com/note": "x"}
	g.put(annotations, "annotations")
	metadata := object{"annotations": annotations}
	g.put(metadata, "metadata")
	if g.some(50) {
		metadata["name"] = "pod"
	} else {
		metadata["generateName"] = "pod-"
	}
	var names []string
	var volumes, inits, containers []any
	for n := range g.IntN(4) {
		names = append(names, fmt.Sprintf("v%d", n))
		volumes = append(volumes, g.one(names[n], g.parts.Volumes))
	}
	for n := range g.IntN(3) {
		inits = append(inits, g.container(fmt.Sprintf("i%d", n), names, "initContainer"))
	}
	for n := range 1 + g.IntN(3) {
		containers = append(containers, g.container(fmt.Sprintf("c%d", n), names, "application"))
	}
	spec := object{"containers": containers}
	if volumes != nil || g.some(20) { // null is valid too
		spec["volumes"] = volumes
	}
	if inits != nil || g.some(20) {
		spec["initContainers"] = inits
	}
	g.put(spec, "spec")
	if g.some(5) {
		spec["resources"], spec["initContainers"], spec["containers"] = g.parts.NoRoom[len(g.parts.NoRoom)-1], nil, containers[:1]
		containers[0].(object)["resources"] = g.one("", g.parts.NoRoom)
	}
	return object{"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}
}

// TestGeneratedPodsAreAccepted shows that the API server accepts each pod injected that it accepts without injection.
func TestGeneratedPodsAreAccepted(t *testing.T) {
	t.Parallel()
	text, err := os.ReadFile("testdata/pods.yaml")
	if err != nil {
		t.Fatal(err)
	}
	var all parts
	if err := yaml.UnmarshalStrict(text, &all); err != nil {
		t.Fatal(err)
	}
	injectedIn, plain := namespace(t, ".*"), namespaceWith(t, nil, nil)
	const seeds = 400
	accepted := 0
	for seed := range uint64(seeds) {
		raw, err := json.Marshal(generator{rand.New(rand.NewPCG(seed, 0)), all}.pod())
		if err != nil {
			t.Fatal(err)
		}
		if _, err := tryRaw(t, plain, raw, metav1.FieldValidationStrict); err != nil {
			t.Logf("seed %d is no valid pod: %v", seed, err)
			continue
		}
		accepted++
		made, err := tryRaw(t, injectedIn, raw, metav1.FieldValidationStrict)
		if err != nil {
			t.Errorf("seed %d: %v\n%s", seed, err, raw)
			continue
		}
		if made.Spec.InitContainers[0].Name != stack.SidecarName {
			t.Errorf("seed %d: the first init container is %s", seed, made.Spec.InitContainers[0].Name)
		}
	}
	if accepted < seeds/2 {
		t.Errorf("the API server accepts %d of %d generated pods: too few to show anything", accepted, seeds)
	}
}
