//go:build unix

// Command pause holds a pod's namespaces open and does nothing else: it is the sandbox container of the
// clusters that tests start, where no registry serves the usual one.
//
// It ends at once on SIGTERM or SIGINT. In a pod whose containers share their processes it is process 1, and
// takes the exit of those that have lost their parent, which would stay in the table of processes otherwise.
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

// reap takes the exits of all children that have ended. Several may stand behind one signal.
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
