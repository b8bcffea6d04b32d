package snapshot_test

import (
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/credence-iam/credence/broker/kube/apitest"
	"github.com/credence-iam/credence/operator/installation"
	"github.com/credence-iam/credence/operator/snapshot"
)

// TestGather: a snapshot has what its user may read, and the missing right of all else.
func TestGather(t *testing.T) {
	server := apitest.Start(t)
	pod := func(namespace, name string, labels map[string]string) *corev1.Pod {
		return &corev1.Pod{
			ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name, Labels: labels, Annotations: map[string]string{"iam.amazonaws.com/role": "cart"}},
			Spec: corev1.PodSpec{
				InitContainers: []corev1.Container{{Name: "credence-sidecar", Env: []corev1.EnvVar{{Name: "CREDENCE_ROUTING_KEY", Value: "k"}}}},
				Containers: []corev1.Container{{Name: "app", EnvFrom: []corev1.EnvFromSource{
					{ConfigMapRef: &corev1.ConfigMapEnvSource{LocalObjectReference: corev1.LocalObjectReference{Name: "settings"}}}}}},
			},
			Status: corev1.PodStatus{Phase: corev1.PodPending, PodIP: "10.0.0.1"},
		}
	}
	app := pod("shop", "cart-1", nil)
	server.Put(
		&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "shop"}}, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "credence"}}, app,
		pod("credence", "credence-broker-1", map[string]string{"app.kubernetes.io/name": "credence", "app.kubernetes.io/component": "broker"}),
		pod("credence", "credence-webhook-1", map[string]string{"app.kubernetes.io/name": "credence", "app.kubernetes.io/component": "webhook"}),
		&corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "credence-trust"}},
		&corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "settings"}},
	)
	config, err := clientcmd.BuildConfigFromFlags("", server.Kubeconfig(t))
	if err != nil {
		t.Fatal(err)
	}
	config.QPS = -1
	client, err := installation.NewClient(config)
	if err != nil {
		t.Fatal(err)
	}
	gather := func(name string) (*snapshot.Snapshot, error) {
		return snapshot.Gather(t.Context(), client, &installation.Installation{Namespace: "credence"}, snapshot.Request{Namespace: "shop", Kind: "Pod", Name: name})
	}

	s, err := gather("cart-1")
	if err != nil {
		t.Fatal(err)
	}
	if s.Pod == nil || s.Pod.UID != app.UID || s.Namespace == nil || s.BrokersNamespace == nil || s.Trust == nil || s.TrustGone || s.Variables["settings"] == nil || s.Workload != nil {
		t.Errorf("snapshot is %+v", s)
	}
	if i := s.Installation; len(i.Brokers) != 1 || i.Brokers[0].Pod.Name != "credence-broker-1" || len(i.WebhookPods) != 1 || !i.ConfigurationGone || len(i.MissingRights) != 4 {
		t.Errorf("installation is %+v", i)
	}
	if got := time.Until(s.Now).Abs(); got > time.Hour {
		t.Errorf("the API server's clock differs by %s", got)
	}
	for name, owner := range map[string]metav1.OwnerReference{"flag": {Kind: "pods", Name: "--all"}, "kind": {Kind: "--all", Name: "x"}, "plausible": {Kind: "Rollout", Name: "cart"}} {
		owner.Controller, owner.APIVersion, owner.UID = new(true), "example.com/v1", "1"
		p := pod("shop", name, nil)
		p.OwnerReferences = []metav1.OwnerReference{owner}
		server.Put(p)
		if s, err := gather(name); err != nil || (s.Workload != nil) != (name == "plausible") {
			t.Errorf("the owner of %s is %+v: %v", name, s.Workload, err)
		}
	}
	if _, err := gather("absent"); err == nil || !strings.Contains(err.Error(), "name the controller, such as deployment/absent") {
		t.Errorf("an absent pod: %v", err)
	}

	// A user who may read the pod only.
	server.Intercept(func(r apitest.Request) *metav1.Status {
		if r.Resource == "pods" && r.Namespace == "shop" {
			return nil
		}
		return apitest.Failure(http.StatusForbidden, metav1.StatusReasonForbidden, fmt.Sprintf(
			`%s is forbidden: User "jane" cannot get resource "%s" in API group "" in the namespace "%s"`, r.Resource, r.Resource, r.Namespace))
	})
	if s, err = gather("cart-1"); err != nil {
		t.Fatal(err)
	}
	for source, want := range map[string]string{
		snapshot.SourceNamespace: "needs: get namespaces in the whole cluster", snapshot.SourceTrust: "needs: get configmaps in namespace shop",
		snapshot.SourceEnvironment: "needs: get configmaps in namespace shop", snapshot.SourceBrokers: "needs: get pods in namespace credence",
		snapshot.SourceRBAC: "needs: get ",
	} {
		if got := s.Problems[source]; !strings.HasPrefix(string(got), want) {
			t.Errorf("problem of %s is %q, want %q", source, got, want)
		}
	}
	if s.Pod == nil || s.Namespace != nil || s.TrustGone || s.Trust != nil || s.Installation.Brokers != nil {
		t.Errorf("snapshot is %+v", s)
	}
}
