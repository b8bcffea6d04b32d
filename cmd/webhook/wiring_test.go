package main

import (
	"bytes"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	jsonpatch "github.com/evanphx/json-patch/v5"
	admissionv1 "k8s.io/api/admission/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/broker/kube/apitest"
	"github.com/credence-iam/credence/certs/certstest"
	"github.com/credence-iam/credence/cmd/internal/program/processtest"
)

func TestMain(m *testing.M) {
	processtest.Main(main)
	os.Exit(m.Run())
}

// wiring has at least one row for each flag, which shows its effect. A row runs the program with a double of an API server
// and sends it admission reviews. So it fails if the program parses a flag but does not use it. A new flag needs a row.
var wiring = []struct {
	flag, shows string
	run         func(w *world)
}{
	{"listen", "the webhook serves reviews there", func(w *world) {
		address := processtest.FreeAddress(w)
		h := w.start("--listen=" + address)
		if h.address != address {
			w.Errorf("webhook serves on %s, want %s", h.address, address)
		}
		h.mustInject(cart())
	}},
	{"admin-listen", "the webhook serves metrics there", func(w *world) {
		address := processtest.FreeAddress(w)
		h := w.start("--admin-listen=" + address)
		h.mustInject(cart())
		_, text := h.get("http://" + address + "/metrics")
		for _, want := range []string{`credence_webhook_reviews_total{decision="injected"} 1`, "\ncredence_webhook_ready 1\n"} {
			if !strings.Contains(text, want) {
				w.Errorf("metrics lack %s:\n%s", want, text)
			}
		}
		if strings.Contains(text, "_file_ok") {
			w.Errorf("metrics show the state of files that the webhook does not have:\n%s", text)
		}
	}},
	{"tls-cert", "the webhook serves the certificate in that file, and a replaced one", func(w *world) {
		dir := w.TempDir()
		leaf := w.ca.Leaf(webhookName)
		certFile, keyFile := leaf.WriteTo(dir)
		h := w.start("--tls-cert="+certFile, "--tls-key="+keyFile)
		if h.serial() != serialOf(leaf) {
			w.Error("webhook does not serve the certificate in the file")
		}
		next := w.ca.Leaf(webhookName)
		next.WriteTo(dir)
		h.Await(w.T, "the replaced certificate is served", func() bool { return h.serial() == serialOf(next) })
	}},
	{"tls-key", "the webhook reads the key from that file", func(w *world) {
		leaf, file := w.ca.Leaf(webhookName), filepath.Join(w.TempDir(), "key.pem")
		dir := w.TempDir() // has the certificate with another key
		certstest.WriteVolume(w, dir, map[string][]byte{"tls.crt": leaf.CertPEM, "tls.key": w.ca.Leaf(webhookName).KeyPEM})
		processtest.Must(w, os.WriteFile(file, leaf.KeyPEM, 0o600))
		h := w.start("--tls-cert="+filepath.Join(dir, "tls.crt"), "--tls-key="+file)
		h.mustInject(cart())
	}},
	{"kubeconfig", "the webhook reads namespaces from that API server", func(w *world) {
		h := w.start()
		pod := cart()
		pod.Namespace = "closed"
		h.mustRefuse(pod, credential.ReasonNamespaceNotOpted)
		h.mustInject(cart())
		if w.api.Requests(http.MethodGet, "namespaces", "") == 0 {
			w.Error("webhook did not list namespaces")
		}
	}},
	{"log-level", "with warn, the log lacks the decisions", func(w *world) {
		h := &running{w: w, address: processtest.FreeAddress(w)}
		h.Process = w.process("--listen="+h.address, "--log-level=warn")
		h.Await(w.T, "the webhook is ready", h.ready)
		h.mustInject(cart())
		if len(h.Stderr.Lines("level", "INFO")) > 0 {
			w.Errorf("log is %s", h.Stderr)
		}
	}},
	{"annotation-prefix", "only keys with that prefix have an effect", func(w *world) {
		w.api.Put(&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{
			Name: "shop", Labels: map[string]string{"aws.example.com/inject": "enabled"}, Annotations: map[string]string{"aws.example.com/permitted": ".*"},
		}})
		h := w.start("--annotation-prefix=aws.example.com")
		if pod := h.mustAdmit(cart()); sidecar(pod) != nil {
			w.Error("webhook injects a pod with another prefix")
		}
		pod := cart()
		pod.Annotations = map[string]string{"aws.example.com/role": "cart"}
		if injected := h.mustInject(pod); injected.Labels["aws.example.com/injected"] != "true" {
			w.Errorf("labels are %v", injected.Labels)
		}
	}},
	{"base-arn", "it completes role names", func(w *world) {
		w.permit("arn:aws:iam::999999999999:role/team/.*")
		h := w.start("--base-arn=arn:aws:iam::999999999999:role/team/")
		h.mustInject(cart())
		pod := cart()
		pod.Annotations["iam.amazonaws.com/role"] = "/elsewhere"
		h.mustRefuse(pod, credential.ReasonRoleNotPermitted)
	}},
	{"role-chaining", "the webhook refuses sessions of more than an hour", func(w *world) {
		h := w.start("--role-chaining", "--base-arn=arn:aws:iam::123456789012:role/")
		pod := cart()
		pod.Annotations["iam.amazonaws.com/duration"] = "2h"
		h.mustRefuse(pod, credential.ReasonAnnotationInvalid)
	}},
	{"role-chaining", "without it, the webhook allows them", func(w *world) {
		h := w.start("--base-arn=arn:aws:iam::123456789012:role/")
		pod := cart()
		pod.Annotations["iam.amazonaws.com/duration"] = "2h"
		h.mustInject(pod)
	}},
	{"cluster-name", "the webhook refuses a name that cannot be in a session name", func(w *world) {
		// No response of the webhook has a session name. A row of the broker shows the name in use.
		w.process("--cluster-name=a b").MustFail(w.T, 2, "--cluster-name")
	}},
	{"rules-file", "the webhook applies it, and a changed one", func(w *world) {
		file := filepath.Join(w.TempDir(), "rules.yaml")
		processtest.Must(w, os.WriteFile(file, []byte("namespaces: [{match: [shop], accounts: ['*'], roles: ['*']}]"), 0o600))
		h := w.start("--rules-file="+file, "--base-arn=arn:aws:iam::123456789012:role/")
		h.mustInject(cart())
		processtest.Must(w, os.WriteFile(file, []byte("namespaces: [{match: [shop], accounts: ['*'], roles: ['/other/*']}]"), 0o600))
		h.Await(w.T, "webhook refuses the role that is no longer permitted", func() bool { return h.review(cart()).reason() == credential.ReasonRulesRole })
	}},
	{"sidecar-settings-file", "it takes precedence over the flags, and a changed one, too", func(w *world) {
		file := filepath.Join(w.TempDir(), "settings.yaml")
		processtest.Must(w, os.WriteFile(file, []byte("port: 9800"), 0o600))
		h := w.start("--sidecar-settings-file="+file, "--sidecar-port=9801")
		if got := env(h.mustInject(cart()), "CREDENCE_LISTEN"); got != "127.0.0.1:9800" {
			w.Errorf("sidecar listens on %s, want 127.0.0.1:9800", got)
		}
		processtest.Must(w, os.WriteFile(file, []byte("port: 9802"), 0o600))
		h.Await(w.T, "webhook uses the changed settings", func() bool { return env(h.mustInject(cart()), "CREDENCE_LISTEN") == "127.0.0.1:9802" })
	}},
	{"on-shadowed", "with warn, the webhook injects a pod with web identity and warns", func(w *world) {
		h := w.start("--on-shadowed=warn")
		response := h.review(shadowed())
		if !response.Allowed || len(response.Warnings) == 0 || !strings.Contains(response.Warnings[0], "AWS_WEB_IDENTITY_TOKEN_FILE") {
			w.Errorf("allowed: %v, warnings %q", response.Allowed, response.Warnings)
		}
	}},
	{"on-shadowed", "with refuse, the webhook refuses it", func(w *world) {
		w.start("--on-shadowed=refuse").mustRefuse(shadowed(), credential.ReasonShadowed)
	}},
	{"sidecar-image", "it is the sidecar's", injects("registry.example/sidecar:v7", func(pod *corev1.Pod) any { return sidecar(pod).Image })},
	{"sidecar-image-pull-policy", "it is the sidecar's", injects("Always", func(pod *corev1.Pod) any { return sidecar(pod).ImagePullPolicy })},
	{"sidecar-memory", "it is the sidecar's request and limit", injects("64Mi", func(pod *corev1.Pod) any {
		r := sidecar(pod).Resources
		if r.Requests.Memory().Cmp(*r.Limits.Memory()) != 0 {
			return "unequal"
		}
		return r.Limits.Memory()
	})},
	{"sidecar-cpu-request", "it is the sidecar's request", injects("77m", func(pod *corev1.Pod) any { return sidecar(pod).Resources.Requests.Cpu() })},
	{"sidecar-cpu-limit", "it is the sidecar's limit", injects("230m", func(pod *corev1.Pod) any { return sidecar(pod).Resources.Limits.Cpu() })},
	{"sidecar-cpu-guaranteed", "it is request and limit in a Guaranteed pod", func(w *world) {
		h := w.start("--sidecar-cpu-guaranteed=90m")
		pod := cart()
		amounts := corev1.ResourceList{"cpu": resource.MustParse("1"), "memory": resource.MustParse("64Mi")}
		pod.Spec.Containers[0].Resources = corev1.ResourceRequirements{Requests: amounts, Limits: amounts}
		r := sidecar(h.mustInject(pod)).Resources
		if r.Requests.Cpu().String() != "90m" || r.Limits.Cpu().String() != "90m" {
			w.Errorf("request is %v and limit %v, want 90m", r.Requests.Cpu(), r.Limits.Cpu())
		}
	}},
	{"sidecar-port", "the sidecar listens on it, and SDKs call it there", func(w *world) {
		pod := w.start("--sidecar-port=9801").mustInject(cart())
		called := slices.ContainsFunc(pod.Spec.Containers[0].Env, func(v corev1.EnvVar) bool {
			return v.Name == "AWS_CONTAINER_CREDENTIALS_FULL_URI" && strings.HasPrefix(v.Value, "http://127.0.0.1:9801/")
		})
		if got := env(pod, "CREDENCE_LISTEN"); got != "127.0.0.1:9801" || !called {
			w.Errorf("sidecar listens on %s, and the application has %v", got, pod.Spec.Containers[0].Env)
		}
	}},
	{"sidecar-run-as-user", "it is the sidecar's user", injects("4711", func(pod *corev1.Pod) any { return *sidecar(pod).SecurityContext.RunAsUser })},
	{"sidecar-log-level", "it is the sidecar's", injects("warn", func(pod *corev1.Pod) any { return env(pod, "CREDENCE_LOG_LEVEL") })},
	{"cluster-domain", "sidecars look up the brokers' full name", func(w *world) {
		pod := w.start("--cluster-domain=corp.example").mustInject(cart())
		if got := env(pod, "CREDENCE_BROKER_DNS_NAME"); got != "credence-broker.credence.svc.corp.example." {
			w.Errorf("sidecar looks up %q", got)
		}
	}},
	{"broker", "sidecars call it", injects("brokers.example:9999", func(pod *corev1.Pod) any { return env(pod, "CREDENCE_BROKER") })},
	{"audience", "the sidecar's token has it", injects("brokers.example", func(pod *corev1.Pod) any {
		return projected(pod, func(s corev1.VolumeProjection) (string, bool) {
			if s.ServiceAccountToken == nil {
				return "", false
			}
			return s.ServiceAccountToken.Audience, true
		})
	})},
	{"trust-config-map", "the sidecar's volume has it", injects("brokers-roots", func(pod *corev1.Pod) any {
		return projected(pod, func(s corev1.VolumeProjection) (string, bool) {
			if s.ConfigMap == nil {
				return "", false
			}
			return s.ConfigMap.Name, true
		})
	})},
}

// exempt has flags without a row, with the reason.
var exempt = map[string]string{}

// injects returns a row for a flag whose value is in an injected pod.
func injects(value string, found func(pod *corev1.Pod) any) func(w *world) {
	return func(w *world) {
		pod := w.start("--" + w.flag + "=" + value).mustInject(cart())
		if got := fmt.Sprint(found(pod)); got != value {
			w.Errorf("--%s=%s: pod has %s", w.flag, value, got)
		}
	}
}

// TestFlagsAreWired runs the rows of wiring.
func TestFlagsAreWired(t *testing.T) {
	t.Parallel()
	var rows []string
	for _, row := range wiring {
		rows = append(rows, row.flag)
		t.Run(row.flag+": "+row.shows, func(one *testing.T) {
			one.Parallel()
			row.run(newWorld(one, t, row.flag))
		})
	}
	processtest.CheckFlags(t, flags, rows, exempt)
}

// TestMetricsAreWired: a webhook with all files exports all metrics of docs/metrics.md.
func TestMetricsAreWired(t *testing.T) {
	t.Parallel()
	page, err := os.ReadFile("../../docs/metrics.md")
	processtest.Must(t, err)
	documented := regexp.MustCompile("(?m)^\\| `(credence_webhook_[a-z_]+)` \\|").FindAllSubmatch(page, -1)
	if len(documented) == 0 {
		t.Fatal("docs/metrics.md has no metric of the webhook")
	}
	w := newWorld(t, t, "")
	rules, settings, admin := filepath.Join(t.TempDir(), "rules.yaml"), filepath.Join(t.TempDir(), "settings.yaml"), processtest.FreeAddress(w)
	processtest.Must(t, os.WriteFile(rules, []byte("namespaces: [{match: ['*'], accounts: ['*'], roles: ['*']}]"), 0o600))
	processtest.Must(t, os.WriteFile(settings, []byte("port: 9800"), 0o600))
	h := w.start("--admin-listen="+admin, "--rules-file="+rules, "--sidecar-settings-file="+settings)
	h.mustInject(cart())
	_, text := h.get("http://" + admin + "/metrics")
	for _, metric := range documented {
		if name := string(metric[1]); !regexp.MustCompile(`(?m)^` + name + `(_count)?[ {]`).MatchString(text) {
			t.Errorf("webhook does not export %s", name)
		}
	}
}

// TestNotReadyWithoutNamespaces: a webhook that cannot list namespaces refuses annotated pods and is not ready.
func TestNotReadyWithoutNamespaces(t *testing.T) {
	t.Parallel()
	w := newWorld(t, t, "")
	kubeconfig := filepath.Join(t.TempDir(), "kubeconfig")
	text, err := os.ReadFile(w.api.Kubeconfig(t))
	processtest.Must(t, err)
	unreachable := regexp.MustCompile(`http://[0-9.:]+`).ReplaceAll(text, []byte("http://"+processtest.FreeAddress(w)))
	processtest.Must(t, os.WriteFile(kubeconfig, unreachable, 0o600))
	admin := processtest.FreeAddress(w)
	h := &running{Process: w.process("--kubeconfig="+kubeconfig, "--admin-listen="+admin), w: w}
	h.address = fmt.Sprint(h.Logged(t, "Serving")["address"])
	if status, text := h.get("https://" + h.address + "/readyz"); status != http.StatusServiceUnavailable || !strings.Contains(text, "namespaces") {
		t.Errorf("/readyz returns %d: %s", status, text)
	}
	if _, text := h.get("http://" + admin + "/metrics"); !strings.Contains(text, "\ncredence_webhook_ready 0\n") {
		t.Error("the metrics do not show that the webhook is not ready")
	}
	h.mustRefuse(cart(), credential.ReasonAPIServerUnavailable)
}

// TestMissingFilesStopTheStart: the webhook exits if a file is missing, and names the flag.
func TestMissingFilesStopTheStart(t *testing.T) {
	t.Parallel()
	missing := filepath.Join(t.TempDir(), "missing")
	for _, flag := range []string{"--rules-file", "--sidecar-settings-file", "--tls-cert", "--tls-key", "--kubeconfig"} {
		t.Run(flag, func(t *testing.T) {
			t.Parallel()
			newWorld(t, t, "").process(flag+"="+missing).MustFail(t, 1, strings.TrimPrefix(flag, "--"))
		})
	}
}

// webhookName is the DNS name in the webhook's certificate.
const webhookName = "credence-webhook.credence.svc"

// world is the environment of a webhook.
type world struct {
	*testing.T
	all  *testing.T // the test that runs all rows
	flag string
	api  *apitest.Server
	ca   *certstest.CA
	args []string
}

// newWorld returns a world with two namespaces: shop is opted in and permits all roles, closed is not opted in.
func newWorld(t, all *testing.T, flag string) *world {
	t.Helper()
	w := &world{T: t, all: all, flag: flag, api: apitest.Start(t), ca: certstest.NewCA(t)}
	w.permit(".*")
	w.api.Put(&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "closed"}})
	certFile, keyFile := w.ca.Leaf(webhookName).WriteTo(t.TempDir())
	w.args = []string{
		"--listen=127.0.0.1:0", "--admin-listen=", "--tls-cert=" + certFile, "--tls-key=" + keyFile, "--kubeconfig=" + w.api.Kubeconfig(t),
		"--broker=credence-broker.credence.svc:9443", "--sidecar-image=registry.example/credence-sidecar:v1",
	}
	return w
}

// permit makes namespace shop permit the roles that match expression.
func (w *world) permit(expression string) {
	w.api.Put(&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{
		Name: "shop", Labels: map[string]string{"iam.amazonaws.com/inject": "enabled"}, Annotations: map[string]string{"iam.amazonaws.com/permitted": expression},
	}})
}

// cart returns an annotated pod.
func cart() *corev1.Pod {
	return &corev1.Pod{
		TypeMeta:   metav1.TypeMeta{APIVersion: "v1", Kind: "Pod"},
		ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "cart-1", Annotations: map[string]string{"iam.amazonaws.com/role": "cart"}},
		Spec:       corev1.PodSpec{ServiceAccountName: "default", Containers: []corev1.Container{{Name: "app", Image: "registry.example/cart:v1"}}},
	}
}

// shadowed returns an annotated pod with web identity.
func shadowed() *corev1.Pod {
	pod := cart()
	pod.Spec.Containers[0].Env = []corev1.EnvVar{{Name: "AWS_WEB_IDENTITY_TOKEN_FILE", Value: "/token"}, {Name: "AWS_ROLE_ARN", Value: "arn:aws:iam::123456789012:role/other"}}
	return pod
}

// sidecar returns the sidecar of a pod; nil if there is none.
func sidecar(pod *corev1.Pod) *corev1.Container {
	at := slices.IndexFunc(pod.Spec.InitContainers, func(c corev1.Container) bool { return c.Name == "credence-sidecar" })
	if at < 0 {
		return nil
	}
	return &pod.Spec.InitContainers[at]
}

// env returns the value of one of the sidecar's variables; empty if there is none.
func env(pod *corev1.Pod, name string) string {
	for _, v := range sidecar(pod).Env {
		if v.Name == name {
			return v.Value
		}
	}
	return ""
}

// projected returns what value finds in the sources of a pod's projected volumes.
func projected(pod *corev1.Pod, value func(corev1.VolumeProjection) (string, bool)) string {
	for _, v := range pod.Spec.Volumes {
		if v.Projected == nil {
			continue
		}
		for _, source := range v.Projected.Sources {
			if found, ok := value(source); ok {
				return found
			}
		}
	}
	return ""
}

// process starts the program with further flags. The last of several flags with the same name applies.
func (w *world) process(args ...string) *processtest.Process {
	w.Helper()
	return processtest.Start(w.T, processtest.Command{Args: slices.Concat(w.args, args), Drain: w.all})
}

// start starts a webhook with further flags and waits until it is ready.
func (w *world) start(args ...string) *running {
	w.Helper()
	h := &running{Process: w.process(args...), w: w}
	h.address = fmt.Sprint(h.Logged(w.T, "Serving")["address"])
	h.Await(w.T, "the webhook is ready", h.ready)
	return h
}

// running is a running webhook.
type running struct {
	*processtest.Process
	w       *world
	address string
}

func (h *running) ready() bool {
	status, _ := h.get("https://" + h.address + "/readyz")
	return status == http.StatusOK
}

// client returns an HTTP client that trusts the webhook as an API server does.
func (h *running) client() *http.Client {
	return &http.Client{Timeout: processtest.Patience, Transport: &http.Transport{
		DisableKeepAlives: true, TLSClientConfig: &tls.Config{RootCAs: h.w.ca.Pool(), ServerName: webhookName, MinVersion: tls.VersionTLS13},
	}}
}

// get sends a request. status is 0 without a response.
func (h *running) get(address string) (status int, body string) {
	request, err := http.NewRequestWithContext(h.w.Context(), http.MethodGet, address, nil)
	if err != nil {
		return 0, err.Error()
	}
	response, err := h.client().Do(request)
	if err != nil {
		return 0, err.Error()
	}
	defer response.Body.Close()
	text, err := io.ReadAll(io.LimitReader(response.Body, 4<<20))
	if err != nil {
		return 0, err.Error()
	}
	return response.StatusCode, string(text)
}

// response is the response to a review.
type response struct {
	*admissionv1.AdmissionResponse
}

// reason returns why the webhook refused; empty if it did not.
func (a response) reason() credential.Reason { return credential.Reason(a.AuditAnnotations["reason"]) }

// review sends a review of the creation of a pod.
func (h *running) review(pod *corev1.Pod) response {
	h.w.Helper()
	object, err := json.Marshal(pod)
	processtest.Must(h.w, err)
	review := admissionv1.AdmissionReview{TypeMeta: metav1.TypeMeta{APIVersion: "admission.k8s.io/v1", Kind: "AdmissionReview"}}
	review.Request = &admissionv1.AdmissionRequest{
		UID: "uid-1", Operation: admissionv1.Create, Resource: metav1.GroupVersionResource{Version: "v1", Resource: "pods"},
		Namespace: pod.Namespace, Name: pod.Name,
	}
	review.Request.Object.Raw = object
	body, err := json.Marshal(review)
	processtest.Must(h.w, err)
	request, err := http.NewRequestWithContext(h.w.Context(), http.MethodPost, "https://"+h.address+"/mutate", bytes.NewReader(body))
	processtest.Must(h.w, err)
	request.Header.Set("Content-Type", "application/json")
	reply, err := h.client().Do(request)
	processtest.Must(h.w, err)
	defer reply.Body.Close()
	review.Response = nil
	if err := json.NewDecoder(reply.Body).Decode(&review); err != nil || review.Response == nil {
		h.w.Fatalf("response to the review is %s: %v", reply.Status, err)
	}
	return response{review.Response}
}

// mustAdmit returns the admitted pod.
func (h *running) mustAdmit(pod *corev1.Pod) *corev1.Pod {
	h.w.Helper()
	a := h.review(pod)
	if !a.Allowed {
		h.w.Fatalf("webhook refuses the pod: %s", a.Result.Message)
	}
	if a.Patch == nil {
		return pod
	}
	object, err := json.Marshal(pod)
	processtest.Must(h.w, err)
	patch, err := jsonpatch.DecodePatch(a.Patch)
	processtest.Must(h.w, err)
	object, err = patch.Apply(object)
	processtest.Must(h.w, err)
	var admitted corev1.Pod
	processtest.Must(h.w, json.Unmarshal(object, &admitted))
	return &admitted
}

func (h *running) mustInject(pod *corev1.Pod) *corev1.Pod {
	h.w.Helper()
	admitted := h.mustAdmit(pod)
	if sidecar(admitted) == nil {
		h.w.Fatal("webhook does not inject the pod")
	}
	return admitted
}

func (h *running) mustRefuse(pod *corev1.Pod, reason credential.Reason) {
	h.w.Helper()
	if a := h.review(pod); a.Allowed || a.reason() != reason {
		h.w.Errorf("allowed: %v, reason %q; want a refusal with %s", a.Allowed, a.reason(), reason)
	}
}

// serial returns the serial number of the serving certificate; empty without one.
func (h *running) serial() string {
	dialer := tls.Dialer{Config: &tls.Config{InsecureSkipVerify: true}} // only reads the certificate
	conn, err := dialer.DialContext(h.w.Context(), "tcp", h.address)
	if err != nil {
		return ""
	}
	defer conn.Close()
	return conn.(*tls.Conn).ConnectionState().PeerCertificates[0].SerialNumber.String()
}

func serialOf(l *certstest.Leaf) string { return l.TLS().Leaf.SerialNumber.String() }
