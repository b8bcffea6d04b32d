package main

import (
	"context"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	corev1client "k8s.io/client-go/kubernetes/typed/core/v1"
	"k8s.io/client-go/rest"

	"github.com/credence-iam/credence/broker/assume"
	"github.com/credence-iam/credence/broker/assume/ststest"
	"github.com/credence-iam/credence/cmd/internal/program"
	"github.com/credence-iam/credence/cmd/internal/program/processtest"
	"github.com/credence-iam/credence/cmd/internal/program/programtest"
)

// Variables of the process that makes calls through a proxy. It is a separate process, because net/http reads the proxies of a
// process once.
const (
	behindProxy   = "CREDENCE_TEST_BEHIND_PROXY" // set: this is that process
	podIdentityAt = "CREDENCE_TEST_POD_IDENTITY" // the address behind its 169.254.170.23:80
	apiServerAt   = "10.96.0.1:443"              // where no server is
	stsHost       = "sts.example.com"            // which only the proxy reaches; httptest has a certificate for it
	podIdentity   = "http://169.254.170.23/v1/credentials"
	ownToken      = "the-broker's-own-token"
)

// found is the result of that process.
type found struct {
	Dialled   []string // addresses of its connections
	Confirmed bool
	Problem   string
	Err       string
}

// behind calls the API server and STS as the broker does, with credentials of EKS Pod Identity.
func behind(t *testing.T) (f found) {
	if _, err := program.DirectCalls(); err != nil {
		t.Fatal(err)
	}
	var mu sync.Mutex // transports dial in other goroutines
	dial := func(ctx context.Context, network, address string) (net.Conn, error) {
		mu.Lock()
		f.Dialled = append(f.Dialled, address)
		mu.Unlock()
		switch address {
		case "169.254.170.23:80":
			address = os.Getenv(podIdentityAt)
		case apiServerAt:
			return nil, fmt.Errorf("there is no API server in this test")
		}
		return new(net.Dialer).DialContext(ctx, network, address)
	}
	client, err := corev1client.NewForConfig(&rest.Config{Host: "https://" + apiServerAt, Dial: dial})
	processtest.Must(t, err)
	_, err = client.Namespaces().List(t.Context(), metav1.ListOptions{})
	if err == nil {
		t.Error("an API server that does not exist responded")
	}
	sts, err := assume.New(t.Context(), assume.Config{Region: "eu-test-1", Endpoint: "https://" + stsHost, Dial: dial})
	processtest.Must(t, err)
	if _, err := sts.Base(t.Context()); err != nil {
		f.Err = err.Error()
	}
	is := sts.Identity()
	mu.Lock()
	defer mu.Unlock()
	f.Confirmed, f.Problem = is.Confirmed, is.Problem
	return f
}

// The broker uses a proxy for AWS only. It calls the API server and link-local addresses directly: a proxy could not reach
// them, and would read the broker's own token.
func TestWhatGoesThroughAProxy(t *testing.T) {
	if out := os.Getenv(behindProxy); out != "" {
		text, err := json.Marshal(behind(t))
		processtest.Must(t, err)
		processtest.Must(t, os.WriteFile(out, text, 0o600))
		return
	}
	sts, err := ststest.New(ststest.Config{})
	processtest.Must(t, err)
	front := httptest.NewUnstartedServer(sts)
	front.StartTLS()
	defer front.Close()
	id, secret := sts.Keys()
	var token atomic.Value
	agent := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		token.Store(r.Header.Get("Authorization"))
		w.Header().Set("Content-Type", "application/json")
		_ = json.NewEncoder(w).Encode(map[string]string{"AccessKeyId": id, "SecretAccessKey": secret.Reveal()})
	}))
	defer agent.Close()
	proxy := programtest.StartProxy(t, map[string]string{stsHost + ":443": front.Listener.Addr().String()})

	dir := t.TempDir()
	tokenFile, bundle := filepath.Join(dir, "token"), filepath.Join(dir, "ca.pem")
	processtest.Must(t, os.WriteFile(tokenFile, []byte(ownToken), 0o600))
	processtest.Must(t, os.WriteFile(bundle, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: front.Certificate().Raw}), 0o600))
	run := func(more ...string) found {
		t.Helper()
		out := filepath.Join(dir, "found")
		child := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^"+t.Name()+"$", "-test.count=1")
		for _, v := range os.Environ() {
			if name, _, _ := strings.Cut(v, "="); !strings.HasPrefix(name, "AWS_") && !strings.Contains(strings.ToUpper(name), "PROXY") {
				child.Env = append(child.Env, v)
			}
		}
		address := "http://user:pa55word@" + proxy.Addr
		child.Env = append(child.Env, behindProxy+"="+out, podIdentityAt+"="+agent.Listener.Addr().String(),
			"HTTPS_PROXY="+address, "HTTP_PROXY="+address, "KUBERNETES_SERVICE_HOST=10.96.0.1", "KUBERNETES_SERVICE_PORT=443",
			"AWS_CONTAINER_CREDENTIALS_FULL_URI="+podIdentity, "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE="+tokenFile,
			"AWS_CA_BUNDLE="+bundle, "AWS_CONFIG_FILE="+os.DevNull, "AWS_SHARED_CREDENTIALS_FILE="+os.DevNull, "AWS_EC2_METADATA_DISABLED=true")
		child.Env = append(child.Env, more...)
		if output, err := child.CombinedOutput(); err != nil {
			t.Fatalf("%v\n%s", err, output)
		}
		text, err := os.ReadFile(out)
		processtest.Must(t, err)
		var f found
		processtest.Must(t, json.Unmarshal(text, &f))
		if strings.Contains(string(text), "pa55word") || strings.Contains(string(text), ownToken) {
			t.Errorf("the proxy's password or the broker's token is in a message: %s", text)
		}
		return f
	}

	f := run()
	if !f.Confirmed || f.Err != "" {
		t.Errorf("through a proxy, STS returned %+v", f)
	}
	if want := []string{apiServerAt, "169.254.170.23:80", proxy.Addr}; !slices.Equal(slices.Compact(f.Dialled), want) {
		t.Errorf("connections were opened to %v, want %v", f.Dialled, want)
	}
	if token.Load() != ownToken {
		t.Errorf("EKS Pod Identity got the token %q", token.Load())
	}
	hosts, authorizations := proxy.Requested()
	if !slices.Equal(slices.Compact(hosts), []string{stsHost + ":443"}) || len(authorizations) > 0 {
		t.Errorf("the proxy received requests for %v, and read %d Authorization headers", hosts, len(authorizations))
	}

	// A refusal by the proxy is not reported as one by AWS.
	proxy.Refuse(http.StatusForbidden)
	f = run()
	refused := fmt.Sprintf("the proxy %s refuses a connection to %s:443 with status 403", proxy.Addr, stsHost)
	if f.Confirmed || !strings.Contains(f.Problem, refused) || !strings.Contains(f.Err, refused) {
		t.Errorf("a proxy that refuses: %+v, want %q", f, refused)
	}
	// The error names a proxy that does not respond, too.
	gone := httptest.NewServer(nil)
	gone.Close()
	f = run("HTTPS_PROXY=http://user:pa55word@" + gone.Listener.Addr().String())
	if named := "the proxy " + gone.Listener.Addr().String(); f.Confirmed || !strings.Contains(f.Problem, named) || !strings.Contains(f.Err, named) {
		t.Errorf("a proxy that is gone: %+v, want %q", f, named)
	}
}

// The program excludes local calls from proxies before it makes its first client. It refuses a value that is not a proxy's
// address.
func TestProgramKeepsLocalCallsOffProxies(t *testing.T) {
	t.Setenv("HTTPS_PROXY", "http://proxy.example.com:3128")
	t.Setenv("KUBERNETES_SERVICE_HOST", "10.96.0.1")
	t.Setenv("NO_PROXY", "")
	t.Setenv("no_proxy", "")
	if err := run(t.Context(), options{rulesFile: "/nonexistent"}); err == nil || !strings.Contains(err.Error(), "--rules-file") {
		t.Fatalf("without files, the broker ended with %v", err)
	}
	for _, name := range []string{"NO_PROXY", "no_proxy"} {
		if direct := os.Getenv(name); !strings.Contains(direct, "10.96.0.1") || !strings.Contains(direct, "169.254.0.0/16") {
			t.Errorf("%s is %q", name, direct)
		}
	}
	t.Setenv("HTTPS_PROXY", "ftp://user:pa55word@proxy")
	if err := run(t.Context(), options{rulesFile: "/nonexistent"}); err == nil || !strings.Contains(err.Error(), "HTTPS_PROXY") || strings.Contains(err.Error(), "pa55word") {
		t.Errorf("with a wrong HTTPS_PROXY, the broker ended with %v", err)
	}
}
