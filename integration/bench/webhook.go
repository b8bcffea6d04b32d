//go:build unix

package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	stdjson "encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	admissionv1 "k8s.io/api/admission/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/json"

	"github.com/credence-iam/credence/broker/policy"
	"github.com/credence-iam/credence/certs"
	"github.com/credence-iam/credence/integration/bench/report"
	"github.com/credence-iam/credence/webhook"
	"github.com/credence-iam/credence/webhook/inject"
)

// webhookMetrics are what each annotated pod costs when it is created.
var webhookMetrics = []metric{{
	Metric: report.Metric{Name: "webhook_review_small_p50", Unit: "us", Goal: &reviewGoal},
	about: "Median time of one admission review of a pod with one container, injected, judged and answered, without network; beside\n" +
		"\tit, decoding the same review, with the pod in it as the type that it is, and encoding both again: what a webhook does\n" +
		"\tthat changes nothing, and loses fields that are newer than its types.",
	measure: func(ctx context.Context, b *bench) ([]report.Run, error) { return b.reviews(ctx, 1, tookMicroseconds) },
}, {
	Metric: report.Metric{
		Name: "webhook_review_small_allocs", Unit: "allocations",
		NoGoal: "watched beside webhook_review_small_p50, which has one",
	},
	about:   "Allocations of the same.",
	measure: func(ctx context.Context, b *bench) ([]report.Run, error) { return b.reviews(ctx, 1, allocations) },
}, {
	Metric: report.Metric{Name: "webhook_review_100c_p50", Unit: "us", Goal: &reviewGoal},
	about:  "The same for a pod with 100 containers, each of which gets its variables.",
	measure: func(ctx context.Context, b *bench) ([]report.Run, error) {
		return b.reviews(ctx, 100, tookMicroseconds)
	},
}, {
	Metric: report.Metric{
		Name: "webhook_review_100c_allocs", Unit: "allocations",
		NoGoal: "watched beside webhook_review_100c_p50, which has one",
	},
	about:   "Allocations of the same.",
	measure: func(ctx context.Context, b *bench) ([]report.Run, error) { return b.reviews(ctx, 100, allocations) },
}, {
	Metric: report.Metric{
		Name: "webhook_tls_rps", Unit: "reviews/s",
		NoGoal: "watched only: what lies between it and the baseline is webhook_review_small_p50",
	},
	about: "Reviews of the small pod per second over TLS 1.3 and HTTP/2, " + strconv.Itoa(reviewers) + " at a time on one connection, as an API server has it;\n" +
		"\tbeside it, a server that reads the review and answers one of a fixed text. Client and servers are one process.",
	measure: reviewsOverTLS,
}}

// reviewGoal: what is decided and added may take half of what reading and writing takes.
var reviewGoal = report.Goal{Of: report.Ratio, Op: "<=", Value: 1.5}

// reviewers keep two processors busy.
const reviewers = 8

// permitting is a source of namespaces that are all opted in.
type permitting struct{}

// Namespace implements webhook.Namespaces.
func (permitting) Namespace(_ context.Context, name string) (policy.Namespace, error) {
	return optedIn(name), nil
}

// Latest implements webhook.Namespaces.
func (p permitting) Latest(ctx context.Context, name string) (policy.Namespace, error) {
	return p.Namespace(ctx, name)
}

func newWebhook(t trust) (*webhook.Server, error) {
	rules, err := newRules()
	if err != nil {
		return nil, err
	}
	injector, err := inject.New(inject.Config{
		Keys: rules.Keys(), Image: "registry.example/credence-sidecar:v1", Broker: "credence-broker.credence.svc:9443",
		Settings: inject.DefaultSettings(),
	})
	if err != nil {
		return nil, err
	}
	return webhook.New(webhook.Config{
		Injector: injector, Rules: rules, Namespaces: permitting{}, KeyPair: t.pair, DrainDelay: time.Nanosecond, Logger: discard,
	})
}

// reviewOf is the review of the creation of a pod with so many containers, of the size that manifests of services have.
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

// recorder is the least http.ResponseWriter that keeps what it is given.
type recorder struct {
	header http.Header
	status int
	body   bytes.Buffer
}

// Header implements http.ResponseWriter.
func (r *recorder) Header() http.Header { return r.header }

// WriteHeader implements http.ResponseWriter.
func (r *recorder) WriteHeader(status int) { r.status = status }

// Write implements http.ResponseWriter.
func (r *recorder) Write(p []byte) (int, error) { return r.body.Write(p) }

// measured is what a side of reviews measures of one call.
type measured func(once func() error) (float64, error)

func tookMicroseconds(once func() error) (float64, error) {
	began := time.Now()
	err := once()
	return float64(time.Since(began)) / float64(time.Microsecond), err
}

// allocations of what else runs in this process are counted too; the median of many calls leaves them out.
func allocations(once func() error) (float64, error) {
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	err := once()
	runtime.ReadMemStats(&after)
	return float64(after.Mallocs - before.Mallocs), err
}

func (m measured) side(once func() error) side {
	return func(_ context.Context, length time.Duration) ([]float64, error) {
		var xs []float64
		for end := time.Now().Add(length); len(xs) == 0 || time.Now().Before(end); {
			x, err := m(once)
			if err != nil {
				return nil, err
			}
			xs = append(xs, x)
		}
		return xs, nil
	}
}

func (b *bench) reviews(ctx context.Context, containers int, what measured) ([]report.Run, error) {
	t, err := newTrust(b.programs.Dir())
	if err != nil {
		return nil, err
	}
	server, err := newWebhook(t)
	if err != nil {
		return nil, err
	}
	body := reviewOf(containers)
	ours := func() error {
		request, err := http.NewRequestWithContext(ctx, http.MethodPost, "/mutate", bytes.NewReader(body))
		if err != nil {
			return err
		}
		request.Header.Set("Content-Type", "application/json")
		w := &recorder{header: make(http.Header)}
		server.ServeHTTP(w, request)
		if !bytes.Contains(w.body.Bytes(), []byte(`"patchType":"JSONPatch"`)) {
			return fmt.Errorf("the webhook answers %d %s", w.status, w.body.Bytes())
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
	return b.paired(ctx, what.side(ours), what.side(bare))
}

func reviewsOverTLS(ctx context.Context, b *bench) ([]report.Run, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	t, err := newTrust(b.programs.Dir())
	if err != nil {
		return nil, err
	}
	server, err := newWebhook(t)
	if err != nil {
		return nil, err
	}
	listener, address, err := listen(ctx)
	if err != nil {
		return nil, err
	}
	go func() { _ = server.Run(ctx, listener) }()
	bare, bareAddress, err := listen(ctx)
	if err != nil {
		return nil, err
	}
	fixed := bytes.Repeat([]byte("x"), 4<<10) // about a patch
	echo := &http.Server{
		TLSConfig: certs.ServerConfig(t.pair), ReadHeaderTimeout: time.Minute,
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			_, _ = io.Copy(io.Discard, r.Body)
			w.Header().Set("Content-Type", "application/json")
			_, _ = w.Write(fixed)
		}),
	}
	go func() { _ = echo.ServeTLS(bare, "", "") }()
	context.AfterFunc(ctx, func() { _ = echo.Close() })
	ours, closeOurs, err := reviewLoad(address, t, reviewOf(1))
	if err != nil {
		return nil, err
	}
	defer closeOurs()
	theirs, closeTheirs, err := reviewLoad(bareAddress, t, reviewOf(1))
	if err != nil {
		return nil, err
	}
	defer closeTheirs()
	return b.paired(ctx, ours, theirs)
}

// reviewLoad sends reviews to a server as fast as it answers, over one connection.
func reviewLoad(address string, t trust, body []byte) (side, func(), error) {
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(t.rootsPEM) {
		return nil, nil, errors.New("no roots")
	}
	transport := &http.Transport{
		TLSClientConfig: &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS13}, ForceAttemptHTTP2: true,
		DialContext: new(net.Dialer).DialContext,
	}
	client := &http.Client{Transport: transport}
	once := func(ctx context.Context) error {
		request, err := http.NewRequestWithContext(ctx, http.MethodPost, "https://"+address+"/mutate", bytes.NewReader(body))
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
			return fmt.Errorf("a review is answered %s", response.Status)
		}
		return nil
	}
	return func(ctx context.Context, length time.Duration) ([]float64, error) {
		var (
			all    sync.WaitGroup
			done   atomic.Int64
			failed atomic.Pointer[error]
		)
		began := time.Now()
		for range reviewers {
			all.Go(func() {
				for time.Since(began) < length {
					if err := once(ctx); err != nil {
						failed.Store(&err)
						return
					}
					done.Add(1)
				}
			})
		}
		all.Wait()
		if err := failed.Load(); err != nil {
			return nil, *err
		}
		return []float64{float64(done.Load()) / time.Since(began).Seconds()}, nil
	}, transport.CloseIdleConnections, nil
}
