//go:build unix && !linux

package main

import "github.com/credence-iam/credence/integration/tools"

// onNodes and inTwoParts are never called: only Linux can have clusters with nodes.
func onNodes(d *demo, _ []tools.Tool) play { return onControlPlane(d) }

func inTwoParts(d *demo, _ []tools.Tool) play { return onControlPlane(d) }
