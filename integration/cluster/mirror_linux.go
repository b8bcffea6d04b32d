package cluster

import (
	"errors"
	"fmt"
	"path/filepath"
)

// certsFolder has what the containerds of all nodes know of registries. They read it at each pull.
const certsFolder = "certs.d"

// Mirror makes all nodes, later ones too, pull the images of a registry such as ghcr.io from a server at url, and from
// nowhere else. url may have http, for a registry that a test runs.
func (c *Cluster) Mirror(registry, url string) error {
	if c.nodes == nil {
		return errors.New("mirroring a registry: the cluster was started without nodes")
	}
	hosts := fmt.Sprintf("server = %[1]q\n\n[host.%[1]q]\n  capabilities = [\"pull\", \"resolve\"]\n", url)
	return writeFiles(filepath.Join(c.run.Dir(), certsFolder, registry), map[string][]byte{"hosts.toml": []byte(hosts)})
}
