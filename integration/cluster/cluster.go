//go:build unix

// Package cluster runs a real Kubernetes for tests and the demonstration. There are two kinds.
//
// The small one is a control plane: etcd, kube-apiserver and kube-controller-manager as child processes,
// without root, on the loopback address. Everything a control plane does is there: admission with webhooks
// and policies, RBAC, ServiceAccount tokens, informers, garbage collection. There is no node: pods can be made
// but do not run.
//
// The other has nodes, and with them kube-scheduler, DNS, and on each node kubelet, containerd, runc,
// kube-proxy and a pod network: pods run, probes are made, volumes are refreshed. It needs root, on Linux. The
// control plane and every node are machines of package machine, in networks of their own: nothing of the
// cluster can be reached from outside, except through its Host, and its client configurations.
//
// A cluster leaves nothing behind: not after Stop, not when a test panics, and not after its owner was
// killed; see package process. Any number of clusters run side by side. The programs are built on first
// use; see package tools.
package cluster

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"sync"
	"syscall"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	clientcmdv1 "k8s.io/client-go/tools/clientcmd/api/v1"
	"sigs.k8s.io/yaml"

	"github.com/credence-iam/credence/integration/process"
	"github.com/credence-iam/credence/integration/tools"
)

// Issuer is the iss claim of ServiceAccount tokens. It is what most clusters have.
const Issuer = "https://kubernetes.default.svc.cluster.local"

const (
	loopback = "127.0.0.1"
	// nobody is the address that the API server of a cluster without nodes puts into the kubernetes Service.
	// Loopback is refused there, and any other of this machine may change or not exist. So it is one of RFC
	// 5737, which nobody has; with no pods, nobody contacts it.
	nobody              = "192.0.2.1"
	serviceRange        = "10.96.0.0/16"
	kubernetesServiceIP = "10.96.0.1" // the first of serviceRange, by Kubernetes' rule
)

const (
	// startTimeout bounds one start of a component. Each takes seconds; two cores that compile
	// something else meanwhile make it many.
	startTimeout = 2 * time.Minute
	// startTries bounds how often Start tries again when somebody took a port first, which is rare once.
	startTries = 3
)

// Config configures a cluster. Its zero value is good.
type Config struct {
	// Runs is the folder that the cluster's folder is made in. Default: run, in tools.CacheDir. What dead
	// owners left there is removed first.
	Runs string
	// Nodes is how many nodes to start with. Default: none, a control plane alone, which needs no root. To a
	// cluster with nodes more can be added.
	Nodes int
	// Progress gets a line when a program is being built, and one when a component ends unexpectedly.
	// Default: nobody is told.
	Progress io.Writer
	// APIServerFlags are added to the flags of kube-apiserver, and win over the same ones of ours.
	APIServerFlags []string
}

// A Cluster is a control plane that runs. Its methods can be called concurrently.
type Cluster struct {
	run      *process.Run
	host     process.Host // where the control plane runs
	ca       *authority
	admin    *rest.Config
	programs map[tools.Tool]string
	flags    []string // of kube-apiserver
	nodes    *nodes   // nil: it can have none

	mu        sync.Mutex
	apiServer *process.Process // nil while it is stopped; may have ended by itself
}

// programs are what a cluster runs.
func programs(nodes int) []tools.Tool {
	small := []tools.Tool{tools.Etcd, tools.KubeAPIServer, tools.KubeControllerManager}
	if nodes == 0 {
		return small
	}
	return append(small, tools.Node()...)
}

// Missing returns the programs that Start would have to build first for so many nodes, which takes minutes: a
// reason for a test to skip itself under -short.
func Missing(nodes int) []tools.Tool {
	var missing []tools.Tool
	for _, tool := range programs(nodes) {
		if !tools.Built(tool) {
			missing = append(missing, tool)
		}
	}
	return missing
}

// Start starts a cluster and returns when it is ready to be used: the API server is ready, pods can be made in
// the default namespace, and the nodes, if there are any, are ready to run them. It first ends what dead owners of clusters left. ctx bounds the start, not
// the cluster's life; the caller must Stop it. After a failure the logs are kept, and the error names the
// one that matters and shows its end.
func Start(ctx context.Context, config Config) (*Cluster, error) {
	if config.Progress == nil {
		config.Progress = io.Discard
	}
	if config.Runs == "" {
		var err error
		if config.Runs, err = defaultRuns(); err != nil {
			return nil, err
		}
	}
	if config.Nodes > 0 {
		if err := NodesPossible(); err != nil {
			return nil, fmt.Errorf("starting a cluster with nodes: %w", err)
		}
	}
	paths := make(map[tools.Tool]string)
	for _, tool := range programs(config.Nodes) {
		path, err := tools.Path(ctx, tool, config.Progress)
		if err != nil {
			return nil, err
		}
		paths[tool] = path
	}
	var err error
	for range startTries {
		var c *Cluster
		c, err = startOnce(ctx, config, paths)
		if err == nil {
			return c, nil
		}
		if !errors.Is(err, syscall.EADDRINUSE) {
			break
		}
	}
	return nil, fmt.Errorf("starting a cluster: %w", err)
}

func defaultRuns() (string, error) {
	cache, err := tools.CacheDir()
	return filepath.Join(cache, "run"), err
}

// startOnce tries it with one choice of port.
func startOnce(ctx context.Context, config Config, paths map[tools.Tool]string) (_ *Cluster, err error) {
	ca, err := newAuthority()
	if err != nil {
		return nil, err
	}
	run, err := process.Open(ctx, process.Config{
		Parent: config.Runs,
		Name:   "cluster",
		Report: func(err error) { _, _ = fmt.Fprintln(config.Progress, err) },
	})
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			if ctx.Err() == nil { // else nothing failed: the start was given up
				run.KeepLogs()
			}
			err = errors.Join(err, run.Close())
		}
	}()
	c := &Cluster{run: run, host: run.Loopback(), ca: ca, programs: paths}
	if config.Nodes > 0 {
		if c.nodes, err = newNodes(ctx, c); err != nil {
			return nil, err
		}
		c.host = c.nodes.hub()
	}
	port, err := process.FreePortOf(ctx, c.host)
	if err != nil {
		return nil, err
	}
	c.flags = append(c.apiServerFlags(port), config.APIServerFlags...)
	c.admin = &rest.Config{
		Host:            "https://" + net.JoinHostPort(c.host.Address(), strconv.Itoa(port)),
		TLSClientConfig: rest.TLSClientConfig{CAData: ca.pem},
		Dial:            c.host.Dial,
		QPS:             -1, // tests are not to wait for client-go's limit of 5 requests a second
	}
	if c.admin, err = c.User("admin", "system:masters"); err != nil {
		return nil, err
	}
	if err := c.writePKI(); err != nil {
		return nil, err
	}
	if err := writeKubeconfig(c.Kubeconfig(), c.admin); err != nil {
		return nil, err
	}
	if err := c.startComponents(ctx); err != nil {
		return nil, err
	}
	if c.nodes != nil {
		if err := c.nodes.start(ctx, config.Nodes); err != nil {
			return nil, err
		}
	}
	return c, nil
}

// etcdSocket is a socket in the components' working folder. No port can then be lost to somebody else, and
// nobody else reaches the data: the folder is its owner's alone. Relative, because the path of a socket may
// not be longer than about 100 bytes.
const (
	etcdSocket = "unix://etcd.sock"
	peerSocket = "unix://peer.sock" // etcd insists on one
)

func (c *Cluster) startComponents(ctx context.Context) error {
	// Not waited for: the API server waits itself.
	if _, err := c.start(tools.Etcd,
		"--data-dir="+filepath.Join(c.run.Dir(), "etcd"),
		"--listen-client-urls="+etcdSocket, "--advertise-client-urls="+etcdSocket,
		"--listen-peer-urls="+peerSocket, "--initial-advertise-peer-urls="+peerSocket,
		"--initial-cluster=default="+peerSocket,
		"--unsafe-no-fsync", // the data ends with the run
	); err != nil {
		return err
	}
	if err := c.StartAPIServer(ctx); err != nil {
		return err
	}
	manager, err := c.start(tools.KubeControllerManager,
		"--kubeconfig="+c.Kubeconfig(),
		"--secure-port=0",      // nobody asks for its metrics
		"--leader-elect=false", // it is alone
		"--service-account-private-key-file="+tokenPrivateFile,
		"--root-ca-file="+caFile,
		"--flex-volume-plugin-dir="+filepath.Join(c.run.Dir(), "volume-plugins"), // it makes the default, in /usr
		"--use-service-account-credentials",                                      // as clusters do: controllers have no more rights than they need
		// They request some 50 tokens at the start, which the default limit of 20 a second stretches to seconds.
		"--kube-api-qps=500", "--kube-api-burst=500",
	)
	if err != nil {
		return err
	}
	client, err := kubernetes.NewForConfig(c.Config())
	if err != nil {
		return fmt.Errorf("making a client: %w", err)
	}
	return c.await(ctx, manager, func(ctx context.Context) error {
		_, err := client.CoreV1().ServiceAccounts(metav1.NamespaceDefault).Get(ctx, "default", metav1.GetOptions{})
		return err //nolint:wrapcheck // WaitReady says what was waited for
	})
}

func (c *Cluster) apiServerFlags(port int) []string {
	advertised := nobody
	if c.nodes != nil {
		advertised = c.host.Address() // for pods
	}
	flags := []string{
		"--etcd-servers=" + etcdSocket,
		"--bind-address=" + c.host.Address(),
		"--secure-port=" + strconv.Itoa(port),
		"--advertise-address=" + advertised,
		"--external-hostname=" + c.host.Address(), // or the discovery document's jwks_uri has the advertised address
		"--tls-cert-file=" + serverCertFile,
		"--tls-private-key-file=" + serverKeyFile,
		"--client-ca-file=" + caFile,
		"--service-account-issuer=" + Issuer,
		"--service-account-key-file=" + tokenPublicFile,
		"--service-account-signing-key-file=" + tokenPrivateFile,
		"--service-cluster-ip-range=" + serviceRange,
		"--authorization-mode=Node,RBAC",
		"--enable-admission-plugins=NodeRestriction",
		"--allow-privileged",
	}
	if c.nodes == nil {
		return flags
	}
	return append(flags,
		"--kubelet-certificate-authority="+caFile,
		"--kubelet-client-certificate="+kubeletClientCertFile,
		"--kubelet-client-key="+kubeletClientKeyFile,
		"--kubelet-preferred-address-types=InternalIP", // names of nodes are in no DNS
		// Webhooks are called at their pods' addresses: there is no kube-proxy beside the API server.
		"--enable-aggregator-routing",
	)
}

// start starts a component, by the name of its program.
func (c *Cluster) start(tool tools.Tool, flags ...string) (*process.Process, error) {
	return c.host.Start(process.Command{Name: string(tool), Path: c.programs[tool], Args: flags})
}

func (c *Cluster) await(ctx context.Context, p *process.Process, probe func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	return p.WaitReady(ctx, probe)
}

// StartAPIServer starts the API server that StopAPIServer stopped or that has ended by itself, on the same
// port and with the same data, and returns when it is ready. It does nothing while one runs.
func (c *Cluster) StartAPIServer(ctx context.Context) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.apiServer != nil && !c.apiServer.Ended() {
		return nil
	}
	client, err := kubernetes.NewForConfig(c.Config())
	if err != nil {
		return fmt.Errorf("making a client: %w", err)
	}
	server, err := c.start(tools.KubeAPIServer, c.flags...)
	if err != nil {
		return err
	}
	if err := c.await(ctx, server, func(ctx context.Context) error {
		return client.CoreV1().RESTClient().Get().AbsPath("/readyz").Do(ctx).Error()
	}); err != nil {
		server.Stop(0)
		return err
	}
	c.apiServer = server
	return nil
}

// StopAPIServer takes the API server away, as if its machine had failed, and leaves all else running. Until
// StartAPIServer, connections to it are refused. It is killed: asked to end, it would wait a minute for those
// who watch.
func (c *Cluster) StopAPIServer() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.apiServer != nil {
		c.apiServer.Stop(0)
		c.apiServer = nil
	}
}

// Stop ends all components, and removes the cluster's folder. More calls do nothing.
func (c *Cluster) Stop() error {
	if err := c.run.Close(); err != nil { // kills: no data outlives the run, so there is nothing to save
		return fmt.Errorf("stopping the cluster: %w", err)
	}
	return nil
}

// Config returns a client configuration with all rights. It is the caller's own copy.
func (c *Cluster) Config() *rest.Config { return rest.CopyConfig(c.admin) }

// User returns a client configuration of a user who is in the groups and, of course, in
// system:authenticated. What the user may do is for RBAC to say.
func (c *Cluster) User(name string, groups ...string) (*rest.Config, error) {
	cert, key, err := c.ca.client(name, groups)
	if err != nil {
		return nil, err
	}
	config := rest.AnonymousClientConfig(c.admin)
	config.CertData, config.KeyData = cert, key
	return config, nil
}

// ServiceAccount returns a client configuration of a ServiceAccount that exists, with a token from the
// TokenRequest API, valid for an hour.
func (c *Cluster) ServiceAccount(ctx context.Context, namespace, name string) (*rest.Config, error) {
	client, err := kubernetes.NewForConfig(c.Config())
	if err != nil {
		return nil, fmt.Errorf("making a client: %w", err)
	}
	answer, err := client.CoreV1().ServiceAccounts(namespace).
		CreateToken(ctx, name, &authenticationv1.TokenRequest{}, metav1.CreateOptions{})
	if err != nil {
		return nil, fmt.Errorf("requesting a token of ServiceAccount %s/%s: %w", namespace, name, err)
	}
	config := rest.AnonymousClientConfig(c.admin)
	config.BearerToken = answer.Status.Token
	return config, nil
}

// Kubeconfig returns the path of a kubeconfig file with all rights.
func (c *Cluster) Kubeconfig() string { return filepath.Join(c.run.Dir(), kubeconfigFile) }

// writeKubeconfig writes a kubeconfig file for what config configures.
func writeKubeconfig(path string, config *rest.Config) error {
	const name = "credence"
	content, err := yaml.Marshal(clientcmdv1.Config{
		APIVersion: clientcmdv1.SchemeGroupVersion.Version,
		Kind:       "Config",
		Clusters: []clientcmdv1.NamedCluster{{Name: name, Cluster: clientcmdv1.Cluster{
			Server: config.Host, CertificateAuthorityData: config.CAData,
		}}},
		AuthInfos: []clientcmdv1.NamedAuthInfo{{Name: name, AuthInfo: clientcmdv1.AuthInfo{
			ClientCertificateData: config.CertData, ClientKeyData: config.KeyData,
		}}},
		Contexts:       []clientcmdv1.NamedContext{{Name: name, Context: clientcmdv1.Context{Cluster: name, AuthInfo: name}}},
		CurrentContext: name,
	})
	if err != nil {
		return fmt.Errorf("encoding the kubeconfig file: %w", err)
	}
	if err := os.WriteFile(path, content, 0o600); err != nil {
		return fmt.Errorf("writing the kubeconfig file: %w", err)
	}
	return nil
}

// Run returns the run that the components belong to. Other programs started in it share its folder, its
// logs and its end.
func (c *Cluster) Run() *process.Run { return c.run }

// Host returns where the control plane runs. Servers that pods are to reach run there too, or listen there.
func (c *Cluster) Host() process.Host { return c.host }

// Enter returns what a user types before a command that is to reach the API server, which for a cluster
// without nodes is nothing.
func (c *Cluster) Enter() []string {
	if m, ok := c.host.(interface{ PID() int }); ok {
		return []string{"nsenter", "--net=/proc/" + strconv.Itoa(m.PID()) + "/ns/net"}
	}
	return nil
}

// Command prepares a program that can reach the API server, such as kubectl, with the cluster's kubeconfig
// file in its environment. It is started with Host().Launch.
func (c *Cluster) Command(ctx context.Context, path string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, path, args...) //nolint:gosec // It runs what it is told.
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "HOME=" + c.run.Dir(), "KUBECONFIG=" + c.Kubeconfig()}
	return cmd
}

// Logs returns the folder of the components' logs.
func (c *Cluster) Logs() string { return c.run.Logs() }

// RunTests is the body of a TestMain whose tests share a cluster. It starts one, hands it to use, calls run,
// which is the Run of a testing.M, and stops the cluster. It returns the code to exit with. When tests have
// failed the logs are kept, and standard error says where. Under -short, call it only if Missing has nothing.
func RunTests(ctx context.Context, config Config, use func(*Cluster), run func() int) (code int) {
	c, err := Start(ctx, config)
	if err != nil {
		_, _ = fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer func() {
		if code != 0 {
			c.run.KeepLogs()
			_, _ = fmt.Fprintln(os.Stderr, "the cluster's logs are in", c.Logs())
		}
		if err := c.Stop(); err != nil {
			_, _ = fmt.Fprintln(os.Stderr, err)
			code = max(code, 1)
		}
	}()
	use(c)
	return run()
}

// Clean ends what dead owners of clusters left in the default folder, and removes kept logs. It returns the
// folders that it removed. Clusters whose owner is alive are not touched.
func Clean(ctx context.Context) ([]string, error) {
	runs, err := defaultRuns()
	if err != nil {
		return nil, err
	}
	return process.Sweep(ctx, runs, 0)
}
