package policy_test

import (
	"testing"

	"github.com/credence-iam/credence/broker/policy"
)

func routingKey(t *testing.T, pod policy.Pod) policy.RoutingKey {
	t.Helper()
	key, err := pod.RoutingKey()
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// Pods that share a session have the same owners. A setting that does not affect the session does not affect its owners.
func TestRoutingKey(t *testing.T) {
	type change func(pod *policy.Pod, pairs map[policy.Key]string)
	with := func(key policy.Key, value string) change {
		return func(_ *policy.Pod, pairs map[policy.Key]string) { pairs[key] = value }
	}
	elsewhere := func(p *policy.Pod, _ map[policy.Key]string) { p.Namespace = "other" }
	account := func(p *policy.Pod, _ map[policy.Key]string) { p.ServiceAccount = "other" }
	recreated := func(p *policy.Pod, _ map[policy.Key]string) { p.Name, p.UID = "cart-2", "uid-2" }
	for _, tt := range []struct {
		name   string
		common []change
		change change
		same   bool
	}{
		{"another pod", nil, recreated, true},
		{"another namespace", nil, elsewhere, true},
		{"another service account", nil, account, true},
		{"its region", nil, with(policy.Region, "eu-west-1"), true},
		{"its metadata", nil, with(policy.IMDS, "off"), true},
		{"its start timeout", nil, with(policy.StartTimeout, "5s"), true},
		{"its sidecar's memory", nil, with(policy.SidecarMemory, "64Mi"), true},
		{"its sidecar's CPU", nil, with(policy.SidecarCPURequest, "50m"), true},
		{"its sidecar's limit", nil, with(policy.SidecarCPULimit, "0"), true},
		{"its sidecar's port", nil, with(policy.SidecarPort, "9780"), true},
		{"its sidecar's log", nil, with(policy.SidecarLogLevel, "debug"), true},
		{"blanks", nil, with(policy.Role, " reader\n"), true},
		{"the default, set", nil, with(policy.Duration, "60m"), true},
		{"another role", nil, with(policy.Role, "writer"), false},
		{"session name", nil, with(policy.SessionName, "mine"), false},
		{"external id", nil, with(policy.ExternalID, "mine"), false},
		{"tags", nil, with(policy.SessionTags, "a=b"), false},
		{"policy", nil, with(policy.SessionPolicy, `{"Statement":[]}`), false},
		{"policies", nil, with(policy.PolicyARNs, "arn:aws:iam::aws:policy/ReadOnlyAccess"), false},
		{"duration", nil, with(policy.Duration, "2h"), false},
		{"scope", nil, with(policy.SessionScope, "pod"), false},
		{"order of tags", []change{with(policy.SessionTags, "a=1,b=2")}, with(policy.SessionTags, "b=2, a=1"), true},
		{"default role, another namespace", []change{with(policy.Role, "")}, elsewhere, false},
		{"default role, another pod", []change{with(policy.Role, "")}, recreated, true},
		{"scope service-account, another pod", []change{with(policy.SessionScope, "service-account")}, recreated, true},
		{"scope service-account, another one", []change{with(policy.SessionScope, "service-account")}, account, false},
		{"scope service-account, another namespace", []change{with(policy.SessionScope, "service-account")}, elsewhere, false},
		{"scope pod, another pod", []change{with(policy.SessionScope, "pod")}, recreated, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			made := func(changes ...change) policy.RoutingKey {
				pairs := map[policy.Key]string{policy.Role: "reader"}
				pod := cart(nil)
				for _, change := range changes {
					change(&pod, pairs)
				}
				pod.Request = request(pairs)
				return routingKey(t, pod)
			}
			one, other := made(tt.common...), made(append(tt.common, tt.change)...)
			if (one == other) != tt.same {
				t.Errorf("the keys are %s and %s", one, other)
			}
		})
	}
}

// The webhook writes the key that the broker computes for the live pod, except for the UID, which the sidecar adds.
func TestRoutingKeyOfWebhookAndBroker(t *testing.T) {
	for _, scope := range []policy.Scope{policy.ScopeRole, policy.ScopeServiceAccount, policy.ScopePod} {
		pod := cart(map[policy.Key]string{policy.Role: "reader", policy.SessionScope: string(scope)})
		settings, err := pod.Request.Settings()
		if err != nil {
			t.Fatal(err)
		}
		written := settings.RoutingKey(pod.Namespace, pod.ServiceAccount)
		if scope == policy.ScopePod {
			written = written.ForPod(pod.UID)
		}
		if got := routingKey(t, pod); got != written {
			t.Errorf("scope %s: the key of the live pod is %s, the webhook writes %s", scope, got, written)
		}
	}
}

// The key is the same in each version. Another form would move every session to other brokers once.
func TestRoutingKeyIsTheSameInEveryVersion(t *testing.T) {
	pod := policy.Pod{Namespace: "shop", Name: "cart-1", UID: "uid-1", ServiceAccount: "cart", Request: request(map[policy.Key]string{
		policy.Role: "reader", policy.SessionTags: "b=2,a=1", policy.SessionScope: "pod", policy.Duration: "2h", policy.ExternalID: "id",
	})}
	if key := routingKey(t, pod); key != "c468d105de043456c8b7a90c7e6a02fb/uid-1" {
		t.Errorf("the key is %s", key)
	}
}

func TestRoutingKeyOfInvalidAnnotations(t *testing.T) {
	pod := cart(map[policy.Key]string{policy.Role: "reader", policy.Duration: "long"})
	if key, err := pod.RoutingKey(); err == nil || key != "" {
		t.Errorf("RoutingKey = %q, %v", key, err)
	}
}
