//go:build unix

// Command pause keeps the namespaces of a pod open and does nothing else. It is the sandbox container in test clusters,
// where no registry has the usual one.
//
// It exits immediately on SIGTERM or SIGINT. In a pod with a shared process namespace it is process 1: it reaps orphaned
// processes, which would otherwise stay in the process table.
package main

import (
	"os"
	"os/signal"
	"syscall"
)

func main() {
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGINT, syscall.SIGCHLD)
	for {
		reap()
		if <-signals != syscall.SIGCHLD {
			return
		}
	}
}

// reap waits for all exited children. One signal can stand for several.
func reap() {
	for {
		pid, err := syscall.Wait4(-1, nil, syscall.WNOHANG, nil)
		if err == syscall.EINTR {
			continue
		}
		if pid <= 0 {
			return
		}
	}
}
