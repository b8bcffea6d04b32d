//go:build unix

// Package cluster runs a real Kubernetes for tests and the demonstration. There are two kinds.
//
// A control plane is etcd, kube-apiserver and kube-controller-manager as child processes on the loopback address,
// without root. It has admission with webhooks and policies, RBAC, ServiceAccount tokens, informers and garbage
// collection. It has no nodes: pods can be created but do not run.
//
// A cluster with nodes also has kube-scheduler and DNS, and on each node kubelet, containerd, runc, kube-proxy and a pod
// network: pods run. It needs root on Linux. The control plane and every node are machines of package machine. Their
// networks can be reached only through the cluster's Host and its client configurations.
//
// A cluster leaves nothing behind, even if a test panics or its owner is killed; see package process. Any number of
// clusters run side by side. Package tools builds the programs on first use.
package cluster

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"syscall"
	"testing"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	clientcmdv1 "k8s.io/client-go/tools/clientcmd/api/v1"
	"sigs.k8s.io/yaml"

	"github.com/credence-iam/credence/integration/process"
	"github.com/credence-iam/credence/integration/tools"
)

// Issuer is the iss claim of ServiceAccount tokens, as in most clusters.
const Issuer = "https://kubernetes.default.svc.cluster.local"

const (
	// startTimeout limits the start of a component. It takes seconds, and many on two cores that compile meanwhile.
	startTimeout = 2 * time.Minute
	// startTries limits how often Start tries: another process may take the port first, which is rare.
	startTries = 3
)

// Config configures a cluster. Its zero value is valid.
type Config struct {
	// Runs is the folder of clusters. Default: run, in tools.CacheDir. Start removes clusters of dead owners there.
	Runs string
	// Nodes is the number of nodes at the start. Default: a control plane, which never has nodes.
	Nodes int
	// IPFamilies are the families of pods, Services and nodes: one or both, the preferred one first. Without nodes, only
	// Services have them. Default: IPv4.
	IPFamilies []corev1.IPFamily
	// Progress gets lines while programs are built, and one if a component exits unexpectedly. Default: none.
	Progress io.Writer
	// APIServerFlags are added to the flags of kube-apiserver, and override them.
	APIServerFlags []string
}

// Cluster is a running Kubernetes. Its methods can be called concurrently.
type Cluster struct {
	run      *process.Run
	families []family
	host     process.Host // of the control plane
	ca       *authority
	admin    *rest.Config
	programs map[tools.Tool]string
	flags    []string // of kube-apiserver
	nodes    *nodes   // nil: a control plane

	mu        sync.Mutex
	apiServer *process.Process // nil if stopped; may have exited by itself
}

// programs returns the programs of a cluster.
func programs(nodes int) []tools.Tool {
	small := []tools.Tool{tools.Etcd, tools.KubeAPIServer, tools.KubeControllerManager}
	if nodes == 0 {
		return small
	}
	return append(small, tools.Node()...)
}

// Missing returns the programs that Start has to build first, which takes minutes. A test can skip itself then under
// -short.
func Missing(nodes int) []tools.Tool {
	var missing []tools.Tool
	for _, tool := range programs(nodes) {
		if !tools.Built(tool) {
			missing = append(missing, tool)
		}
	}
	return missing
}

// Start starts a cluster and returns when it is ready: pods can be created in the default namespace, and the nodes can
// run them. It first removes clusters of dead owners. ctx limits only the start; the caller must Stop the cluster. After
// a failure the logs are kept, and the error has the end of the log with the cause.
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
	used, err := familiesOf(config.IPFamilies)
	if err != nil {
		return nil, fmt.Errorf("starting a cluster: %w", err)
	}
	paths, err := tools.Paths(ctx, programs(config.Nodes), config.Progress)
	if err != nil {
		return nil, err
	}
	for range startTries {
		var c *Cluster
		c, err = startOnce(ctx, config, used, paths)
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

// startOnce tries one port.
func startOnce(ctx context.Context, config Config, used []family, paths map[tools.Tool]string) (_ *Cluster, err error) {
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
			if ctx.Err() == nil { // otherwise the caller gave up
				run.KeepLogs()
			}
			err = errors.Join(err, run.Close())
		}
	}()
	c := &Cluster{run: run, families: used, host: run.Loopback(), ca: ca, programs: paths}
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
		QPS:             -1, // client-go's limit of 5 requests a second delays tests
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

// etcdSocket is a socket in the components' working folder: it needs no free port, and only the owner of the folder can
// read the data. It is relative because the path of a socket is limited to about 100 bytes. etcd before 3.6 wants a port
// in each address; it becomes a part of the file's name.
const (
	etcdSocket = "unix://etcd.sock:0"
	peerSocket = "unix://peer.sock:0" // etcd needs one
)

func (c *Cluster) startComponents(ctx context.Context) error {
	// The API server waits for etcd.
	if _, err := c.start(tools.Etcd,
		"--data-dir="+filepath.Join(c.run.Dir(), "etcd"),
		"--listen-client-urls="+etcdSocket, "--advertise-client-urls="+etcdSocket,
		"--listen-peer-urls="+peerSocket, "--initial-advertise-peer-urls="+peerSocket,
		"--initial-cluster=default="+peerSocket,
		"--unsafe-no-fsync", // the data is lost with the run
	); err != nil {
		return err
	}
	if err := c.StartAPIServer(ctx); err != nil {
		return err
	}
	manager, err := c.start(tools.KubeControllerManager,
		"--kubeconfig="+c.Kubeconfig(),
		"--secure-port=0",      // no metrics are needed
		"--leader-elect=false", // there is only one
		"--service-account-private-key-file="+tokenPrivateFile,
		"--root-ca-file="+caFile,
		"--flex-volume-plugin-dir="+filepath.Join(c.run.Dir(), "volume-plugins"), // the default is in /usr
		"--use-service-account-credentials",                                      // as usual: each controller has the rights that it needs
		// Controllers request some 50 tokens at the start, which takes seconds with the default limit of 20 a second.
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
		return err //nolint:wrapcheck // WaitReady adds the component
	})
}

func (c *Cluster) apiServerFlags(port int) []string {
	advertised := c.families[0].unused.String()
	if c.nodes != nil {
		advertised = c.host.Address() // for pods
	}
	flags := []string{
		"--etcd-servers=" + etcdSocket,
		"--bind-address=" + c.host.Address(),
		"--secure-port=" + strconv.Itoa(port),
		"--advertise-address=" + advertised,
		"--external-hostname=" + c.host.Address(), // otherwise jwks_uri in the discovery document has the advertised address
		"--tls-cert-file=" + serverCertFile,
		"--tls-private-key-file=" + serverKeyFile,
		"--client-ca-file=" + caFile,
		"--service-account-issuer=" + Issuer,
		"--service-account-key-file=" + tokenPublicFile,
		"--service-account-signing-key-file=" + tokenPrivateFile,
		"--service-cluster-ip-range=" + list(c.families, family.serviceRange),
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
		"--kubelet-preferred-address-types=InternalIP", // no DNS has the names of nodes
		// The API server calls webhooks at their pods' addresses, because its machine has no kube-proxy.
		"--enable-aggregator-routing",
	)
}

// start starts a component under the name of its program.
func (c *Cluster) start(tool tools.Tool, flags ...string) (*process.Process, error) {
	return c.host.Start(process.Command{Name: string(tool), Path: c.programs[tool], Args: flags})
}

func (c *Cluster) await(ctx context.Context, p *process.Process, probe func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	return p.WaitReady(ctx, probe)
}

// StartAPIServer starts a stopped or exited API server on the same port, with the same data, and returns when it is
// ready. It does nothing if the API server runs.
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

// StopAPIServer kills the API server, as if its machine had failed. Connections to it are refused until StartAPIServer.
// The other components continue. After SIGTERM, the API server would wait a minute for watches.
func (c *Cluster) StopAPIServer() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.apiServer != nil {
		c.apiServer.Stop(0)
		c.apiServer = nil
	}
}

// Stop kills all components and removes the cluster's folder. A second call does nothing.
func (c *Cluster) Stop() error {
	if err := c.run.Close(); err != nil {
		return fmt.Errorf("stopping the cluster: %w", err)
	}
	return nil
}

// Config returns a copy of the client configuration with all rights.
func (c *Cluster) Config() *rest.Config { return rest.CopyConfig(c.admin) }

// User returns a client configuration of a user in the groups and in system:authenticated, with rights by RBAC.
func (c *Cluster) User(name string, groups ...string) (*rest.Config, error) {
	cert, key, err := c.ca.client(name, groups)
	if err != nil {
		return nil, err
	}
	config := rest.AnonymousClientConfig(c.admin)
	config.CertData, config.KeyData = cert, key
	return config, nil
}

// ServiceAccount returns a client configuration of an existing ServiceAccount, with a token from the TokenRequest API
// that is valid for an hour.
func (c *Cluster) ServiceAccount(ctx context.Context, namespace, name string) (*rest.Config, error) {
	client, err := kubernetes.NewForConfig(c.Config())
	if err != nil {
		return nil, fmt.Errorf("making a client: %w", err)
	}
	response, err := client.CoreV1().ServiceAccounts(namespace).
		CreateToken(ctx, name, &authenticationv1.TokenRequest{}, metav1.CreateOptions{})
	if err != nil {
		return nil, fmt.Errorf("requesting a token of ServiceAccount %s/%s: %w", namespace, name, err)
	}
	config := rest.AnonymousClientConfig(c.admin)
	config.BearerToken = response.Status.Token
	return config, nil
}

// Kubeconfig returns the path of a kubeconfig file with all rights.
func (c *Cluster) Kubeconfig() string { return filepath.Join(c.run.Dir(), kubeconfigFile) }

// writeKubeconfig writes a kubeconfig file with the settings of config.
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

// Run returns the run of the components. Other programs can be started in it.
func (c *Cluster) Run() *process.Run { return c.run }

// Host returns the host of the control plane. Servers for pods must run or listen there.
func (c *Cluster) Host() process.Host { return c.host }

// Enter returns the command that a user must put before a command that calls the API server. It is empty without nodes.
func (c *Cluster) Enter() []string {
	if m, ok := c.host.(interface{ PID() int }); ok {
		return []string{"nsenter", "--net=/proc/" + strconv.Itoa(m.PID()) + "/ns/net"}
	}
	return nil
}

// Command prepares a program that calls the API server, such as kubectl, with the cluster's kubeconfig file in its
// environment. Start it with Host().Launch.
func (c *Cluster) Command(ctx context.Context, path string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, path, args...) //nolint:gosec // the caller's program
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "HOME=" + c.run.Dir(), "KUBECONFIG=" + c.Kubeconfig()}
	return cmd
}

// Logs returns the folder of the components' logs.
func (c *Cluster) Logs() string { return c.run.Logs() }

// RunTests is the body of a TestMain whose tests share a cluster, and returns the exit code. It starts the cluster, passes
// it to setUp, calls run, which is the Run of a testing.M, and stops the cluster. The context of setUp ends after that. If
// setUp or a test fails, RunTests keeps the logs and prints their folder.
//
// Under -short it skips the tests if a program of the cluster or one of needed is not built, because building takes minutes.
func RunTests(config Config, setUp func(context.Context, *Cluster) error, run func() int, needed ...tools.Tool) (code int) {
	flag.Parse()
	missing := slices.DeleteFunc(needed, tools.Built)
	if missing = append(missing, Missing(config.Nodes)...); testing.Short() && len(missing) > 0 {
		fmt.Printf("SKIP: -short, and %v are not built (go run ./integration/tools/install)\n", missing)
		return 0
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
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
	if err := setUp(ctx, c); err != nil {
		_, _ = fmt.Fprintln(os.Stderr, "setting up:", err)
		return 1
	}
	return run()
}

// Clean removes clusters of dead owners in the default folder, and kept logs. It returns the removed folders. It does
// not touch clusters of live owners.
func Clean(ctx context.Context) ([]string, error) {
	runs, err := defaultRuns()
	if err != nil {
		return nil, err
	}
	return process.Sweep(ctx, runs, 0)
}
