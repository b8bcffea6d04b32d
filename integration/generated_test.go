//go:build unix

package integration

import (
	"encoding/json"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"testing"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/credence-iam/credence/integration/stack"
)

// object is a JSON object.
type object = map[string]any

// generator makes random pods with most fields that a pod can have. The API server accepts nearly all of them.
type generator struct{ *rand.Rand }

func (g generator) some(percent int) bool { return g.IntN(100) < percent }

func one[T any](g generator, choices ...T) T { return choices[g.IntN(len(choices))] }

// put sets a field with a probability in percent.
func (g generator) put(into object, percent int, key string, value func() any) {
	if g.some(percent) {
		into[key] = value()
	}
}

func (g generator) resources() any {
	sizes := func(cpu, memory string) object { return object{"cpu": cpu, "memory": memory} }
	return one(g,
		object{"requests": sizes("100m", "64Mi")},
		object{"limits": sizes("1", "1Gi")},
		object{"requests": sizes("250m", "128Mi"), "limits": sizes("500m", "256Mi")},
		object{"requests": object{"ephemeral-storage": "1Gi"}, "limits": sizes("1", "1Gi")},
		object{})
}

func (g generator) env() any {
	from := func(kind string) any {
		return object{kind: one(g,
			object{"name": "settings", "key": "k"},
			object{"name": "settings", "key": "k", "optional": true})}
	}
	var all []any
	for n := range g.IntN(5) {
		name := fmt.Sprintf("V%d", n)
		all = append(all, one[any](g,
			object{"name": name},
			object{"name": name, "value": "$(V0) and $$(V0)"},
			object{"name": "AWS_REGION", "value": "eu-central-1"},
			object{"name": "AWS_EC2_METADATA_DISABLED", "value": "true"},
			object{"name": "AWS_CONTAINER_CREDENTIALS_FULL_URI", "value": "http://169.254.170.2/v2/credentials"},
			object{"name": "AWS_PROFILE", "value": "mine"},
			object{"name": name, "valueFrom": from("configMapKeyRef")},
			object{"name": name, "valueFrom": from("secretKeyRef")},
			object{"name": name, "valueFrom": object{"fieldRef": object{"fieldPath": one(g, "metadata.uid", "status.podIP", "metadata.labels['app']")}}},
			object{"name": name, "valueFrom": object{"resourceFieldRef": object{"resource": "limits.memory"}}}))
	}
	return all
}

func (g generator) container(name string, volumes []any, init bool) any {
	c := object{"name": name, "image": "registry.example/" + name + ":1"}
	if init {
		g.put(c, 30, "restartPolicy", func() any { return "Always" })
	} else {
		g.put(c, 20, "ports", func() any {
			return one(g, []any{object{"containerPort": 8080}},
				[]any{object{"containerPort": 9779, "protocol": "UDP"}, object{"containerPort": 53, "name": "dns", "hostPort": 5353, "protocol": "UDP"}})
		})
		g.put(c, 20, "lifecycle", func() any { return object{"preStop": object{"sleep": object{"seconds": 3}}} })
		g.put(c, 20, "readinessProbe", func() any { return object{"tcpSocket": object{"port": 8080}, "periodSeconds": 3} })
	}
	if !init || c["restartPolicy"] != nil {
		g.put(c, 20, "livenessProbe", func() any { return object{"httpGet": object{"path": "/", "port": 8080}} })
		g.put(c, 20, "startupProbe", func() any { return object{"exec": object{"command": []any{"true"}}, "failureThreshold": 30} })
	}
	g.put(c, 60, "resources", g.resources)
	g.put(c, 60, "env", g.env)
	g.put(c, 20, "envFrom", func() any {
		return []any{one(g, object{"prefix": "P_", "configMapRef": object{"name": "settings"}}, object{"secretRef": object{"name": "secret", "optional": true}})}
	})
	g.put(c, 20, "command", func() any { return []any{"sh", "-c", "echo $(V0)"} })
	g.put(c, 10, "args", func() any { return []any{} })
	g.put(c, 10, "workingDir", func() any { return "/tmp" })
	g.put(c, 10, "tty", func() any { return true })
	g.put(c, 10, "imagePullPolicy", func() any { return one(g, "Always", "Never") })
	g.put(c, 10, "terminationMessagePolicy", func() any { return "FallbackToLogsOnError" })
	g.put(c, 10, "resizePolicy", func() any { return []any{object{"resourceName": "cpu", "restartPolicy": "NotRequired"}} })
	g.put(c, 30, "securityContext", func() any {
		return one(g,
			object{"runAsUser": 0, "privileged": true},
			object{"runAsNonRoot": true, "runAsUser": 1000, "readOnlyRootFilesystem": true},
			object{"allowPrivilegeEscalation": false, "capabilities": object{"drop": []any{"ALL"}}, "seccompProfile": object{"type": "RuntimeDefault"}})
	})
	var mounts []any
	for _, v := range volumes {
		if g.some(50) {
			name := v.(object)["name"].(string)
			mount := object{"name": name, "mountPath": "/mnt/" + name}
			g.put(mount, 30, "readOnly", func() any { return true })
			g.put(mount, 30, "subPath", func() any { return "sub" })
			mounts = append(mounts, mount)
		}
	}
	if mounts != nil {
		c["volumeMounts"] = mounts
	}
	return c
}

func (g generator) volume(name string) any {
	return one(g,
		object{"name": name, "emptyDir": object{}},
		object{"name": name, "emptyDir": object{"medium": "Memory", "sizeLimit": "1Mi"}},
		object{"name": name, "configMap": object{"name": "settings", "items": []any{object{"key": "k", "path": "p"}}}},
		object{"name": name, "secret": object{"secretName": "secret", "defaultMode": 0o400}},
		object{"name": name, "hostPath": object{"path": "/var/log"}},
		object{"name": name, "persistentVolumeClaim": object{"claimName": "claim"}},
		object{"name": name, "csi": object{"driver": "csi.example.com"}},
		object{"name": name, "downwardAPI": object{"items": []any{object{"path": "labels", "fieldRef": object{"fieldPath": "metadata.labels"}}}}},
		object{"name": name, "projected": object{"sources": []any{
			object{"serviceAccountToken": object{"audience": "example.com", "path": "token", "expirationSeconds": 3600}},
			object{"configMap": object{"name": "settings"}},
		}}},
		object{"name": name, "ephemeral": object{"volumeClaimTemplate": object{"spec": object{
			"accessModes": []any{"ReadWriteOnce"}, "resources": object{"requests": object{"storage": "1Gi"}},
		}}}})
}

func (g generator) pod() object {
	metadata := object{"annotations": object{roleKey: "cart", "example.com/note": "x"}}
	if g.some(50) {
		metadata["name"] = "pod"
	} else {
		metadata["generateName"] = "pod-"
	}
	g.put(metadata["annotations"].(object), 20, "iam.amazonaws.com/region", func() any { return "eu-central-1" })
	g.put(metadata["annotations"].(object), 20, "iam.amazonaws.com/skip-containers", func() any { return "c1" })
	g.put(metadata["annotations"].(object), 20, "iam.amazonaws.com/start-timeout", func() any { return one(g, "0", "30s") })
	g.put(metadata, 50, "labels", func() any { return one[any](g, nil, object{}, object{"app": "a", "example.com/b": ""}) })
	spec := object{}
	var volumes, inits, containers []any
	for n := range g.IntN(4) {
		volumes = append(volumes, g.volume(fmt.Sprintf("v%d", n)))
	}
	for n := range g.IntN(3) {
		inits = append(inits, g.container(fmt.Sprintf("i%d", n), volumes, true))
	}
	for n := range 1 + g.IntN(3) {
		containers = append(containers, g.container(fmt.Sprintf("c%d", n), volumes, false))
	}
	spec["containers"] = containers
	if volumes != nil || g.some(20) {
		spec["volumes"] = volumes
	}
	if inits != nil || g.some(20) {
		spec["initContainers"] = inits
	}
	settings := map[string]func() any{
		"restartPolicy":                 func() any { return one(g, "Always", "OnFailure", "Never") },
		"terminationGracePeriodSeconds": func() any { return one(g, 0, 1, 90, 86400) },
		"activeDeadlineSeconds":         func() any { return 600 },
		"dnsPolicy":                     func() any { return one(g, "Default", "ClusterFirstWithHostNet") },
		"hostAliases":                   func() any { return []any{object{"ip": "10.0.0.1", "hostnames": []any{"a.example"}}} },
		"hostname":                      func() any { return "host" },
		"subdomain":                     func() any { return "sub" },
		"setHostnameAsFQDN":             func() any { return true },
		"hostPID":                       func() any { return true },
		"hostIPC":                       func() any { return true },
		"hostUsers":                     func() any { return false },
		"shareProcessNamespace":         func() any { return true },
		"automountServiceAccountToken":  func() any { return false },
		"enableServiceLinks":            func() any { return false },
		"os":                            func() any { return object{"name": "linux"} },
		"nodeSelector":                  func() any { return object{"kubernetes.io/os": "linux"} },
		"schedulingGates":               func() any { return []any{object{"name": "example.com/gate"}} },
		"readinessGates":                func() any { return []any{object{"conditionType": "example.com/ready"}} },
		"tolerations":                   func() any { return []any{object{"operator": "Exists"}} },
		"priorityClassName":             func() any { return "system-node-critical" },
		"resources": func() any {
			return one(g, object{"limits": object{"cpu": "4", "memory": "4Gi"}}, object{"requests": object{"cpu": "3", "memory": "3Gi"}})
		},
		"topologySpreadConstraints": func() any {
			return []any{object{"maxSkew": 1, "topologyKey": "kubernetes.io/hostname", "whenUnsatisfiable": "ScheduleAnyway", "labelSelector": object{}}}
		},
		"affinity": func() any {
			return object{"nodeAffinity": object{"requiredDuringSchedulingIgnoredDuringExecution": object{"nodeSelectorTerms": []any{
				object{"matchExpressions": []any{object{"key": "kubernetes.io/os", "operator": "In", "values": []any{"linux"}}}},
			}}}}
		},
		"securityContext": func() any {
			return one(g, object{"fsGroup": 2000, "supplementalGroups": []any{3000}}, object{"runAsNonRoot": true, "runAsUser": 1000},
				object{"sysctls": []any{object{"name": "net.ipv4.ip_unprivileged_port_start", "value": "0"}}})
		},
	}
	for _, key := range slices.Sorted(maps.Keys(settings)) { // so that a seed always makes the same pod
		g.put(spec, 12, key, settings[key])
	}
	if g.some(5) { // the resources of the pod leave no room for the sidecar
		whole := object{"cpu": "1", "memory": "1Gi"}
		spec["resources"], spec["initContainers"], spec["containers"] = object{"requests": whole, "limits": whole}, nil, containers[:1]
		containers[0].(object)["resources"] = one(g, object{"limits": whole}, object{"requests": whole}, object{"requests": whole, "limits": whole})
	}
	return object{"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}
}

// TestGeneratedPodsAreAccepted shows that the API server accepts each pod injected that it accepts without injection.
func TestGeneratedPodsAreAccepted(t *testing.T) {
	t.Parallel()
	injectedIn, plain := namespace(t, ".*"), namespaceWith(t, nil, nil)
	const seeds = 400
	accepted := 0
	for seed := range uint64(seeds) {
		raw, err := json.Marshal(generator{rand.New(rand.NewPCG(seed, 0))}.pod())
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
