// Command coredns is CoreDNS with the plugins that serve a cluster's names. It lacks those for clouds, which are most
// of the usual program.
package main

import (
	"github.com/coredns/coredns/coremain"

	// Each import registers a plugin.
	_ "github.com/coredns/coredns/plugin/bind"
	_ "github.com/coredns/coredns/plugin/errors"
	_ "github.com/coredns/coredns/plugin/kubernetes"
	_ "github.com/coredns/coredns/plugin/loadbalance"
	_ "github.com/coredns/coredns/plugin/ready"
)

func main() { coremain.Run() }
