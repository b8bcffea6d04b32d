// Command coredns is the real CoreDNS with the plugins that serve a cluster's names, and without those for
// clouds, which are most of what the usual one is built from.
package main

import (
	"github.com/coredns/coredns/coremain"

	// Each registers itself.
	_ "github.com/coredns/coredns/plugin/bind"
	_ "github.com/coredns/coredns/plugin/errors"
	_ "github.com/coredns/coredns/plugin/kubernetes"
	_ "github.com/coredns/coredns/plugin/loadbalance"
	_ "github.com/coredns/coredns/plugin/ready"
)

func main() { coremain.Run() }
