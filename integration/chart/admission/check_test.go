//go:build unix

package admission

import (
	"bytes"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"

	authorizationv1 "k8s.io/api/authorization/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"

	"github.com/credence-iam/credence/integration/await"
	"github.com/credence-iam/credence/integration/chart"
)

// check upgrades the release with hooks. Helm waits for the pod of the check, which has few rights, and fails with it.
// The test ends the pod as a kubelet does: integration/e2e runs the program in it.
func check(t *testing.T) {
	upgrade := func(phase corev1.PodPhase) error {
		ended := make(chan error, 1)
		go func() {
			_, err := chart.Install(t.Context(), config())
			ended <- err
		}()
		var pod corev1.Pod
		await.Until(t, "the check has a pod", func() error {
			list, err := client.CoreV1().Pods(chart.Namespace).List(t.Context(), metav1.ListOptions{LabelSelector: "app.kubernetes.io/component=check", FieldSelector: "status.phase=Pending"})
			if err != nil {
				return err
			}
			if len(list.Items) != 1 {
				return errors.New("it has none")
			}
			pod = list.Items[0]
			return nil
		})
		if account := pod.Spec.ServiceAccountName; account != "credence-check" {
			t.Errorf("the check runs as %s", account)
		}
		pod.Status.Phase = phase
		if _, err := client.CoreV1().Pods(chart.Namespace).UpdateStatus(t.Context(), &pod, metav1.UpdateOptions{}); err != nil {
			t.Fatal(err)
		}
		return <-ended
	}
	if err := upgrade(corev1.PodFailed); err == nil || !strings.Contains(err.Error(), "credence-check") {
		t.Errorf("with a failed check, Helm returns %v", err)
	}
	job, err := client.BatchV1().Jobs(chart.Namespace).Get(t.Context(), "credence-check", metav1.GetOptions{})
	if err != nil || job.Spec.TTLSecondsAfterFinished == nil || job.Spec.ActiveDeadlineSeconds == nil {
		t.Errorf("the failed Job is gone, or stays forever: %v", err)
	}
	if err := upgrade(corev1.PodSucceeded); err != nil {
		t.Error(err)
	}
	await.Until(t, "the succeeded Job is deleted", func() error {
		_, err := client.BatchV1().Jobs(chart.Namespace).Get(t.Context(), "credence-check", metav1.GetOptions{})
		if apierrors.IsNotFound(err) {
			return nil
		}
		return errors.Join(err, errors.New("it exists"))
	})
	for resource, want := range map[authorizationv1.ResourceAttributes]bool{
		{Verb: "create", Resource: "podtemplates"}:                          true,
		{Verb: "create", Resource: "pods"}:                                  false,
		{Verb: "create", Resource: "serviceaccounts", Subresource: "token"}: false,
		{Verb: "get", Resource: "secrets"}:                                  false,
		{Verb: "create", Group: "batch", Resource: "jobs"}:                  false,
		{Verb: "create", Group: "apps", Resource: "deployments"}:            false,
		{Verb: "list", Resource: "podtemplates"}:                            false,
	} {
		resource.Namespace = chart.Namespace
		review, err := client.AuthorizationV1().SubjectAccessReviews().Create(t.Context(), &authorizationv1.SubjectAccessReview{
			Spec: authorizationv1.SubjectAccessReviewSpec{ResourceAttributes: &resource, User: "system:serviceaccount:" + chart.Namespace + ":credence-check", Groups: []string{"system:serviceaccounts", "system:authenticated"}},
		}, metav1.CreateOptions{})
		if err != nil {
			t.Fatal(err)
		}
		if review.Status.Allowed != want {
			t.Errorf("the check may %s %s/%s %s: %v, want %v", resource.Verb, resource.Group, resource.Resource, resource.Subresource, !want, want)
		}
	}
}

// oldNodesAreNamed shows that the notes name nodes whose kubelets run no native sidecars, if the API server is so old that it
// may have such nodes. A proxy gives it that version.
func oldNodesAreNamed(t *testing.T) {
	for name, version := range map[string]string{"old-node": "v1.28.15-eks-1", "older-node": "v1.27.16+rke2r1", "good-node": "v1.29.0"} {
		machine := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name}, Status: corev1.NodeStatus{NodeInfo: corev1.NodeSystemInfo{KubeletVersion: version}}}
		if _, err := client.CoreV1().Nodes().Create(t.Context(), machine, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = client.CoreV1().Nodes().Delete(t.Context(), name, metav1.DeleteOptions{}) })
	}
	transport, err := rest.TransportFor(control.Config())
	if err != nil {
		t.Fatal(err)
	}
	target, err := url.Parse(control.Config().Host)
	if err != nil {
		t.Fatal(err)
	}
	proxied := "v1.31.9"
	proxy := httptest.NewServer(&httputil.ReverseProxy{
		Transport: transport,
		Rewrite:   func(r *httputil.ProxyRequest) { r.SetURL(target) },
		ModifyResponse: func(r *http.Response) error {
			if r.Request.URL.Path == "/version" {
				r.Body = io.NopCloser(bytes.NewReader([]byte(`{"major":"1","minor":"31","gitVersion":"` + proxied + `"}`)))
				r.ContentLength = -1
				r.Header.Del("Content-Length")
			}
			return nil
		},
	})
	defer proxy.Close()
	kubeconfig := filepath.Join(t.TempDir(), "kubeconfig")
	text := `{"apiVersion":"v1","kind":"Config","current-context":"c","contexts":[{"name":"c","context":{"cluster":"c"}}],"clusters":[{"name":"c","cluster":{"server":"` + proxy.URL + `"}}]}`
	if err := os.WriteFile(kubeconfig, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		version string
		set     []string
		named   bool
	}{{"v1.31.9", nil, true}, {"v1.32.0", nil, false}, {"v1.31.9", []string{"check.enabled=false"}, false}} {
		proxied = tt.version
		out, err := chart.Install(t.Context(), chart.Config{Kubeconfig: kubeconfig, Set: tt.set}, "--no-hooks")
		if err != nil {
			t.Fatal(err)
		}
		notes := string(out)
		if named := strings.Contains(notes, "the kubelets of 2 nodes are older than 1.29") && strings.Contains(notes, "old-node (v1.28.15-eks-1)") &&
			strings.Contains(notes, "older-node (v1.27.16+rke2r1)"); named != tt.named || strings.Contains(notes, "good-node") {
			t.Errorf("with Kubernetes %s and %q, the notes are\n%s", tt.version, tt.set, notes)
		}
	}
}
