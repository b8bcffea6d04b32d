//go:build unix

package cluster

import (
	"fmt"
	"strconv"

	"k8s.io/client-go/discovery"
)

// Minor returns the minor version of the API server, such as 30. KUBERNETES in the environment chooses it. A test of
// something that older versions lack asks it, and logs what it leaves out.
func (c *Cluster) Minor() (int, error) {
	client, err := discovery.NewDiscoveryClientForConfig(c.Config())
	if err != nil {
		return 0, fmt.Errorf("making a client: %w", err)
	}
	version, err := client.ServerVersion()
	if err != nil {
		return 0, fmt.Errorf("reading the API server's version: %w", err)
	}
	return strconv.Atoi(version.Minor) //nolint:wrapcheck // has the value
}
