package cluster

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"

	"github.com/credence-iam/credence/integration/cluster/machine"
	"github.com/credence-iam/credence/integration/images"
	"github.com/credence-iam/credence/integration/process"
	"github.com/credence-iam/credence/integration/tools"
)

// module is the module of the programs init and pause.
const module = "github.com/credence-iam/credence"

// pauseImage is the image of pods' sandboxes.
const pauseImage = "localhost/credence-pause:1"

// maxNodes keeps numbers in addresses below 256. Memory is exhausted earlier.
const maxNodes = 200

// fromSystem are the programs of this machine that a node uses, with their Debian packages.
var fromSystem = []struct{ program, debian string }{
	{"runc", "runc"}, {"iptables", "iptables"}, {"iptables-restore", "iptables"},
	{"ip6tables", "iptables"}, {"ip6tables-restore", "iptables"},
}

// NodesPossible returns nil if clusters can have nodes, and otherwise the cause.
func NodesPossible() error {
	if os.Geteuid() != 0 {
		return errors.New("nodes need root")
	}
	var missing []string
	for _, needed := range fromSystem {
		if _, err := lookPath(needed.program); err != nil && !slices.Contains(missing, needed.debian) {
			missing = append(missing, needed.debian)
		}
	}
	if len(missing) > 0 {
		return fmt.Errorf("nodes need %s; on Debian, run apt-get install %[1]s", strings.Join(missing, " "))
	}
	if _, err := os.Stat("/dev/kmsg"); err != nil {
		return fmt.Errorf("checking the kernel's log for the kubelet: %w", err)
	}
	if err := machine.Possible(); err != nil {
		return err
	}
	if err := process.CgroupsPossible(); err != nil {
		return err
	}
	runs, err := defaultRuns()
	if err != nil {
		return err
	}
	return checkDisk(runs)
}

// checkDisk refuses a folder of runs that cannot have the layers of containers: on an overlay, as in a container, or
// below a folder that each machine replaces by its own.
func checkDisk(runs string) error {
	const advice = "set XDG_CACHE_HOME to a folder on a disk"
	if err := os.MkdirAll(runs, 0o700); err != nil {
		return fmt.Errorf("making the folder of runs: %w", err)
	}
	real, err := filepath.EvalSymlinks(runs)
	if err != nil {
		return fmt.Errorf("resolving the folder of runs: %w", err)
	}
	for _, own := range []string{"/var/", "/run/", "/proc/"} {
		if strings.HasPrefix(real, own) {
			return fmt.Errorf("%s is below %s, which nodes replace by their own; %s", real, own, advice)
		}
	}
	var system unix.Statfs_t
	if err := unix.Statfs(real, &system); err != nil {
		return fmt.Errorf("checking the file system of %s: %w", real, err)
	}
	if system.Type == unix.OVERLAYFS_SUPER_MAGIC {
		return fmt.Errorf("%s is on an overlay, which cannot have another overlay; %s", real, advice)
	}
	return nil
}

// lookPath finds a program for root. After su, PATH can lack sbin.
func lookPath(program string) (string, error) {
	path, err := exec.LookPath(program)
	for _, dir := range []string{"/usr/sbin", "/sbin"} {
		if err != nil {
			path, err = exec.LookPath(filepath.Join(dir, program))
		}
	}
	return path, err //nolint:wrapcheck // it names the program
}

// nodes are the nodes of a cluster, and the control plane's machine, which is the switch of their network.
type nodes struct {
	cluster *Cluster
	init    string // path of the machines' first program
	control *machine.Machine

	mu       sync.Mutex
	running  []*Node
	made     int
	archives []string // of images for every node
}

// newNodes makes the control plane's machine.
func newNodes(ctx context.Context, c *Cluster) (*nodes, error) {
	n := &nodes{cluster: c, init: filepath.Join(c.run.Dir(), "bin", "init")}
	if err := images.Compile(ctx, module+"/integration/cluster/machine/init", runtime.GOARCH, n.init); err != nil {
		return nil, fmt.Errorf("building the machines' first program: %w", err)
	}
	pause, err := images.BuildLocal(ctx, filepath.Join(c.run.Dir(), "images"), pauseImage, module+"/integration/images/pause")
	if err != nil {
		return nil, fmt.Errorf("making the image of pods' sandboxes: %w", err)
	}
	n.archives = []string{pause.Path}
	if n.control, err = machine.Start(ctx, machine.Config{Run: c.run, Name: "control", Init: n.init}); err != nil {
		return nil, err
	}
	var addresses []netip.Prefix
	for _, f := range c.families {
		addresses = append(addresses, on(f.nodes, f.hub()))
	}
	return n, n.control.Network(addresses...)
}

func (n *nodes) hub() process.Host { return n.control }

// start starts kube-scheduler, DNS and the nodes.
func (n *nodes) start(ctx context.Context, count int) error {
	scheduler, err := n.cluster.start(tools.KubeScheduler,
		"--kubeconfig="+n.cluster.Kubeconfig(), "--secure-port=0", "--leader-elect=false",
		"--kube-api-qps=500", "--kube-api-burst=500",
	)
	if err != nil {
		return err
	}
	if err := n.startDNS(ctx); err != nil {
		return err
	}
	var starting sync.WaitGroup
	failed := make([]error, count)
	for i := range failed {
		starting.Go(func() { _, failed[i] = n.add(ctx) })
	}
	starting.Wait()
	if scheduler.Ended() {
		failed = append(failed, scheduler.Err())
	}
	return errors.Join(failed...)
}

// startDNS starts CoreDNS on the control plane's machine, and creates its Service.
func (n *nodes) startDNS(ctx context.Context) error {
	c, preferred := n.cluster, n.cluster.families[0]
	corefile := ".:53 {\n bind " + preferred.hub().String() + "\n errors\n ready 127.0.0.1:8181\n" +
		" kubernetes cluster.local in-addr.arpa ip6.arpa {\n  kubeconfig " + kubeconfigFile + "\n  pods insecure\n }\n}\n"
	if err := writeFiles(c.run.Dir(), map[string][]byte{"Corefile": []byte(corefile)}); err != nil {
		return err
	}
	dns, err := c.start(tools.CoreDNS, "-conf=Corefile")
	if err != nil {
		return err
	}
	if err := c.await(ctx, dns, responds(n.control, "http://127.0.0.1:8181/ready")); err != nil {
		return err
	}
	client, err := kubernetes.NewForConfig(c.Config())
	if err != nil {
		return fmt.Errorf("making a client: %w", err)
	}
	const name = "kube-dns" // as in every cluster
	udp, tcp, port := corev1.ProtocolUDP, corev1.ProtocolTCP, int32(53)
	names := []string{"dns", "dns-tcp"}
	if _, err := client.CoreV1().Services(metav1.NamespaceSystem).Create(ctx, &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Name: name},
		Spec: corev1.ServiceSpec{ClusterIP: preferred.dns().String(), Ports: []corev1.ServicePort{
			{Name: names[0], Port: port, Protocol: udp}, {Name: names[1], Port: port, Protocol: tcp},
		}},
	}, metav1.CreateOptions{}); err != nil {
		return fmt.Errorf("creating the Service of DNS: %w", err)
	}
	if _, err := client.DiscoveryV1().EndpointSlices(metav1.NamespaceSystem).Create(ctx, &discoveryv1.EndpointSlice{
		ObjectMeta:  metav1.ObjectMeta{Name: name, Labels: map[string]string{discoveryv1.LabelServiceName: name}},
		AddressType: discoveryv1.AddressType(preferred.name),
		Ports:       []discoveryv1.EndpointPort{{Name: &names[0], Port: &port, Protocol: &udp}, {Name: &names[1], Port: &port, Protocol: &tcp}},
		Endpoints:   []discoveryv1.Endpoint{{Addresses: []string{preferred.hub().String()}}},
	}, metav1.CreateOptions{}); err != nil {
		return fmt.Errorf("creating the endpoints of DNS: %w", err)
	}
	return nil
}

// responds returns a probe of a URL on a host.
func responds(host process.Host, url string) func(context.Context) error {
	client := &http.Client{Transport: &http.Transport{DialContext: host.Dial, DisableKeepAlives: true}}
	return func(ctx context.Context) error {
		request, err := http.NewRequestWithContext(ctx, http.MethodGet, url, http.NoBody)
		if err != nil {
			return fmt.Errorf("making a request: %w", err)
		}
		response, err := client.Do(request)
		if err != nil {
			return err //nolint:wrapcheck // it names the URL
		}
		if err := response.Body.Close(); err != nil {
			return fmt.Errorf("closing the response: %w", err)
		}
		if response.StatusCode != http.StatusOK {
			return fmt.Errorf("%s responds %s", url, response.Status)
		}
		return nil
	}
}

// Node runs pods. It stops with its cluster, or by Stop.
type Node struct {
	*machine.Machine

	nodes  *nodes
	number byte
	folder string // of its files
	cgroup string
	taints []corev1.Taint
}

// Nodes returns the running and starting nodes.
func (c *Cluster) Nodes() []*Node {
	if c.nodes == nil {
		return nil
	}
	c.nodes.mu.Lock()
	defer c.nodes.mu.Unlock()
	return slices.Clone(c.nodes.running)
}

// AddNode adds a node with taints to a cluster with nodes, and returns when it is ready.
func (c *Cluster) AddNode(ctx context.Context, taints ...corev1.Taint) (*Node, error) {
	if c.nodes == nil {
		return nil, errors.New("adding a node: the cluster was started without nodes")
	}
	return c.nodes.add(ctx, taints...)
}

func (n *nodes) add(ctx context.Context, taints ...corev1.Taint) (*Node, error) {
	node, archives, err := n.connect(ctx)
	if err != nil {
		return nil, fmt.Errorf("adding a node: %w", err)
	}
	node.taints = taints
	if err := node.start(ctx, archives); err != nil {
		node.Stop()
		return nil, fmt.Errorf("starting %s: %w", node.Name(), err)
	}
	return node, nil
}

// connect makes a node's machine, with routes to and from all other nodes.
func (n *nodes) connect(ctx context.Context) (node *Node, archives []string, err error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.made == maxNodes {
		return nil, nil, fmt.Errorf("the cluster has used all %d addresses for nodes", maxNodes)
	}
	n.made++
	number := byte(n.made) //nolint:gosec // at most maxNodes
	name := "node" + strconv.Itoa(n.made)
	node = &Node{nodes: n, number: number, folder: filepath.Join(n.cluster.run.Dir(), name)}
	if node.cgroup, err = n.cluster.run.Cgroup(name); err != nil {
		return nil, nil, err
	}
	if node.Machine, err = machine.Start(ctx, machine.Config{Run: n.cluster.run, Name: name, Init: n.init}); err != nil {
		return nil, nil, err
	}
	defer func() {
		if err != nil {
			node.Machine.Stop()
		}
	}()
	if err := n.cable(node); err != nil {
		return nil, nil, err
	}
	n.running = append(n.running, node)
	return node, slices.Clone(n.archives), nil
}

// cable connects a node's machine to the control plane's, and routes packets between their pods and those of all nodes.
func (n *nodes) cable(node *Node) error {
	var addresses []netip.Prefix
	var gateways []netip.Addr
	for _, f := range n.cluster.families {
		addresses, gateways = append(addresses, on(f.nodes, f.node(node.number))), append(gateways, f.hub())
	}
	if err := node.Join(n.control, addresses, gateways); err != nil {
		return err
	}
	var err error
	for _, f := range n.cluster.families {
		pods, address := f.podsOf(node.number), f.node(node.number)
		err = errors.Join(err, n.control.Route(pods, address))
		for _, other := range n.running {
			err = errors.Join(err, other.Route(pods, address), node.Route(f.podsOf(other.number), f.node(other.number)))
		}
	}
	return err
}

// address is the node's address of a family.
func (node *Node) address(f family) netip.Addr { return f.node(node.number) }

// Stop kills everything on the node, as if its power had failed. Its Node object stays.
func (node *Node) Stop() {
	node.nodes.mu.Lock()
	defer node.nodes.mu.Unlock()
	node.nodes.running = slices.DeleteFunc(node.nodes.running, func(n *Node) bool { return n == node })
	node.Machine.Stop()
}

// containerdSocket is a path in the machine.
const containerdSocket = "/run/containerd/containerd.sock"

func (node *Node) start(ctx context.Context, archives []string) error {
	c := node.nodes.cluster
	if err := node.writeFiles(); err != nil {
		return err
	}
	containerd, err := node.program(tools.Containerd, "--config="+filepath.Join(node.folder, containerdFile))
	if err != nil {
		return err
	}
	// The path of the machine's /run, seen from outside.
	socket := filepath.Join("/proc", strconv.Itoa(node.PID()), "root", containerdSocket)
	if err := c.await(ctx, containerd, func(ctx context.Context) error {
		conn, err := new(net.Dialer).DialContext(ctx, "unix", socket)
		if err != nil {
			return err //nolint:wrapcheck // WaitReady adds the component
		}
		return conn.Close() //nolint:wrapcheck // WaitReady adds the component
	}); err != nil {
		return err
	}
	for _, archive := range archives {
		if err := node.load(ctx, archive); err != nil {
			return err
		}
	}
	kubelet, err := node.program(tools.Kubelet,
		"--config="+filepath.Join(node.folder, kubeletFile), "--kubeconfig="+filepath.Join(node.folder, kubeconfigFile),
		"--hostname-override="+node.Name(), "--node-ip="+list(c.families, node.address), "--root-dir="+filepath.Join(node.folder, "kubelet"),
	)
	if err != nil {
		return err
	}
	proxy, err := node.program(tools.KubeProxy,
		"--kubeconfig="+filepath.Join(node.folder, proxyKubeconfigFile), "--hostname-override="+node.Name(),
		"--cluster-cidr="+list(c.families, family.podRange), "--proxy-mode=iptables",
		"--conntrack-max-per-core=0", // the setting is the kernel's, for all machines
	)
	if err != nil {
		return err
	}
	if err := c.await(ctx, proxy, responds(node, "http://127.0.0.1:10256/healthz")); err != nil {
		return err
	}
	client, err := kubernetes.NewForConfig(c.Config())
	if err != nil {
		return fmt.Errorf("making a client: %w", err)
	}
	return c.await(ctx, kubelet, func(ctx context.Context) error {
		object, err := client.CoreV1().Nodes().Get(ctx, node.Name(), metav1.GetOptions{})
		if err != nil {
			return err //nolint:wrapcheck // WaitReady adds the component
		}
		for _, condition := range object.Status.Conditions {
			if condition.Type == corev1.NodeReady && condition.Status == corev1.ConditionTrue {
				return nil
			}
			if condition.Type == corev1.NodeReady {
				err = errors.New(condition.Message)
			}
		}
		return errors.Join(errors.New("the node is not ready"), err)
	})
}

// program starts a program on the node.
func (node *Node) program(tool tools.Tool, args ...string) (*process.Process, error) {
	// containerd looks for the shim and for the system's programs in PATH.
	path := []string{filepath.Dir(node.nodes.cluster.programs[tools.ContainerdShim])}
	for _, needed := range fromSystem {
		found, err := lookPath(needed.program)
		if err != nil {
			return nil, fmt.Errorf("finding %s: %w", needed.program, err)
		}
		path = append(path, filepath.Dir(found))
	}
	return node.Start(process.Command{
		Name: node.Name() + "-" + string(tool), Path: node.nodes.cluster.programs[tool], Args: args,
		Env: []string{"PATH=" + strings.Join(append(path, "/usr/sbin", "/usr/bin", "/sbin", "/bin"), ":")},
	})
}

// LoadImage loads the image in an archive into all nodes, and into later ones: the archive must exist until Stop.
func (c *Cluster) LoadImage(ctx context.Context, archive string) error {
	if c.nodes == nil {
		return errors.New("loading an image: the cluster was started without nodes")
	}
	c.nodes.mu.Lock()
	c.nodes.archives = append(c.nodes.archives, archive)
	running := slices.Clone(c.nodes.running)
	c.nodes.mu.Unlock()
	for _, node := range running {
		if err := node.load(ctx, archive); err != nil {
			return err
		}
	}
	return nil
}

func (node *Node) load(ctx context.Context, archive string) error {
	if _, err := node.ctr(ctx, nil, "images", "import", archive); err != nil {
		return fmt.Errorf("loading the image %s: %w", archive, err)
	}
	return nil
}

// ctr runs containerd's client, in the kubelet's namespace.
func (node *Node) ctr(ctx context.Context, stdin io.Reader, args ...string) ([]byte, error) {
	args = append([]string{"--address=" + containerdSocket, "--namespace=k8s.io"}, args...)
	return node.Output(ctx, stdin, node.nodes.cluster.programs[tools.Ctr], args...)
}
