//go:build unix

package main

import (
	"bytes"
	"context"
	"crypto/tls"
	stdjson "encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"runtime"
	"slices"
	"strings"
	"time"

	admissionv1 "k8s.io/api/admission/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/json"

	"github.com/credence-iam/credence/broker/policy"
	"github.com/credence-iam/credence/webhook"
	"github.com/credence-iam/credence/webhook/inject"
)

// reviewers is how many reviews are sent at a time, which keeps two processors busy.
const reviewers = 8

// permitting has an opted-in namespace of every name.
type permitting struct{}

// Namespace implements webhook.Namespaces.
func (permitting) Namespace(_ context.Context, name string) (policy.Namespace, error) {
	return optedIn(name), nil
}

// Latest implements webhook.Namespaces.
func (p permitting) Latest(ctx context.Context, name string) (policy.Namespace, error) {
	return p.Namespace(ctx, name)
}

func (w *world) newWebhook(t trust) *webhook.Server {
	rules := newRules()
	injector := must(inject.New(inject.Config{
		Keys: rules.Keys(), Image: "registry.example/credence-sidecar:v1", Broker: "credence-broker.credence.svc:9443",
		Settings: inject.DefaultSettings(),
	}))
	return must(webhook.New(webhook.Config{
		Injector: injector, Rules: rules, Namespaces: permitting{}, KeyPair: t.pair, DrainDelay: time.Nanosecond, Logger: discard,
	}))
}

// reviewOf is the admission review of a new pod with this many containers, each of a usual size.
func reviewOf(containers int) []byte {
	var pod strings.Builder
	pod.WriteString(`{"apiVersion":"v1","kind":"Pod","metadata":{"generateName":"bench-6d4cf56db6-","labels":{"app":"bench","pod-template-hash":"6d4cf56db6"},` +
		`"annotations":{"iam.amazonaws.com/role":"bench"},"ownerReferences":[{"apiVersion":"apps/v1","kind":"ReplicaSet","name":"bench-6d4cf56db6",` +
		`"uid":"00000005-0000-4000-8000-000000000000","controller":true,"blockOwnerDeletion":true}]},"spec":{"containers":[`)
	for i := range containers {
		if i > 0 {
			pod.WriteByte(',')
		}
		_, _ = fmt.Fprintf(&pod, `{"name":"c-%d","image":"registry.example/bench:v1","ports":[{"containerPort":%d,"protocol":"TCP"}],`+
			`"env":[{"name":"LOG_LEVEL","value":"info"},{"name":"POD_NAME","valueFrom":{"fieldRef":{"apiVersion":"v1","fieldPath":"metadata.name"}}}],`+
			`"resources":{"limits":{"cpu":"1","memory":"256Mi"},"requests":{"cpu":"100m","memory":"256Mi"}},`+
			`"volumeMounts":[{"name":"config","mountPath":"/etc/bench"}],"imagePullPolicy":"IfNotPresent"}`, i, 10_000+i)
	}
	pod.WriteString(`],"volumes":[{"name":"config","configMap":{"name":"bench","defaultMode":420}}],"restartPolicy":"Always","serviceAccountName":"default"},"status":{}}`)
	return []byte(`{"kind":"AdmissionReview","apiVersion":"admission.k8s.io/v1","request":{"uid":"00000006-0000-4000-8000-000000000000",` +
		`"kind":{"group":"","version":"v1","kind":"Pod"},"resource":{"group":"","version":"v1","resource":"pods"},` +
		`"requestKind":{"group":"","version":"v1","kind":"Pod"},"requestResource":{"group":"","version":"v1","resource":"pods"},` +
		`"namespace":"bench","operation":"CREATE","userInfo":{"username":"system:serviceaccount:kube-system:replicaset-controller",` +
		`"groups":["system:serviceaccounts","system:authenticated"]},"object":` + pod.String() + `,"oldObject":null,"dryRun":false,` +
		`"options":{"kind":"CreateOptions","apiVersion":"meta.k8s.io/v1"}}}`)
}

// microseconds makes a side of the time of one call.
func microseconds(once func() error) side { return timed(time.Microsecond, once) }

// allocations makes a side of the allocations of one call. Those of the rest of the process count too; the median of
// many calls leaves them out.
func allocations(once func() error) side {
	return repeated(func() float64 {
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		check(once())
		runtime.ReadMemStats(&after)
		return float64(after.Mallocs - before.Mallocs)
	})
}

func (w *world) reviews(containers int, measure func(once func() error) side) []measurement {
	server, body := w.newWebhook(w.newTrust()), reviewOf(containers)
	ours := func() error {
		request, err := http.NewRequestWithContext(w.ctx, http.MethodPost, "/mutate", bytes.NewReader(body))
		if err != nil {
			return err
		}
		request.Header.Set("Content-Type", "application/json")
		response := httptest.NewRecorder()
		server.ServeHTTP(response, request)
		if !bytes.Contains(response.Body.Bytes(), []byte(`"patchType":"JSONPatch"`)) {
			return fmt.Errorf("the webhook responds %d %s", response.Code, response.Body)
		}
		return nil
	}
	bare := func() error {
		var review admissionv1.AdmissionReview
		var pod corev1.Pod
		err := json.Unmarshal(body, &review)
		if err == nil {
			err = json.Unmarshal(review.Request.Object.Raw, &pod)
		}
		if err == nil {
			review.Request.Object.Raw, err = stdjson.Marshal(pod)
		}
		if err == nil {
			_, err = stdjson.Marshal(review)
		}
		return err
	}
	return w.paired(measure(ours), measure(bare))
}

func (w *world) reviewsOverTLS() []measurement {
	t := w.newTrust()
	server := w.newWebhook(t)
	listener, address := w.listen()
	go func() { _ = server.Run(w.ctx, listener) }()
	patch := bytes.Repeat([]byte("x"), 4<<10) // about the size of a patch
	bare := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body)
		w.Header().Set("Content-Type", "application/json")
		_, _ = w.Write(patch)
	}))
	w.Cleanup(bare.Close)
	bare.Client().Transport.(*http.Transport).MaxIdleConnsPerHost = reviewers //nolint:forcetypeassert // It is httptest's.
	transport := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: t.ca.Pool(), MinVersion: tls.VersionTLS13}, MaxIdleConnsPerHost: reviewers}
	w.Cleanup(transport.CloseIdleConnections)
	return w.paired(
		rate(w.reviewClients(&http.Client{Transport: transport}, "https://"+address)), rate(w.reviewClients(bare.Client(), bare.URL)),
	)
}

// reviewClients send reviews to a server, each over a connection of its own.
func (w *world) reviewClients(client *http.Client, url string) []func() error {
	body := reviewOf(1)
	return slices.Repeat([]func() error{func() error {
		request, err := http.NewRequestWithContext(w.ctx, http.MethodPost, url+"/mutate", bytes.NewReader(body))
		if err != nil {
			return err
		}
		request.Header.Set("Content-Type", "application/json")
		response, err := client.Do(request)
		if err != nil {
			return err
		}
		defer response.Body.Close()
		if _, err := io.Copy(io.Discard, response.Body); err != nil {
			return err
		}
		if response.StatusCode != http.StatusOK {
			return fmt.Errorf("the webhook responds %s", response.Status)
		}
		return nil
	}}, reviewers)
}
