package cluster

import (
	"encoding/json"
	"fmt"
	"path/filepath"

	"k8s.io/client-go/rest"
	"sigs.k8s.io/yaml"

	"github.com/credence-iam/credence/integration/tools"
)

// Files of a node, in its folder.
const (
	containerdFile      = "containerd.toml"
	kubeletFile         = "kubelet.yaml"
	kubeletCertFile     = "kubelet.crt"
	kubeletKeyFile      = "kubelet.key"
	proxyKubeconfigFile = "kube-proxy.kubeconfig"
	networkFile         = "cni/10-pods.conflist"
)

// writeFiles writes the files of the node's programs.
func (node *Node) writeFiles() error {
	c := node.nodes.cluster
	cert, key, err := c.ca.server(node.Name(), []string{node.Name()}, ips(node.Address(), c.families, node.address))
	if err != nil {
		return err
	}
	kubelet, err := yaml.Marshal(node.kubeletConfig())
	if err != nil {
		return fmt.Errorf("encoding the kubelet's configuration: %w", err)
	}
	network, err := json.Marshal(node.networkConfig())
	if err != nil {
		return fmt.Errorf("encoding the pod network's configuration: %w", err)
	}
	containerd, err := node.containerdConfig()
	if err != nil {
		return err
	}
	if err := writeFiles(node.folder, map[string][]byte{
		kubeletCertFile: cert, kubeletKeyFile: key,
		kubeletFile: kubelet, networkFile: network, containerdFile: []byte(containerd),
	}); err != nil {
		return err
	}
	for file, user := range map[string]struct {
		name   string
		groups []string
	}{
		kubeconfigFile:      {"system:node:" + node.Name(), []string{"system:nodes"}},
		proxyKubeconfigFile: {"system:kube-proxy", nil},
	} {
		var config *rest.Config
		if config, err = c.User(user.name, user.groups...); err != nil {
			return err
		}
		if err := writeKubeconfig(filepath.Join(node.folder, file), config); err != nil {
			return err
		}
	}
	return nil
}

// containerdConfig sets paths, and what a machine of namespaces needs.
func (node *Node) containerdConfig() (string, error) {
	runc, err := lookPath("runc")
	if err != nil {
		return "", fmt.Errorf("finding runc: %w", err)
	}
	c := node.nodes.cluster
	return fmt.Sprintf(`version = 3
root = %q
state = "/run/containerd"

[grpc]
  address = %q

[plugins."io.containerd.cri.v1.images"]
  snapshotter = "overlayfs"
  [plugins."io.containerd.cri.v1.images".pinned_images]
    sandbox = %q
  [plugins."io.containerd.cri.v1.images".registry]
    config_path = %q

[plugins."io.containerd.cri.v1.runtime"]
  # A profile would have to be loaded into the kernel.
  disable_apparmor = true
  # Without CAP_SYS_RESOURCE, as in some containers, a score can only increase.
  restrict_oom_score_adj = true
  [plugins."io.containerd.cri.v1.runtime".cni]
    bin_dirs = [%q, %q]
    conf_dir = %q
    use_internal_loopback = true
  [plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
    [plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc.options]
      SystemdCgroup = false
      BinaryName = %q

[plugins."io.containerd.nri.v1.nri"]
  disable = true

[plugins."io.containerd.internal.v1.opt"]
  path = %q
`,
		filepath.Join(node.folder, "containerd"), containerdSocket, pauseImage, filepath.Join(c.run.Dir(), certsFolder),
		filepath.Dir(c.programs[tools.CNIPtp]), filepath.Dir(c.programs[tools.CNIHostLocal]),
		filepath.Join(node.folder, filepath.Dir(networkFile)), runc, filepath.Join(node.folder, "opt")), nil
}

// networkConfig connects each pod to the node, which routes. With a bridge and without the kernel module br_netfilter,
// packets between two pods bypass iptables, and Services do not work.
func (node *Node) networkConfig() any {
	var ranges, routes []any
	for _, f := range node.nodes.cluster.families {
		ranges = append(ranges, []any{map[string]any{"subnet": f.podsOf(node.number).String()}})
		routes = append(routes, map[string]any{"dst": f.all})
	}
	return map[string]any{
		"cniVersion": "1.0.0",
		"name":       "pods",
		"plugins": []any{map[string]any{
			"type": "ptp",
			"ipam": map[string]any{
				"type":    "host-local",
				"dataDir": filepath.Join(node.folder, "addresses"),
				"ranges":  ranges,
				"routes":  routes,
			},
		}},
	}
}

// kubeletConfig returns a KubeletConfiguration with the values that are not the defaults.
func (node *Node) kubeletConfig() any {
	c := node.nodes.cluster
	ca := filepath.Join(c.run.Dir(), caFile)
	return map[string]any{
		"apiVersion":               "kubelet.config.k8s.io/v1beta1",
		"kind":                     "KubeletConfiguration",
		"containerRuntimeEndpoint": "unix://" + containerdSocket,
		"tlsCertFile":              filepath.Join(node.folder, kubeletCertFile),
		"tlsPrivateKeyFile":        filepath.Join(node.folder, kubeletKeyFile),
		"authentication":           map[string]any{"anonymous": map[string]any{"enabled": false}, "x509": map[string]any{"clientCAFile": ca}},
		"authorization":            map[string]any{"mode": "Webhook"},
		"clusterDomain":            "cluster.local",
		"clusterDNS":               []string{c.families[0].dns().String()},
		"resolvConf":               "", // the real machine's servers are unreachable
		"podLogsDir":               filepath.Join(c.run.Logs(), node.Name()+"-pods"),
		"registerWithTaints":       node.taints,
		"volumePluginDir":          "/var/lib/kubelet/volume-plugins", // the default is in /usr

		// All cgroups of the node are in one, which the run removes.
		"cgroupRoot":             node.cgroup,
		"cgroupDriver":           "cgroupfs", // with or without systemd
		"failCgroupV1":           false,
		"enforceNodeAllocatable": []string{},
		"failSwapOn":             false,

		// The real machine's disk may be nearly full. The node must not evict pods or remove images because of it.
		"localStorageCapacityIsolation": false,
		"evictionHard":                  map[string]string{"memory.available": "100Mi"},
		"imageGCHighThresholdPercent":   100,
		"imageGCLowThresholdPercent":    99,

		// The time until changed ConfigMaps and Secrets are in the volumes of pods. The default is a minute.
		"syncFrequency": "10s",
	}
}
