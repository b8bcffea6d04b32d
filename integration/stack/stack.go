//go:build unix

// Package stack runs the whole of Credence on a control plane of package cluster: the real broker and
// the real webhook as programs of their own, with certificates, RBAC and a webhook configuration, and
// beside them an STS that tests command and, where asked, a MinIO whose objects its keys open.
//
// A control plane alone has no kubelet, so RunSidecar does what one would: it runs the sidecar of a
// stored pod as its spec says. Everything runs on the loopback address, without root, and ends with
// the cluster's run.
package stack

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"

	"github.com/credence-iam/credence/broker/assume/ststest"
	"github.com/credence-iam/credence/certs/certstest"
	"github.com/credence-iam/credence/certs/trust"
	"github.com/credence-iam/credence/integration/cluster"
	"github.com/credence-iam/credence/integration/process"
)

// What is the same in every stack.
const (
	// SystemNamespace is where Credence's own service accounts live.
	SystemNamespace = "credence"
	// Audience is the audience of pod tokens.
	Audience = "credence-broker"
	// Region is the AWS region in use.
	Region = "eu-central-1"
	// Account is the account of the broker, and of roles written as names.
	Account = "123456789012"

	brokerName  = "credence-broker"
	webhookName = "credence-webhook"
	loopback    = "127.0.0.1"
	brokerHost  = "localhost"
)

const (
	// startTimeout bounds one start of a program of ours, on a machine that compiles meanwhile.
	startTimeout = time.Minute
	// stopGrace lets a program drain.
	stopGrace = 10 * time.Second
	// propagation is what the broker is told that a changed ConfigMap takes into pods. No kubelet is waited
	// for here: whoever runs a sidecar writes its volumes.
	propagation = 2 * time.Second
)

// Config configures [Start].
type Config struct {
	// Cluster is where Credence is installed. Required.
	Cluster *cluster.Cluster
	// STS configures the STS. Default: every role can be assumed.
	STS ststest.Config
	// BrokerMemory and WebhookMemory limit the memory of the programs, in bytes, as the limits of their containers do.
	// Linux only, and needs root. Default: no limit.
	BrokerMemory, WebhookMemory int64
	// Progress gets a line for each program that is built, and each that ends unexpectedly. Default:
	// nobody is told.
	Progress io.Writer
}

// Stack is an installed Credence that runs. It may be used concurrently, except where it says
// otherwise.
type Stack struct {
	// STS is the STS that the broker asks.
	STS *ststest.Server
	// Client has all rights on the cluster.
	Client kubernetes.Interface

	cluster    *cluster.Cluster
	run        *process.Run
	programs   string // the folder of our programs
	ca         *certstest.CA
	brokerPort int
	adminPort  int
	hookPort   int
	hookAdmin  int
	broker     *process.Process
	webhook    *process.Process

	brokerMemory, webhookMemory int64
	limits                      map[string]*process.MemoryLimit // by program
	limitCount                  int
}

// Start installs and starts everything, and returns when the broker and the webhook are ready. The
// caller must Close it.
func Start(ctx context.Context, cfg Config) (_ *Stack, err error) {
	if cfg.Progress == nil {
		cfg.Progress = io.Discard
	}
	config := cfg.Cluster.Config()
	config.WarningHandler = rest.NoWarnings{} // client-go would log them, over the caller's own output
	client, err := kubernetes.NewForConfig(config)
	if err != nil {
		return nil, fmt.Errorf("making a client: %w", err)
	}
	s := &Stack{
		cluster: cfg.Cluster, run: cfg.Cluster.Run(), Client: client,
		brokerMemory: cfg.BrokerMemory, webhookMemory: cfg.WebhookMemory, limits: make(map[string]*process.MemoryLimit),
	}
	if s.programs, err = build(ctx, s.run.Dir(), cfg.Progress); err != nil {
		return nil, err
	}
	for _, port := range []*int{&s.brokerPort, &s.adminPort, &s.hookPort, &s.hookAdmin} {
		if *port, err = process.FreePort(ctx); err != nil {
			return nil, err
		}
	}
	if err := certificates(func() {
		s.ca = certstest.NewCA(tb{})
		s.writeCertificates(s.ca)
	}); err != nil {
		return nil, err
	}
	cfg.STS.Account = Account
	if s.STS, err = ststest.Start(ctx, cfg.STS); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			s.Close()
		}
	}()
	if err := s.install(ctx); err != nil {
		return nil, err
	}
	if err := s.StartBroker(ctx); err != nil {
		return nil, err
	}
	if err := s.StartWebhook(ctx); err != nil {
		return nil, err
	}
	if err := s.registerWebhook(ctx); err != nil {
		return nil, err
	}
	return s, nil
}

// Close stops the programs, each with time to drain. The cluster goes on.
func (s *Stack) Close() {
	s.StopWebhook()
	s.StopBroker()
	s.STS.Close()
}

// BrokerAddress is the broker's gRPC target. It has a name, as a Service has: a certificate is checked
// against what was dialled.
func (s *Stack) BrokerAddress() string {
	return net.JoinHostPort(brokerHost, strconv.Itoa(s.brokerPort))
}

// BrokerLog is the path of the broker's log, audit lines included.
func (s *Stack) BrokerLog() string { return s.broker.Log() }

// StopBroker takes the broker away. Not for concurrent use.
func (s *Stack) StopBroker() {
	if s.broker != nil {
		s.broker.Stop(stopGrace)
	}
}

// StartBroker starts the broker, on the same port as before and with more flags if there are any, and returns
// when it is ready. Not for concurrent use.
func (s *Stack) StartBroker(ctx context.Context, flags ...string) error {
	kubeconfig, err := s.kubeconfig(ctx, brokerName)
	if err != nil {
		return err
	}
	keyID, secret := s.STS.Keys()
	admin := s.BrokerAdminAddress()
	s.broker, err = s.start(s.brokerMemory, process.Command{
		Name: brokerName,
		Path: filepath.Join(s.programs, brokerName),
		Args: append([]string{
			"--listen=" + net.JoinHostPort(loopback, strconv.Itoa(s.brokerPort)), "--admin-listen=" + admin, "--debug-listen=",
			"--tls-cert=" + filepath.Join(s.dir(brokerName), "tls.crt"), "--tls-key=" + filepath.Join(s.dir(brokerName), "tls.key"),
			"--roots-file=" + filepath.Join(s.dir(brokerName), "ca.crt"), "--namespace=" + SystemNamespace, "--trust-owner=" + brokerName,
			"--trust-propagation=" + propagation.String(),
			"--kubeconfig=" + kubeconfig, "--audience=" + Audience,
			"--sts-endpoint=" + s.STS.URL(), "--region=" + Region,
		}, flags...),
		Env: append(NoAWSFiles(),
			"AWS_ACCESS_KEY_ID="+keyID, "AWS_SECRET_ACCESS_KEY="+secret.Reveal(),
			"GORACE=halt_on_error=1 atexit_sleep_ms=0"),
	})
	if err != nil {
		return err
	}
	return ready(ctx, s.broker, "http://"+admin+"/readyz", nil)
}

// start starts a program of ours with a memory limit, if there is one. Each start has a limit of its own, so that its
// peak is that of this start.
func (s *Stack) start(memory int64, command process.Command) (*process.Process, error) {
	if memory > 0 {
		s.limitCount++
		limit, err := s.run.MemoryLimit(command.Name+"-"+strconv.Itoa(s.limitCount), memory)
		if err != nil {
			return nil, err
		}
		s.limits[command.Name] = limit
		// The shell becomes the program after it has gone into the cgroup: so all memory of the program counts.
		command.Args = append([]string{"-c", `echo $$ >"$0" && exec "$@"`, limit.Procs(), command.Path}, command.Args...)
		command.Path = "/bin/sh"
	}
	return s.run.Start(command)
}

// Broker is the broker's process, as started last.
func (s *Stack) Broker() *process.Process { return s.broker }

// Webhook is the webhook's process, as started last.
func (s *Stack) Webhook() *process.Process { return s.webhook }

// BrokerMemoryPeak is the most memory that the broker has had since its start, in bytes, if its memory is limited.
func (s *Stack) BrokerMemoryPeak() (int64, error) { return s.memoryPeak(brokerName) }

// WebhookMemoryPeak is the most memory that the webhook has had since its start, in bytes, if its memory is limited.
func (s *Stack) WebhookMemoryPeak() (int64, error) { return s.memoryPeak(webhookName) }

func (s *Stack) memoryPeak(program string) (int64, error) {
	limit, ok := s.limits[program]
	if !ok {
		return 0, fmt.Errorf("the memory of %s is not limited", program)
	}
	return limit.Peak()
}

// Metrics returns what the broker's metrics are.
func (s *Stack) Metrics(ctx context.Context) (string, error) { return metrics(ctx, s.adminPort) }

// WebhookMetrics returns what the webhook's metrics are.
func (s *Stack) WebhookMetrics(ctx context.Context) (string, error) { return metrics(ctx, s.hookAdmin) }

func metrics(ctx context.Context, port int) (string, error) {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+net.JoinHostPort(loopback, strconv.Itoa(port))+"/metrics", nil)
	if err != nil {
		return "", fmt.Errorf("asking for metrics: %w", err)
	}
	answer, err := http.DefaultClient.Do(request)
	if err != nil {
		return "", fmt.Errorf("asking for metrics: %w", err)
	}
	defer answer.Body.Close()
	text, err := io.ReadAll(answer.Body)
	if err == nil && answer.StatusCode != http.StatusOK {
		err = errors.New(answer.Status)
	}
	if err != nil {
		return "", fmt.Errorf("asking for metrics: %w", err)
	}
	return string(text), nil
}

// Readiness returns the response of the broker's /readyz: "ready", or the conditions that it waits for.
func (s *Stack) Readiness(ctx context.Context) (string, error) {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+net.JoinHostPort(loopback, strconv.Itoa(s.adminPort))+"/readyz", nil)
	if err != nil {
		return "", fmt.Errorf("asking for readiness: %w", err)
	}
	answer, err := http.DefaultClient.Do(request)
	if err != nil {
		return "", fmt.Errorf("asking for readiness: %w", err)
	}
	defer answer.Body.Close()
	text, err := io.ReadAll(answer.Body)
	if err != nil {
		return "", fmt.Errorf("asking for readiness: %w", err)
	}
	return strings.TrimSuffix(string(text), "\n"), nil
}

// InjectFlags are those flags of the webhook that decide what it injects, which "credence inject" has, too.
func (s *Stack) InjectFlags() []string {
	return []string{
		"--audience=" + Audience, "--broker=" + s.BrokerAddress(),
		"--sidecar-image=credence-sidecar:test", "--base-arn=arn:aws:iam::" + Account + ":role/",
	}
}

// StopWebhook takes the webhook away. Not for concurrent use.
func (s *Stack) StopWebhook() {
	if s.webhook != nil {
		s.webhook.Stop(stopGrace)
	}
}

// StartWebhook starts the webhook, on the same port as before and with more flags if there are any, and returns
// when it is ready. Not for concurrent use.
func (s *Stack) StartWebhook(ctx context.Context, flags ...string) error {
	kubeconfig, err := s.kubeconfig(ctx, webhookName)
	if err != nil {
		return err
	}
	address := net.JoinHostPort(loopback, strconv.Itoa(s.hookPort))
	s.webhook, err = s.start(s.webhookMemory, process.Command{
		Name: webhookName,
		Path: filepath.Join(s.programs, webhookName),
		Args: slices.Concat(s.InjectFlags(), []string{
			"--listen=" + address, "--admin-listen=" + s.WebhookAdminAddress(),
			"--tls-cert=" + filepath.Join(s.dir(webhookName), "tls.crt"), "--tls-key=" + filepath.Join(s.dir(webhookName), "tls.key"),
			"--kubeconfig=" + kubeconfig,
		}, flags),
		Env: []string{"GORACE=halt_on_error=1 atexit_sleep_ms=0"},
	})
	if err != nil {
		return err
	}
	return ready(ctx, s.webhook, "https://"+address+"/readyz", s.ca)
}

// ready waits for a program's readiness endpoint.
func ready(ctx context.Context, p *process.Process, url string, ca *certstest.CA) error {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	transport := &http.Transport{}
	if ca != nil {
		transport.TLSClientConfig = &tls.Config{RootCAs: ca.Pool(), MinVersion: tls.VersionTLS13}
	}
	defer transport.CloseIdleConnections()
	return p.WaitReady(ctx, func(ctx context.Context) error {
		request, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
		if err != nil {
			return err
		}
		response, err := (&http.Client{Transport: transport}).Do(request)
		if err != nil {
			return err
		}
		defer func() { _ = response.Body.Close() }()
		if response.StatusCode != http.StatusOK {
			body, _ := io.ReadAll(io.LimitReader(response.Body, 1<<10))
			return fmt.Errorf("%s: %s: %s", url, response.Status, body)
		}
		return nil
	})
}

// module is ours: whoever runs a stack does so from somewhere inside it.
const module = "github.com/credence-iam/credence"

// programs are what a stack runs.
var programs = []string{"broker", "webhook", "sidecar"}

// ReadSources reads the sources that our programs are built of, and returns how many there are. Go's test cache notes
// what a test reads, once it has begun, and not what a compiler reads that is started: a package whose tests do not
// call this is taken as passed after a change of the programs.
func ReadSources(ctx context.Context) (int, error) {
	args := []string{"list", "-deps", "-f", `{{if .Module}}{{if eq .Module.Path "` + module + `"}}{{range .GoFiles}}{{$.Dir}}/{{.}}{{"\n"}}{{end}}{{end}}{{end}}`}
	for _, name := range programs {
		args = append(args, module+"/cmd/"+name)
	}
	list, err := exec.CommandContext(ctx, "go", args...).Output()
	if err != nil {
		return 0, fmt.Errorf("listing the sources of Credence: %w", err)
	}
	files := strings.FieldsFunc(string(list), func(r rune) bool { return r == '\n' })
	for _, file := range files {
		if _, err := os.ReadFile(file); err != nil {
			return 0, fmt.Errorf("reading the sources of Credence: %w", err)
		}
	}
	return len(files), nil
}

// build builds our programs below dir. The Go build cache makes that a matter of a second, once done.
func build(ctx context.Context, dir string, progress io.Writer) (string, error) {
	out := filepath.Join(dir, "bin")
	if err := os.MkdirAll(out, 0o700); err != nil {
		return "", fmt.Errorf("building Credence: %w", err)
	}
	for _, name := range programs {
		_, _ = fmt.Fprintln(progress, "building credence-"+name)
		// Without debug information, which nobody reads here, linking takes a third less.
		args := append([]string{"build", "-tags=grpcnotrace", "-ldflags=-s -w"}, raceFlags...)
		args = append(args, "-o", filepath.Join(out, "credence-"+name), module+"/cmd/"+name)
		cmd := exec.CommandContext(ctx, "go", args...) //nolint:gosec // The arguments are the constants above.
		if output, err := cmd.CombinedOutput(); err != nil {
			return "", fmt.Errorf("building credence-%s: %w\n%s", name, err, output)
		}
	}
	return out, nil
}

// NoAWSFiles is an environment in which an AWS SDK takes nothing from this machine or its network.
func NoAWSFiles() []string {
	return []string{
		"AWS_CONFIG_FILE=" + os.DevNull, "AWS_SHARED_CREDENTIALS_FILE=" + os.DevNull, "AWS_EC2_METADATA_DISABLED=true",
	}
}

// dir is the folder of one of our programs' files.
func (s *Stack) dir(name string) string { return filepath.Join(s.run.Dir(), name) }

func (s *Stack) writeCertificates(ca *certstest.CA) {
	ca.Leaf(brokerHost).WriteTo(s.dir(brokerName))
	ca.Leaf(loopback).WriteTo(s.dir(webhookName))
}

// RotateCertificates makes a new authority and gives both programs certificates of it, as cert-manager and
// the kubelet would. It returns when the broker has published the new root in every opted-in namespace; the
// broker serves the new leaf a moment later, when pods are thought to know it.
func (s *Stack) RotateCertificates(ctx context.Context) error {
	var old, ca *certstest.CA
	if err := certificates(func() { old, ca = s.ca, certstest.NewCA(tb{}) }); err != nil {
		return err
	}
	if err := s.trustWebhook(ctx, append(append([]byte(nil), ca.PEM...), old.PEM...)); err != nil {
		return err
	}
	s.ca = ca
	if err := certificates(func() { s.writeCertificates(ca) }); err != nil {
		return err
	}
	namespaces, err := s.Client.CoreV1().Namespaces().List(ctx, metav1.ListOptions{LabelSelector: optedIn + "=enabled"})
	if err != nil {
		return fmt.Errorf("listing opted-in namespaces: %w", err)
	}
	for _, ns := range namespaces.Items {
		if ns.DeletionTimestamp == nil {
			if err := s.AwaitTrust(ctx, ns.Name); err != nil {
				return err
			}
		}
	}
	return nil
}

// ServedBy reports whether what address serves now is by the newest authority, to see whether a
// rotation has reached it.
func (s *Stack) ServedBy(ctx context.Context, address string) (newest bool, err error) {
	// Brokers speak HTTP/2 only, webhooks HTTP/1.1 only.
	dialer := tls.Dialer{Config: &tls.Config{RootCAs: s.ca.Pool(), MinVersion: tls.VersionTLS13, NextProtos: []string{"h2", "http/1.1"}}}
	conn, err := dialer.DialContext(ctx, "tcp", address)
	if _, unknown := errors.AsType[*tls.CertificateVerificationError](err); unknown {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("dialing %s: %w", address, err)
	}
	return true, conn.Close()
}

// kubeconfig writes a kubeconfig file for one of our service accounts, with its rights and no more.
func (s *Stack) kubeconfig(ctx context.Context, account string) (string, error) {
	config, err := s.cluster.ServiceAccount(ctx, SystemNamespace, account)
	if err != nil {
		return "", err
	}
	file := filepath.Join(s.run.Dir(), account+".kubeconfig")
	if err := clientcmd.WriteToFile(kubeconfigOf(config), file); err != nil {
		return "", fmt.Errorf("writing a kubeconfig: %w", err)
	}
	return file, nil
}

func kubeconfigOf(config *rest.Config) clientcmdapi.Config {
	return clientcmdapi.Config{
		Clusters:       map[string]*clientcmdapi.Cluster{"c": {Server: config.Host, CertificateAuthorityData: config.CAData}},
		AuthInfos:      map[string]*clientcmdapi.AuthInfo{"u": {Token: config.BearerToken}},
		Contexts:       map[string]*clientcmdapi.Context{"x": {Cluster: "c", AuthInfo: "u"}},
		CurrentContext: "x",
	}
}

// optedIn is the label of namespaces, as users write it.
const optedIn = "iam.amazonaws.com/inject"

// Namespace makes an opted-in namespace with these annotations.
func (s *Stack) Namespace(ctx context.Context, name string, annotations map[string]string) error {
	return s.MakeNamespace(ctx, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{
		Name: name, Labels: map[string]string{optedIn: "enabled"}, Annotations: annotations,
	}})
}

// MakeNamespace makes any namespace, and returns when pods can be made there and, if it is opted in, the
// broker has published its roots in it.
func (s *Stack) MakeNamespace(ctx context.Context, ns *corev1.Namespace) error {
	if _, err := s.Client.CoreV1().Namespaces().Create(ctx, ns, metav1.CreateOptions{}); err != nil {
		return fmt.Errorf("making a namespace: %w", err)
	}
	if err := poll(ctx, func() (bool, error) {
		_, err := s.Client.CoreV1().ServiceAccounts(ns.Name).Get(ctx, "default", metav1.GetOptions{})
		return err == nil, nil
	}); err != nil {
		return fmt.Errorf("waiting for the service account of namespace %s: %w", ns.Name, err)
	}
	if ns.Labels[optedIn] != "enabled" {
		return nil
	}
	return s.AwaitTrust(ctx, ns.Name)
}

// AwaitTrust waits until the broker has published its newest root in that namespace.
func (s *Stack) AwaitTrust(ctx context.Context, namespace string) error {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	if err := poll(ctx, func() (bool, error) {
		roots, err := s.Client.CoreV1().ConfigMaps(namespace).Get(ctx, trustConfigMap, metav1.GetOptions{})
		return err == nil && strings.Contains(roots.Data[trust.RootsKey], string(s.ca.PEM)), nil
	}); err != nil {
		return fmt.Errorf("waiting for the broker to publish its roots in namespace %s: %w", namespace, err)
	}
	return nil
}

// pollInterval: what is polled for here takes tens of milliseconds.
const pollInterval = 20 * time.Millisecond

// poll calls done until it says so, fails, or ctx ends.
func poll(ctx context.Context, done func() (bool, error)) error {
	ticker := time.NewTicker(pollInterval)
	defer ticker.Stop()
	for {
		if ok, err := done(); ok || err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-ticker.C:
		}
	}
}

// tb lets certstest report failures by a panic, which certificates turns into an error.
type tb struct{}

type certificateFailure string

func (tb) Helper()                           {}
func (tb) Fatalf(format string, args ...any) { panic(certificateFailure(fmt.Sprintf(format, args...))) }

// certificates runs make, which uses certstest.
func certificates(make func()) (err error) {
	defer func() {
		if p := recover(); p != nil {
			failure, ok := p.(certificateFailure)
			if !ok {
				panic(p)
			}
			err = errors.New(string(failure))
		}
	}()
	make()
	return nil
}

// WebhookAddress is where the webhook listens.
func (s *Stack) WebhookAddress() string { return net.JoinHostPort(loopback, strconv.Itoa(s.hookPort)) }

// BrokerAdminAddress is where the broker serves health, readiness and metrics.
func (s *Stack) BrokerAdminAddress() string {
	return net.JoinHostPort(loopback, strconv.Itoa(s.adminPort))
}

// WebhookAdminAddress is where the webhook serves them.
func (s *Stack) WebhookAdminAddress() string {
	return net.JoinHostPort(loopback, strconv.Itoa(s.hookAdmin))
}

// WebhookLog is the path of the webhook's log.
func (s *Stack) WebhookLog() string { return s.webhook.Log() }

// WriteRoots writes the broker's present roots below dir and returns the file's path.
func (s *Stack) WriteRoots(dir string) string { return s.ca.WriteTo(dir) }
