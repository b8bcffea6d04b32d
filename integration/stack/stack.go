//go:build unix

// Package stack runs all of Credence on a control plane of package cluster: the real broker and the real webhook as
// programs, with certificates, RBAC and a webhook configuration. Beside them run an STS that tests control, and an S3
// double whose buckets the STS's sessions open.
//
// A control plane alone has no kubelet. RunSidecar stands in for it: it runs the sidecar of a stored pod as the pod's spec
// says. Everything runs on the loopback address, without root, and ends with the cluster's run.
package stack

import (
	"cmp"
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
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"

	admissionregistrationv1 "k8s.io/api/admissionregistration/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"

	"github.com/credence-iam/credence/broker/assume/ststest"
	"github.com/credence-iam/credence/certs/certstest"
	"github.com/credence-iam/credence/certs/trust"
	"github.com/credence-iam/credence/integration/await"
	"github.com/credence-iam/credence/integration/cluster"
	"github.com/credence-iam/credence/integration/images"
	"github.com/credence-iam/credence/integration/process"
	"github.com/credence-iam/credence/integration/s3test"
)

// These are the same in every stack.
const (
	// SystemNamespace is the namespace of Credence's own service accounts.
	SystemNamespace = "credence"
	// Audience is the audience of pod tokens.
	Audience = "credence-broker"
	// Region is the AWS region.
	Region = "eu-central-1"
	// Account is the account of the broker, and of roles written as names.
	Account = "123456789012"

	brokerName  = "credence-broker"
	webhookName = "credence-webhook"
	loopback    = "127.0.0.1"
	brokerHost  = "localhost"
	// raceEnv makes a program with the race detector end at the first race.
	raceEnv = "GORACE=halt_on_error=1 atexit_sleep_ms=0"
)

// RoleARN is the ARN of a role of the broker's account.
func RoleARN(role string) string { return "arn:aws:iam::" + Account + ":role/" + role }

const (
	// startTimeout bounds one start of a program, on a machine that compiles at the same time.
	startTimeout = time.Minute
	// stopGrace is how long a program may drain.
	stopGrace = 10 * time.Second
	// propagation is the broker's setting for how long a changed ConfigMap takes to reach pods. Here no kubelet has to be
	// waited for: the test that runs a sidecar writes its volumes.
	propagation = 2 * time.Second
)

// Config configures [Start].
type Config struct {
	// Cluster is the cluster on which Credence is installed. Required.
	Cluster *cluster.Cluster
	// STS configures the STS. Default: every role can be assumed.
	STS ststest.Config
	// Buckets are made in the S3 double. Only the role of a bucket's name may use it.
	Buckets []string
	// BrokerMemory and WebhookMemory limit the memory of the programs, in bytes, as container limits do. Linux only, and
	// needs root. Default: no limit.
	BrokerMemory, WebhookMemory int64
	// Architecture is the architecture of the programs, as in GOARCH. If it is not that of this machine, [Emulator] runs the
	// programs, and their memory cannot be limited. Default: this machine's.
	Architecture string
	// Progress gets a line for each program that is built, and for each that ends unexpectedly. Default: discarded.
	Progress io.Writer
}

// Stack is an installed and running Credence. Methods may be called concurrently unless their comment says otherwise.
type Stack struct {
	// STS is the STS that the broker calls.
	STS *ststest.Server
	// Store has the buckets.
	Store *s3test.Server
	// Client has all rights on the cluster.
	Client kubernetes.Interface
	// Broker and Webhook are the programs.
	Broker, Webhook *Program

	cluster       *cluster.Cluster
	run           *process.Run
	programs      string // the folder of the programs
	ca            *certstest.CA
	architecture  string                                                  // of the programs
	emulator      string                                                  // the path of the program that runs them; empty: none is needed
	registrations []*admissionregistrationv1.MutatingWebhookConfiguration // of the webhook
}

// Program is the broker or the webhook, as started last.
type Program struct {
	*process.Process // nil before the first start

	// Address is where the program serves. The broker's has a host name, as a Service has, because a certificate is compared
	// with the dialed name.
	Address string
	// Admin is the address of health, readiness and metrics.
	Admin string

	name, listen string
	log          string // the name of the log
	memory       int64  // limit; 0: none
	limit        *process.MemoryLimit
	starts       int
}

// MemoryPeak returns the program's highest memory since its start, in bytes, if its memory is limited.
func (p *Program) MemoryPeak() (int64, error) {
	if p.limit == nil {
		return 0, fmt.Errorf("the memory of %s is not limited", p.name)
	}
	return p.limit.Peak()
}

// ShutDown stops the program, with time to drain. Not for concurrent use.
func (p *Program) ShutDown() {
	if p.Process != nil {
		p.Stop(stopGrace)
	}
}

// Start installs and starts everything, and returns when the broker and the webhook are ready. The caller must Close it.
func Start(ctx context.Context, cfg Config) (_ *Stack, err error) {
	if cfg.Progress == nil {
		cfg.Progress = io.Discard
	}
	config := cfg.Cluster.Config()
	config.WarningHandler = rest.NoWarnings{} // client-go would log them, between the caller's own output
	client, err := kubernetes.NewForConfig(config)
	if err != nil {
		return nil, fmt.Errorf("making a client: %w", err)
	}
	s := &Stack{
		cluster: cfg.Cluster, run: cfg.Cluster.Run(), Client: client,
		Broker:  &Program{name: brokerName, log: brokerName, memory: cfg.BrokerMemory},
		Webhook: &Program{name: webhookName, log: webhookName, memory: cfg.WebhookMemory},
	}
	s.architecture = cmp.Or(cfg.Architecture, runtime.GOARCH)
	if s.emulator, err = Emulator(s.architecture); err != nil {
		return nil, err
	}
	s.programs = s.dir("bin")
	if err := s.build(ctx, cfg.Progress); err != nil {
		return nil, err
	}
	if err := s.findPorts(ctx); err != nil {
		return nil, err
	}
	if err := certificates(func() { s.setCA(certstest.NewCA(tb{})) }); err != nil {
		return nil, err
	}
	cfg.STS.Account = Account
	if s.STS, err = ststest.Start(ctx, cfg.STS); err != nil {
		return nil, err
	}
	listener, err := new(net.ListenConfig).Listen(ctx, "tcp", net.JoinHostPort(loopback, "0"))
	if err != nil {
		return nil, fmt.Errorf("listening for S3: %w", err)
	}
	s.Store = s3test.Start(ctx, listener, s.STS, cfg.Buckets...)
	for _, step := range []func(context.Context) error{
		s.install,
		func(ctx context.Context) error { return s.StartBroker(ctx) },
		func(ctx context.Context) error { return s.StartWebhook(ctx) },
		s.registerWebhook,
	} {
		if err := step(ctx); err != nil {
			s.Close()
			return nil, err
		}
	}
	return s, nil
}

func (s *Stack) findPorts(ctx context.Context) error {
	for p, host := range map[*Program]string{s.Broker: brokerHost, s.Webhook: loopback} {
		port, err := process.FreePort(ctx)
		adminPort, err2 := process.FreePort(ctx)
		if err := errors.Join(err, err2); err != nil {
			return err
		}
		p.listen, p.Address = net.JoinHostPort(loopback, strconv.Itoa(port)), net.JoinHostPort(host, strconv.Itoa(port))
		p.Admin = net.JoinHostPort(loopback, strconv.Itoa(adminPort))
	}
	return nil
}

// Beside returns a stack that shares all with s but its programs. Its broker and its webhook are further ones, which are
// not started, and name is in the names of their logs. They and its sidecars run from the folder of programs; empty: the
// folder of s. Shut its programs down instead of calling Close.
func (s *Stack) Beside(ctx context.Context, name, programs string) (*Stack, error) {
	beside := *s
	beside.programs = cmp.Or(programs, s.programs)
	beside.Broker = &Program{name: brokerName, log: brokerName + "-" + name}
	beside.Webhook = &Program{name: webhookName, log: webhookName + "-" + name}
	return &beside, beside.findPorts(ctx)
}

// Close stops the programs, each with time to drain. The cluster keeps running.
func (s *Stack) Close() {
	s.Webhook.ShutDown()
	s.Broker.ShutDown()
	s.STS.Close()
}

// StartBroker starts the broker at the same address as before, with further flags if there are any. It returns when the
// broker is ready. Not for concurrent use.
func (s *Stack) StartBroker(ctx context.Context, flags ...string) error {
	keyID, secret := s.STS.Keys()
	return s.start(ctx, s.Broker, process.Command{
		Args: slices.Concat([]string{
			"--debug-listen=", "--roots-file=" + filepath.Join(s.dir(brokerName), "ca.crt"), "--namespace=" + SystemNamespace,
			"--trust-owner=" + brokerName, "--trust-propagation=" + propagation.String(), "--audience=" + Audience,
			"--sts-endpoint=" + s.STS.URL(), "--region=" + Region,
		}, flags),
		Env: append(NoAWSFiles(), "AWS_ACCESS_KEY_ID="+keyID, "AWS_SECRET_ACCESS_KEY="+secret.Reveal()),
	}, "http://"+s.Broker.Admin)
}

// StartWebhook starts the webhook at the same address as before, with further flags if there are any. It returns when the
// webhook is ready. Not for concurrent use.
func (s *Stack) StartWebhook(ctx context.Context, flags ...string) error {
	return s.start(ctx, s.Webhook, process.Command{Args: append(s.InjectFlags(), flags...)}, "https://"+s.Webhook.Address)
}

// CheckWebhook runs the check that the chart runs after an installation, with its rights. It returns the output.
func (s *Stack) CheckWebhook(ctx context.Context, timeout time.Duration) (string, error) {
	kubeconfig, err := s.kubeconfig(ctx, "credence-check")
	if err != nil {
		return "", err
	}
	out, err := exec.CommandContext(ctx, s.program(webhookName), "check", //nolint:gosec // our own program
		"--kubeconfig="+kubeconfig, "--namespace="+SystemNamespace, "--timeout="+timeout.String()).CombinedOutput()
	return string(out), err
}

// InjectFlags are the flags of the webhook that determine what it injects. The command "credence inject" has them too.
func (s *Stack) InjectFlags() []string {
	return []string{
		"--audience=" + Audience, "--broker=" + s.Broker.Address,
		"--sidecar-image=credence-sidecar:test", "--base-arn=" + RoleARN(""),
	}
}

// start starts p with the flags that both programs have and those of command, and waits until it is ready at url. Each
// start has a memory limit of its own, so that its peak is that of this start.
func (s *Stack) start(ctx context.Context, p *Program, command process.Command, url string) error {
	kubeconfig, err := s.kubeconfig(ctx, p.name)
	if err != nil {
		return err
	}
	command.Name, command.Env = p.log, append(command.Env, raceEnv)
	command.Path, command.Args = s.command(p.name, append([]string{
		"--listen=" + p.listen, "--admin-listen=" + p.Admin, "--kubeconfig=" + kubeconfig,
		"--tls-cert=" + filepath.Join(s.dir(p.name), "tls.crt"), "--tls-key=" + filepath.Join(s.dir(p.name), "tls.key"),
	}, command.Args...))
	if p.memory > 0 {
		p.starts++
		if p.limit, err = s.run.MemoryLimit(p.name+"-"+strconv.Itoa(p.starts), p.memory); err != nil {
			return err
		}
		// The shell enters the cgroup and then becomes the program, so all memory of the program counts.
		command.Args = append([]string{"-c", `echo $$ >"$0" && exec "$@"`, p.limit.Procs(), command.Path}, command.Args...)
		command.Path = "/bin/sh"
	}
	if p.Process, err = s.run.Start(command); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	return p.WaitReady(ctx, func(ctx context.Context) error {
		_, err := s.get(ctx, url+"/readyz")
		return err
	})
}

// get returns a page of a program.
func (s *Stack) get(ctx context.Context, url string) (string, error) {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return "", err
	}
	transport := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: s.ca.Pool(), MinVersion: tls.VersionTLS13}}
	defer transport.CloseIdleConnections()
	response, err := (&http.Client{Transport: transport}).Do(request)
	if err != nil {
		return "", err
	}
	defer response.Body.Close()
	text, err := io.ReadAll(response.Body)
	if err == nil && response.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s responds %d: %s", url, response.StatusCode, text)
	}
	return string(text), err
}

// Metrics returns the metrics of a program.
func (s *Stack) Metrics(ctx context.Context, p *Program) (string, error) {
	return s.get(ctx, "http://"+p.Admin+"/metrics")
}

// module is Credence's module. A stack is always run from within it.
const module = "github.com/credence-iam/credence"

// programs are the programs that a stack runs.
var programs = []string{"broker", "webhook", "sidecar"}

// ReadSources reads the source files of the programs of a stack and of more programs, and returns their number. Go's test
// cache records the files that a test reads, but not those that a compiler reads for the test. So without ReadSources, a
// package counts as passed after a change of the programs.
func ReadSources(ctx context.Context, more ...string) (int, error) {
	args := []string{"list", "-deps", "-f", `{{if .Module}}{{if eq .Module.Path "` + module + `"}}{{range .GoFiles}}{{$.Dir}}/{{.}}{{"\n"}}{{end}}{{end}}{{end}}`}
	for _, name := range slices.Concat(programs, more) {
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

// build builds the programs. With Go's build cache it takes a second.
func (s *Stack) build(ctx context.Context, progress io.Writer) error {
	for _, name := range programs {
		_, _ = fmt.Fprintln(progress, "building credence-"+name)
		if s.architecture != runtime.GOARCH { // as an image has it, without the race detector
			if err := images.Compile(ctx, module+"/cmd/"+name, s.architecture, s.program("credence-"+name)); err != nil {
				return err
			}
			continue
		}
		if err := goBuild(ctx, "-o", s.program("credence-"+name), module+"/cmd/"+name); err != nil {
			return fmt.Errorf("building credence-%s: %w", name, err)
		}
	}
	return nil
}

// BuildAWSClient builds awsclient, an application with an AWS SDK, for this machine. It returns the path of the program.
func (s *Stack) BuildAWSClient(ctx context.Context) (string, error) {
	file := filepath.Join(s.dir("bin"), "awsclient")
	return file, images.CompileFor(ctx, module+"/integration/awsclient", runtime.GOOS, runtime.GOARCH, file)
}

// Compile fills Go's build cache for Start, so that a caller can compile while it waits for a cluster.
func Compile(ctx context.Context) error {
	var packages []string
	for _, name := range programs {
		packages = append(packages, module+"/cmd/"+name)
	}
	return goBuild(ctx, packages...)
}

func goBuild(ctx context.Context, args ...string) error {
	// Without debug information, which is not used here, linking takes a third less.
	args = append([]string{"build", "-tags=grpcnotrace", "-ldflags=-s -w", "-race=" + strconv.FormatBool(Race), "-trimpath=" + strconv.FormatBool(!Race)}, args...)
	cmd := exec.CommandContext(ctx, "go", args...) //nolint:gosec // The arguments are constants and our own folder.
	// With the race detector, programs are compiled like the tests that start them, else like images and tools, so that
	// Go's build cache has most packages already.
	if !Race {
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	}
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	cmd.WaitDelay = stopGrace // The go command waits for its compilers.
	if output, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%w\n%s", err, output)
	}
	return nil
}

// NoAWSFiles is an environment in which an AWS SDK takes nothing from this machine or its network.
func NoAWSFiles() []string {
	return []string{
		"AWS_CONFIG_FILE=" + os.DevNull, "AWS_SHARED_CREDENTIALS_FILE=" + os.DevNull, "AWS_EC2_METADATA_DISABLED=true",
	}
}

// dir is a folder of this stack.
func (s *Stack) dir(name string) string { return filepath.Join(s.run.Dir(), name) }

// setCA makes serving certificates of ca for both programs.
func (s *Stack) setCA(ca *certstest.CA) {
	ca.Leaf(brokerHost).WriteTo(s.dir(brokerName))
	ca.Leaf(loopback).WriteTo(s.dir(webhookName))
	s.ca = ca
}

// RotateCertificates makes a new CA and gives both programs serving certificates of it, as cert-manager and the kubelet
// would. It returns when the broker has published the new root in every opted-in namespace. The broker serves the new
// certificate a moment later, when pods have had time to learn the root.
func (s *Stack) RotateCertificates(ctx context.Context) error {
	var ca *certstest.CA
	if err := certificates(func() { ca = certstest.NewCA(tb{}) }); err != nil {
		return err
	}
	if err := s.setWebhookRoots(ctx, slices.Concat(ca.PEM, s.ca.PEM)); err != nil {
		return err
	}
	if err := certificates(func() { s.setCA(ca) }); err != nil {
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

// ServedBy reports whether the server at address serves a certificate of the newest CA, so that a rotation has reached it.
func (s *Stack) ServedBy(ctx context.Context, address string) (newest bool, err error) {
	// The broker speaks only HTTP/2, the webhook only HTTP/1.1.
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

// WriteRoots writes the current root below dir and returns the file's path.
func (s *Stack) WriteRoots(dir string) string { return s.ca.WriteTo(dir) }

// kubeconfig writes a kubeconfig file for one of Credence's service accounts, with only its rights.
func (s *Stack) kubeconfig(ctx context.Context, account string) (string, error) {
	config, err := s.cluster.ServiceAccount(ctx, SystemNamespace, account)
	if err != nil {
		return "", err
	}
	file := s.dir(account + ".kubeconfig")
	if err := clientcmd.WriteToFile(clientcmdapi.Config{
		Clusters:       map[string]*clientcmdapi.Cluster{"c": {Server: config.Host, CertificateAuthorityData: config.CAData}},
		AuthInfos:      map[string]*clientcmdapi.AuthInfo{"u": {Token: config.BearerToken}},
		Contexts:       map[string]*clientcmdapi.Context{"x": {Cluster: "c", AuthInfo: "u"}},
		CurrentContext: "x",
	}, file); err != nil {
		return "", fmt.Errorf("writing a kubeconfig: %w", err)
	}
	return file, nil
}

// Namespace makes an opted-in namespace with these annotations.
func (s *Stack) Namespace(ctx context.Context, name string, annotations map[string]string) error {
	return s.MakeNamespace(ctx, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{
		Name: name, Labels: map[string]string{optedIn: "enabled"}, Annotations: annotations,
	}})
}

// MakeNamespace makes any namespace. It returns when pods can be made there and, if the namespace is opted in, the broker
// has published its root there.
func (s *Stack) MakeNamespace(ctx context.Context, ns *corev1.Namespace) error {
	if _, err := s.Client.CoreV1().Namespaces().Create(ctx, ns, metav1.CreateOptions{}); err != nil {
		return fmt.Errorf("making a namespace: %w", err)
	}
	if err := await.Poll(ctx, func() error {
		_, err := s.Client.CoreV1().ServiceAccounts(ns.Name).Get(ctx, "default", metav1.GetOptions{})
		return err
	}); err != nil {
		return fmt.Errorf("waiting for the service account of namespace %s: %w", ns.Name, err)
	}
	if ns.Labels[optedIn] != "enabled" {
		return nil
	}
	return s.AwaitTrust(ctx, ns.Name)
}

// AwaitTrust waits until the broker has published its newest root in the namespace.
func (s *Stack) AwaitTrust(ctx context.Context, namespace string) error {
	if err := await.Poll(ctx, func() error {
		roots, err := s.Client.CoreV1().ConfigMaps(namespace).Get(ctx, trustConfigMap, metav1.GetOptions{})
		if err == nil && !strings.Contains(roots.Data[trust.RootsKey], string(s.ca.PEM)) {
			err = errors.New("the newest root is missing")
		}
		return err
	}); err != nil {
		return fmt.Errorf("waiting for the broker to publish its roots in namespace %s: %w", namespace, err)
	}
	return nil
}

// tb makes certstest panic at a failure. Function certificates turns the panic into an error.
type tb struct{}

type certificateFailure string

func (tb) Helper()                           {}
func (tb) Fatalf(format string, args ...any) { panic(certificateFailure(fmt.Sprintf(format, args...))) }

// certificates runs a function that uses certstest.
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
