package main

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"sync"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/broker/identity"
	"github.com/credence-iam/credence/broker/kube"
	"github.com/credence-iam/credence/broker/kube/apitest"
	"github.com/credence-iam/credence/broker/policy"
	"github.com/credence-iam/credence/cmd/internal/program/processtest"
	"github.com/credence-iam/credence/webhook/inject"
)

// The webhook, which reads a pod's JSON, and the broker, which reads the same pod from the API server, give equal grants,
// or refuse with the same reason in the same words. The broker reads it in two ways: by a watch, for prefetch, and for the
// bearer of a token.
func TestWebhookAndBrokerAgree(t *testing.T) {
	keys, err := policy.NewKeys(policy.DefaultPrefix)
	processtest.Must(t, err)
	base, err := credential.BaseOf("aws", "123456789012")
	processtest.Must(t, err)
	rules, err := policy.New(policy.Config{Keys: keys, Base: base, RoleChaining: true})
	processtest.Must(t, err)
	injector, err := inject.New(inject.Config{Keys: keys, Image: "image", Broker: "broker.credence.svc:9443", Settings: inject.DefaultSettings()})
	processtest.Must(t, err)
	api := apitest.Start(t)
	config, err := clientcmd.BuildConfigFromFlags("", api.Kubeconfig(t))
	processtest.Must(t, err)
	directory, err := kube.NewDirectory(config, keys, slog.New(slog.DiscardHandler))
	processtest.Must(t, err)
	ctx, cancel := context.WithCancel(t.Context())
	var running sync.WaitGroup
	running.Go(func() { _ = directory.Run(ctx) })
	t.Cleanup(func() { cancel(); running.Wait() })
	api.Put(
		&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{
			Name: "shop", Labels: map[string]string{keys.Name(policy.Inject): policy.Enabled},
			Annotations: map[string]string{keys.Name(policy.Permitted): ".*/(cart|shop)", keys.Name(policy.PermittedTags): "team"},
		}},
		&corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "till", UID: "s-1"}},
	)

	reasons := map[credential.Reason]bool{}
	for at, annotations := range []map[policy.Key]string{
		{policy.Role: "cart"},
		{policy.Role: " cart\n"},
		{policy.Role: "cart", policy.SessionScope: "service-account"},
		{policy.Role: "cart", policy.SessionScope: "pod"},
		{policy.Role: "cart", policy.SessionTags: "team=a", policy.SessionPolicy: `{ "Statement": [] }`, policy.ExternalID: "id", policy.Duration: "30m"},
		{policy.Role: "cart", policy.Region: "us-east-2", policy.SidecarPort: "9780"},
		{policy.Role: "till"},
		{policy.Role: ""},
		{policy.Region: "us-east-2"},
		{policy.Role: "cart", "durations": "1h"},
		{policy.Role: "cart", policy.Permitted: ".*"},
		{policy.Role: "cart", policy.Duration: "2h"},
		{policy.Role: "cart", policy.Duration: "long"},
		{policy.Role: "cart", policy.Region: "here"},
		{policy.Role: "cart", policy.IMDS: "v3"},
		{policy.Role: "cart", policy.SessionPolicy: "{"},
		{policy.Role: "cart", policy.SessionTags: "other=a"},
		{policy.Role: "cart", policy.SessionTags: "kubernetes-namespace=a"},
		{policy.Role: "cart", policy.SidecarMemory: "1Gi"},
		{policy.Role: "cart", policy.Containers: "a", policy.SkipContainers: "b"},
		{policy.Role: "no role"},
	} {
		pod := &corev1.Pod{TypeMeta: metav1.TypeMeta{Kind: "Pod", APIVersion: "v1"}}
		pod.Namespace, pod.Name, pod.UID = "shop", fmt.Sprint("pod-", at), types.UID(fmt.Sprint("u-", at))
		pod.Annotations = map[string]string{"example.com/other": "x"}
		for key, value := range annotations {
			pod.Annotations[keys.Name(key)] = value
		}
		pod.Spec.ServiceAccountName = "till"
		pod.Spec.Containers = []corev1.Container{{Name: "a"}}
		raw, err := json.Marshal(pod)
		processtest.Must(t, err)

		// The API server has the label and the annotation that the webhook adds, whether it refuses the pod or not: pods
		// that were admitted by another version may have any annotations.
		pod.Labels = map[string]string{keys.Name(policy.Injected): "true"}
		pod.Annotations[keys.Name(policy.ServiceAccount)] = "till"
		api.Put(pod)
		id := identity.Pod{Namespace: "shop", Name: pod.Name, UID: string(pod.UID), ServiceAccount: "till", ServiceAccountUID: "s-1"}
		bound, ns, err := directory.Bind(t.Context(), id)
		processtest.Must(t, err)
		watched, _, ok := directory.Pod("shop/" + pod.Name)
		if !ok {
			t.Fatalf("%v: the watch does not have the pod that Bind returned", annotations)
		}

		result, refusal := injector.Inject(raw, "shop")
		var want policy.Grant
		if refusal == nil {
			want, refusal = rules.Grant(result.Pod, ns)
		}
		reasons[credential.ReasonOf(refusal)] = true
		for door, live := range map[string]policy.Pod{"Bind": bound, "Pod": watched} {
			got, err := rules.Grant(live, ns)
			if got != want || fmt.Sprint(err) != fmt.Sprint(refusal) {
				t.Errorf("%v: the broker's %s leads to %s (%v), the webhook to %s (%v)", annotations, door, got, err, want, refusal)
			}
			key, keyErr := live.RoutingKey()
			wantKey, wantErr := result.Pod.RoutingKey()
			if key != wantKey || (keyErr == nil) != (wantErr == nil) {
				t.Errorf("%v: the routing key is %s (%v) by the broker's %s, and %s (%v) by the webhook", annotations, key, keyErr, door, wantKey, wantErr)
			}
		}
	}
	for _, reason := range []credential.Reason{"", credential.ReasonRoleMissing, credential.ReasonAnnotationInvalid, credential.ReasonAnnotationUnknown,
		credential.ReasonRoleInvalid, credential.ReasonRoleNotPermitted, credential.ReasonTagNotPermitted} {
		if !reasons[reason] {
			t.Errorf("no pod of this test has outcome %q", reason)
		}
	}
}
