//go:build linux

// Command chroot runs a program of the node in a pod that mounts the node's root folder. An image of a single program has
// no shell for that.
//
//	chroot ROOT PROGRAM [ARGUMENT...]
package main

import (
	"errors"
	"fmt"
	"os"
	"syscall"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "chroot:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	if len(args) < 2 {
		return errors.New("usage: chroot ROOT PROGRAM [ARGUMENT...]")
	}
	if err := syscall.Chroot(args[0]); err != nil {
		return fmt.Errorf("changing the root to %s: %w", args[0], err)
	}
	if err := os.Chdir("/"); err != nil {
		return err
	}
	return fmt.Errorf("running %s: %w", args[1], syscall.Exec(args[1], args[1:], os.Environ())) //nolint:gosec // the test chooses the program
}
