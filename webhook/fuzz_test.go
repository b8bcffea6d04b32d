package webhook_test

import (
	"context"
	"encoding/json"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"

	jsonpatch "github.com/evanphx/json-patch/v5"
	admissionv1 "k8s.io/api/admission/v1"
	utiljson "k8s.io/apimachinery/pkg/util/json"

	"github.com/credence-iam/credence/webhook/inject"
)

// FuzzMutate: the response to any bytes is a review with the request's uid, or a 4xx.
func FuzzMutate(f *testing.F) {
	f.Add(review(pod(permitted, "")))
	f.Add(review(pod("x", `"hostNetwork":true,`)))
	f.Add(review("null", "CREATE", "UPDATE"))
	f.Add(review("{}", "0b2e5d3c", ""))
	f.Add("null")
	s := newServer(f)
	f.Fuzz(func(t *testing.T, body string) {
		w := recorded(t, s, http.MethodPost, "/mutate", body)
		if w.Code >= 400 && w.Code < 500 {
			return
		}
		if w.Code != http.StatusOK {
			t.Fatalf("status %d: %s", w.Code, w.Body)
		}
		var received admissionv1.AdmissionReview
		if err := utiljson.Unmarshal([]byte(body), &received); err != nil {
			t.Fatalf("status 200 for a body that does not decode: %v", err)
		}
		decodeReview(t, w.Body.String(), string(received.Request.UID))
	})
}

// recorded returns the handler's response without a connection.
func recorded(t testing.TB, handler http.Handler, method, path, body string) *httptest.ResponseRecorder {
	t.Helper()
	request := httptest.NewRequestWithContext(t.Context(), method, path, strings.NewReader(body))
	request.Header.Set("Content-Type", "application/json")
	w := httptest.NewRecorder()
	handler.ServeHTTP(w, request)
	return w
}

// applied returns raw with the operations applied.
func applied(t testing.TB, raw string, ops []inject.Operation) string {
	t.Helper()
	encoded, err := json.Marshal(ops)
	if err != nil {
		t.Fatal(err)
	}
	patch, err := jsonpatch.DecodePatch(encoded)
	if err != nil {
		t.Fatal(err)
	}
	out, err := patch.Apply([]byte(raw))
	if err != nil {
		t.Fatal(err)
	}
	return string(out)
}

// pipes is a listener in memory, which works with the clock of synctest.
type pipes struct {
	connections chan net.Conn
	closed      chan struct{}
	close       func()
}

func newPipes() *pipes {
	p := &pipes{connections: make(chan net.Conn), closed: make(chan struct{})}
	p.close = sync.OnceFunc(func() { close(p.closed) })
	return p
}

func (p *pipes) dial(ctx context.Context, _, _ string) (net.Conn, error) {
	ours, theirs := net.Pipe()
	select {
	case p.connections <- theirs:
		return ours, nil
	case <-p.closed:
		return nil, net.ErrClosed
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

func (p *pipes) Accept() (net.Conn, error) {
	select {
	case connection := <-p.connections:
		return connection, nil
	case <-p.closed:
		return nil, net.ErrClosed
	}
}

func (p *pipes) Close() error   { p.close(); return nil }
func (p *pipes) Addr() net.Addr { return &net.UnixAddr{Name: "pipes", Net: "pipe"} }
