//go:build unix && !linux

package process

import (
	"errors"
	"os/exec"
	"strconv"
	"strings"
)

// start starts cmd. There is no parent-death signal here: what an owner leaves that dies without Close runs
// on until the next Open or Sweep.
func start(cmd *exec.Cmd) error { return cmd.Start() }

// waitExited can't be had here: waitid returns for a child that is merely stopped.
func waitExited(int) bool { return false }

// started returns when the process started, to the second. It is not alive if there is none of that number,
// or if it is a zombie.
func started(pid int) (at string, alive bool) {
	cmd := exec.Command("ps", "-o", "stat=,lstart=", "-p", strconv.Itoa(pid)) //nolint:gosec,noctx // it answers at once
	cmd.Env = []string{"PATH=/bin:/usr/bin", "LC_ALL=C"}                      // a date must read the same each time
	output, err := cmd.Output()
	state, at, _ := strings.Cut(strings.TrimSpace(string(output)), " ")
	if err != nil || state == "" || strings.HasPrefix(state, "Z") {
		return "", false
	}
	return strings.TrimSpace(at), true
}

// There are no cgroups here.
func makeCgroup(string) error   { return errors.New("cgroups are Linux's") }
func removeCgroup(string) error { return nil }
func limitCPU(string, int) (string, error) {
	return "", errors.New("cgroups are Linux's")
}

func limitMemory(string, int64) (*MemoryLimit, error) {
	return nil, errors.New("cgroups are Linux's")
}
