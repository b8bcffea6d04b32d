package snapshot_test

import (
	"context"
	"errors"
	"strings"
	"testing"

	"github.com/credence-iam/credence/operator/snapshot"
)

func TestParseTarget(t *testing.T) {
	for text, want := range map[string]string{
		"cart-1": "Pod cart-1", "pod/cart-1": "Pod cart-1", "deploy/cart": "Deployment cart", "Deployments/cart": "Deployment cart",
		"sts/db": "StatefulSet db", "ds/agent": "DaemonSet agent", "cj/nightly": "CronJob nightly", "rs/cart-7d": "ReplicaSet cart-7d", "job/once": "Job once",
		"rollout/cart": "", "deployment/": "",
	} {
		kind, name, err := snapshot.ParseTarget(text)
		if want == "" && (err == nil || !strings.Contains(err.Error(), "CronJob, DaemonSet, Deployment")) {
			t.Errorf("%s: %v", text, err)
		}
		if want != "" && (err != nil || kind+" "+name != want) {
			t.Errorf("%s: %s %s, %v", text, kind, name, err)
		}
	}
}

func TestReadManifests(t *testing.T) {
	all, err := snapshot.ReadManifests(strings.NewReader(`
apiVersion: v1
kind: Namespace
metadata: {name: shop}
---
# nothing
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: cart, namespace: shop}
spec: {replicas: 3, template: {metadata: {annotations: {iam.amazonaws.com/role: cart}}, spec: {containers: [{name: app}]}}}
---
apiVersion: example.org/v1
kind: Other
---
{"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "bare"}, "spec": {"containers": [{"name": "app"}]}}
`))
	if err != nil || len(all) != 2 {
		t.Fatalf("%+v, %v", all, err)
	}
	if w := all[0].Workload; w == nil || all[0].Namespace != "shop" || w.Resource() != "deployment/cart" || w.Template.Annotations["iam.amazonaws.com/role"] != "cart" {
		t.Errorf("the first is %+v", all[0])
	}
	if p := all[1].Pod; p == nil || p.Name != "bare" || all[1].Namespace != "" {
		t.Errorf("the second is %+v", all[1])
	}
	for _, text := range []string{"a: b: c", "apiVersion: v1\nkind: Pod\nspec: {containers: 1}"} {
		if all, err := snapshot.ReadManifests(strings.NewReader(text)); err == nil {
			t.Errorf("%q: %+v", text, all)
		}
	}
}

func TestParseLog(t *testing.T) {
	lines := snapshot.ParseLog("of a line\"}\n" +
		`{"time":"2026-01-02T15:04:05Z","level":"INFO","msg":"Received credentials","role":"arn:aws:iam::123456789012:role/cart","access_key_id":"ASIA","expiration":"2026-01-02T16:04:05Z"}` + "\n" +
		"panic: text\n{}\n" +
		`{"time":"2026-01-02T15:05:05Z","level":"ERROR","msg":"Could not get credentials","reason":"STS_UNAVAILABLE","error":"text"}`)
	if len(lines) != 2 || lines[0].AccessKeyID != "ASIA" || lines[0].Expiration.Sub(lines[0].Time).Hours() != 1 || lines[1].Reason != "STS_UNAVAILABLE" || lines[1].Error != "text" {
		t.Errorf("%+v", lines)
	}
}

// TestProblemOf: a problem names the missing right.
func TestProblemOf(t *testing.T) {
	for text, want := range map[string]string{
		`pods "cart-1" is forbidden: User "jane" cannot get resource "pods/log" in API group "" in the namespace "shop"`:                                                                                                       "needs: get pods/log in namespace shop",
		`mutatingwebhookconfigurations.admissionregistration.k8s.io "credence" is forbidden: User "jane" cannot get resource "mutatingwebhookconfigurations" in API group "admissionregistration.k8s.io" at the cluster scope`: "needs: get mutatingwebhookconfigurations in the whole cluster",
		"connection refused": "connection refused",
	} {
		if got := snapshot.ProblemOf(errors.New(text)); string(got) != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
	if got := snapshot.ProblemOf(context.DeadlineExceeded); !strings.HasPrefix(string(got), "no response within 1.2s") {
		t.Errorf("%q", got)
	}
}
