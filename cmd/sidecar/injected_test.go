package main

import (
	"encoding/json"
	"flag"
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"

	"github.com/credence-iam/credence/broker/policy"
	"github.com/credence-iam/credence/sidecar/contract"
	"github.com/credence-iam/credence/webhook/inject"
)

// TestInjectedSidecar: the sidecar accepts the command and the variables that the webhook injects, and the webhook sets
// each flag of the sidecar.
func TestInjectedSidecar(t *testing.T) {
	keys, err := policy.NewKeys(policy.DefaultPrefix)
	if err != nil {
		t.Fatal(err)
	}
	injector, err := inject.New(inject.Config{Keys: keys, Image: "registry.example/credence-sidecar:v1", Broker: "brokers.credence.svc:9443", Settings: inject.DefaultSettings()})
	if err != nil {
		t.Fatal(err)
	}
	if err := injector.UseDNS(inject.DNS{Domain: "cluster.local"}); err != nil {
		t.Fatal(err)
	}
	// The webhook sets these variables only if the pod needs them.
	result, err := injector.Inject([]byte(`{"metadata":{"annotations":{"iam.amazonaws.com/role":"reader","iam.amazonaws.com/session-scope":"pod",`+
		`"iam.amazonaws.com/sidecar-log-level":"debug","iam.amazonaws.com/imds":"v1"}},"spec":{"containers":[{"name":"app"}]}}`), "shop")
	if err != nil {
		t.Fatal(err)
	}
	at := slices.IndexFunc(result.Patch, func(op inject.Operation) bool { return op.Path == "/spec/initContainers" })
	if at < 0 {
		t.Fatal("patch has no init containers")
	}
	text, err := json.Marshal(result.Patch[at].Value)
	if err != nil {
		t.Fatal(err)
	}
	var containers []corev1.Container
	if err := json.Unmarshal(text, &containers); err != nil {
		t.Fatal(err)
	}
	sidecar := containers[0]

	set := map[string]string{}
	for _, v := range sidecar.Env {
		if v.ValueFrom != nil {
			v.Value = "of-the-pod"
		}
		set[v.Name] = v.Value
		t.Setenv(v.Name, v.Value)
	}
	f := flag.NewFlagSet("credence-sidecar", flag.ContinueOnError)
	finish := flags(f)
	if err := f.Parse(nil); err != nil {
		t.Fatal(err)
	}
	if _, err := finish(sidecar.Command[1:]); err != nil {
		t.Errorf("sidecar refuses its command: %v", err)
	}
	probe := sidecar.StartupProbe.Exec.Command
	if o, err := finish(probe[1:]); err != nil || !o.probe {
		t.Errorf("sidecar does not run %q as probe: %v", probe, err)
	}
	f.VisitAll(func(f *flag.Flag) {
		name := contract.Env(f.Name)
		value, injected := set[name]
		delete(set, name)
		if !injected {
			t.Errorf("webhook does not set %s for --%s", name, f.Name)
		}
		if got := f.Value.String(); injected && !strings.EqualFold(got, value) { // A level prints in capitals.
			t.Errorf("--%s is %q, but %s is %q", f.Name, got, name, value)
		}
	})
	for name := range set {
		t.Errorf("webhook sets %s, for which the sidecar has no flag", name)
	}
}
