//go:build unix && !linux

package process

import (
	"errors"
	"os/exec"
)

// start starts cmd. There is no parent-death signal here.
func start(cmd *exec.Cmd) error { return cmd.Start() }

// waitExited does not work here: waitid returns for a stopped child.
func waitExited(int) bool { return false }

// Only Linux has cgroups.
func makeCgroup(string) error   { return errors.New("cgroups need Linux") }
func removeCgroup(string) error { return nil }
func limitCPU(string, int) (string, error) {
	return "", errors.New("cgroups need Linux")
}

func limitMemory(string, int64) (*MemoryLimit, error) {
	return nil, errors.New("cgroups need Linux")
}
