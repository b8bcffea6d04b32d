//go:build unix

package process

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
)

// Cgroup creates a cgroup of the run, in every hierarchy of this machine, and returns its absolute path below their
// roots. It is empty: programs enter it by themselves. Close and a sweep kill all processes in it, and remove it. It
// needs Linux and root.
func (r *Run) Cgroup(name string) (string, error) {
	top := cgroupOf(r.dir)
	// The marker comes first: a missing cgroup needs no removal, but an existing one does.
	if err := os.WriteFile(filepath.Join(r.dir, cgroupMarker), nil, 0o600); err != nil {
		return "", fmt.Errorf("recording the cgroup: %w", err)
	}
	path := filepath.Join(top, name)
	return path, errors.Join(makeCgroup(top), makeCgroup(path))
}

// CPULimit creates a cgroup with a CPU limit, in thousandths of a CPU, as a kubelet does: a quota for each 100 ms. It
// returns the file that takes the number of a process to limit.
func (r *Run) CPULimit(name string, milliCPUs int) (procs string, err error) {
	path, err := r.Cgroup(name)
	if err != nil {
		return "", err
	}
	return limitCPU(path, milliCPUs)
}

// MemoryLimit creates a cgroup with a memory limit, in bytes, and without swap. The kernel kills a process that exceeds
// it. Page cache counts, as in a container.
func (r *Run) MemoryLimit(name string, bytes int64) (*MemoryLimit, error) {
	path, err := r.Cgroup(name)
	if err != nil {
		return nil, err
	}
	return limitMemory(path, bytes)
}

// MemoryLimit is a cgroup with a memory limit.
type MemoryLimit struct {
	dir, peak string
}

// Procs returns the file that takes the number of a process to limit.
func (m *MemoryLimit) Procs() string { return filepath.Join(m.dir, "cgroup.procs") }

// Peak returns the maximum memory that the cgroup has used, in bytes.
func (m *MemoryLimit) Peak() (int64, error) {
	text, err := os.ReadFile(filepath.Join(m.dir, m.peak))
	if err != nil {
		return 0, fmt.Errorf("reading the memory peak of a cgroup: %w", err)
	}
	peak, err := strconv.ParseInt(string(bytes.TrimSpace(text)), 10, 64)
	if err != nil {
		return 0, fmt.Errorf("reading the memory peak of a cgroup: %w", err)
	}
	return peak, nil
}

// cgroupOf returns the cgroup of the run in dir.
func cgroupOf(dir string) string { return "/credence-" + filepath.Base(dir) }

// CgroupsPossible returns nil if [Run.Cgroup] works, with the controllers that a kubelet needs, and otherwise the cause.
func CgroupsPossible() error {
	name := fmt.Sprintf("/credence-probe-%d", os.Getpid())
	return errors.Join(makeCgroup(name), removeCgroup(name))
}
