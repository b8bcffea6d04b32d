package apitest_test

import (
	"errors"
	"net/http"
	"syscall"
	"testing"
	"testing/synctest"

	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/watch"
	applycorev1 "k8s.io/client-go/applyconfigurations/core/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/credence-iam/credence/broker/kube/apitest"
)

func start(t *testing.T) (*apitest.Server, kubernetes.Interface) {
	t.Helper()
	s := apitest.Start(t)
	config, err := clientcmd.BuildConfigFromFlags("", s.Kubeconfig(t))
	if err != nil {
		t.Fatal(err)
	}
	client, err := kubernetes.NewForConfig(config)
	if err != nil {
		t.Fatal(err)
	}
	return s, client
}

func pod(name, team string) *corev1.Pod {
	return &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: name, Labels: map[string]string{"team": team}}, Spec: corev1.PodSpec{ServiceAccountName: "default"}}
}

// TestWatch: a watch sends the changes since the list that its selectors match.
func TestWatch(t *testing.T) {
	s, client := start(t)
	s.Put(pod("a", "red"), pod("b", "blue"))
	red := metav1.ListOptions{LabelSelector: "team=red", FieldSelector: "status.phase!=Failed"}
	list, err := client.CoreV1().Pods("shop").List(t.Context(), red)
	if err != nil || len(list.Items) != 1 || list.Items[0].Name != "a" || list.Items[0].UID == "" {
		t.Fatalf("listed %v, %v", list.Items, err)
	}
	s.Put(pod("c", "red"), pod("d", "blue"))
	red.ResourceVersion = list.ResourceVersion
	events, err := client.CoreV1().Pods("shop").Watch(t.Context(), red)
	if err != nil {
		t.Fatal(err)
	}
	defer events.Stop()
	failed := pod("c", "red")
	failed.Status.Phase = corev1.PodFailed
	s.Put(pod("b", "red"), failed)
	s.Delete(pod("a", ""))
	for _, want := range []struct {
		kind watch.EventType
		name string
	}{{watch.Added, "c"}, {watch.Added, "b"}, {watch.Deleted, "c"}, {watch.Deleted, "a"}} {
		e := <-events.ResultChan()
		if got, ok := e.Object.(*corev1.Pod); !ok || e.Type != want.kind || got.Name != want.name {
			t.Errorf("the watch sent %s %v, want %s %s", e.Type, e.Object, want.kind, want.name)
		}
	}
	if n := s.Requests("GET", "pods", "shop"); n != 2 {
		t.Errorf("%d requests were counted, want 2", n)
	}
}

// TestWrites: the server refuses to create an existing object and to update an old version, and merges an applied object.
func TestWrites(t *testing.T) {
	s, client := start(t)
	maps := client.CoreV1().ConfigMaps("shop")
	m, err := maps.Create(t.Context(), &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: "m"}, Data: map[string]string{"a": "1"}}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := maps.Create(t.Context(), m, metav1.CreateOptions{}); !apierrors.IsAlreadyExists(err) {
		t.Errorf("creating it again: %v", err)
	}
	applied := applycorev1.ConfigMap("m", "shop").WithData(map[string]string{"b": "2"})
	if _, err := maps.Apply(t.Context(), applied, metav1.ApplyOptions{FieldManager: "test"}); err != nil {
		t.Fatal(err)
	}
	if _, err := maps.Update(t.Context(), m, metav1.UpdateOptions{}); !apierrors.IsConflict(err) {
		t.Errorf("updating an old version: %v", err)
	}
	if !s.Load(m) || len(m.Data) != 2 {
		t.Errorf("the data are %v, want 2 keys", m.Data)
	}
	if err := maps.Delete(t.Context(), "m", metav1.DeleteOptions{}); err != nil {
		t.Error(err)
	}
	if _, err := maps.Get(t.Context(), "m", metav1.GetOptions{}); !apierrors.IsNotFound(err) {
		t.Errorf("getting a deleted ConfigMap: %v", err)
	}
}

// TestInMemory: a client in a synctest bubble reaches the server, unless the server is down or a test refuses the request.
func TestInMemory(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := apitest.Start(t)
		s.Put(pod("a", "red"))
		client, err := kubernetes.NewForConfig(s.Config())
		if err != nil {
			t.Fatal(err)
		}
		get := func() error {
			_, err := client.CoreV1().Pods("shop").Get(t.Context(), "a", metav1.GetOptions{})
			return err
		}
		if err := get(); err != nil {
			t.Error(err)
		}
		s.Intercept(func(r apitest.Request) *metav1.Status {
			if r != (apitest.Request{Method: "GET", Resource: "pods", Namespace: "shop", Name: "a"}) {
				t.Errorf("Intercept receives %+v", r)
			}
			return apitest.Failure(http.StatusForbidden, metav1.StatusReasonForbidden, "no")
		})
		if err := get(); !apierrors.IsForbidden(err) {
			t.Errorf("a request that Intercept refuses: error %v", err)
		}
		s.Intercept(nil)
		s.SetDown(true)
		if err := get(); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("while the server is down: error %v", err)
		}
		s.SetDown(false)
		if err := get(); err != nil {
			t.Error(err)
		}
	})
}

// TestReview: the server accepts a token for its audience while its pod exists.
func TestReview(t *testing.T) {
	s, client := start(t)
	p := pod("a", "red")
	s.Put(&corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "default"}}, p)
	token := s.Token(t, p, apitest.Token{})
	authenticated := func(token, audience string) bool {
		review, err := client.AuthenticationV1().TokenReviews().Create(t.Context(), &authenticationv1.TokenReview{
			Spec: authenticationv1.TokenReviewSpec{Token: token, Audiences: []string{audience}},
		}, metav1.CreateOptions{})
		if err != nil {
			t.Fatal(err)
		}
		return review.Status.Authenticated
	}
	if !authenticated(token, "credence-broker") || authenticated(token, "another") || authenticated(token+"x", "credence-broker") {
		t.Error("a review has the wrong result")
	}
	s.Delete(p)
	if authenticated(token, "credence-broker") {
		t.Error("the token of a deleted pod is accepted")
	}
}
