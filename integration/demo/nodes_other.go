//go:build unix && !linux

package main

// onNodes is for Linux, and never called elsewhere: clusters cannot have nodes there.
func onNodes(d *demo) play { return onControlPlane(d) }
