//go:build unix && !linux

package main

// onNodes is never called: only Linux can have clusters with nodes.
func onNodes(d *demo) play { return onControlPlane(d) }
