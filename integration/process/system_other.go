//go:build unix && !linux

package process

import (
	"errors"
	"os/exec"
	"strconv"
	"strings"
)

// start starts cmd. There is no parent-death signal here: if an owner dies without Close, its programs run until the
// next Open or Sweep.
func start(cmd *exec.Cmd) error { return cmd.Start() }

// waitExited does not work here: waitid returns for a stopped child.
func waitExited(int) bool { return false }

// started returns the start time of a process, to the second, and whether it is alive. A zombie is not alive.
func started(pid int) (at string, alive bool) {
	cmd := exec.Command("ps", "-o", "stat=,lstart=", "-p", strconv.Itoa(pid)) //nolint:gosec,noctx // it returns quickly
	cmd.Env = []string{"PATH=/bin:/usr/bin", "LC_ALL=C"}                      // one form of the date
	output, err := cmd.Output()
	state, at, _ := strings.Cut(strings.TrimSpace(string(output)), " ")
	if err != nil || state == "" || strings.HasPrefix(state, "Z") {
		return "", false
	}
	return strings.TrimSpace(at), true
}

// Only Linux has cgroups.
func makeCgroup(string) error   { return errors.New("cgroups need Linux") }
func removeCgroup(string) error { return nil }
func limitCPU(string, int) (string, error) {
	return "", errors.New("cgroups need Linux")
}

func limitMemory(string, int64) (*MemoryLimit, error) {
	return nil, errors.New("cgroups need Linux")
}
