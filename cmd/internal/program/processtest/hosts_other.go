//go:build !linux

package processtest

import "syscall"

func mountNamespace() *syscall.SysProcAttr { return nil }

func useHosts(string) error { return nil }
