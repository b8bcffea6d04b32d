package process

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// hierarchies returns the mount points of cgroup hierarchies: one with version 2 alone, and with version 1 one for each
// controller.
func hierarchies() ([]string, error) {
	mounts, err := os.Open("/proc/self/mounts")
	if err != nil {
		return nil, fmt.Errorf("looking for cgroups: %w", err)
	}
	defer func() { _ = mounts.Close() }()
	var roots []string
	for lines := bufio.NewScanner(mounts); lines.Scan(); {
		// fstab(5): device, mount point, type.
		fields := strings.Fields(lines.Text())
		if len(fields) >= 3 && (fields[2] == "cgroup" || fields[2] == "cgroup2") && !slices.Contains(roots, fields[1]) {
			roots = append(roots, fields[1])
		}
	}
	if len(roots) == 0 {
		return nil, errors.New("no cgroup hierarchy is mounted")
	}
	return roots, nil
}

// controllers are those that a kubelet uses. In version 2 a cgroup has those that its parent enables for it.
var controllers = []string{"cpu", "cpuset", "io", "memory", "pids", "hugetlb"}

func makeCgroup(path string) error {
	roots, err := hierarchies()
	if err != nil {
		return err
	}
	for _, root := range roots {
		dir := filepath.Join(root, path)
		enabled := filepath.Join(filepath.Dir(dir), "cgroup.subtree_control")
		for _, controller := range controllers {
			// This fails if the kernel lacks the controller, and in version 1, which lacks the file.
			_ = os.WriteFile(enabled, []byte("+"+controller), 0)
		}
		if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, fs.ErrExist) { //nolint:gosec // the usual mode of cgroups
			return fmt.Errorf("making a cgroup: %w", err)
		}
		if len(roots) == 1 { // version 2 alone has all controllers
			if err := checkControllers(dir); err != nil {
				return err
			}
		}
	}
	return nil
}

// cpuPeriod is a kubelet's period, in microseconds.
const cpuPeriod = 100_000

// limitCPU sets a quota in the hierarchy with the controller cpu.
func limitCPU(path string, milliCPUs int) (procs string, err error) {
	roots, err := hierarchies()
	if err != nil {
		return "", err
	}
	quota := milliCPUs * cpuPeriod / 1000
	for _, root := range roots {
		dir := filepath.Join(root, path)
		for _, set := range [][]struct{ file, value string }{
			{{"cpu.max", fmt.Sprintf("%d %d", quota, cpuPeriod)}},                                       // version 2
			{{"cpu.cfs_period_us", strconv.Itoa(cpuPeriod)}, {"cpu.cfs_quota_us", strconv.Itoa(quota)}}, // version 1
		} {
			if _, err := os.Stat(filepath.Join(dir, set[0].file)); err != nil {
				continue
			}
			for _, s := range set {
				if err := os.WriteFile(filepath.Join(dir, s.file), []byte(s.value), 0); err != nil {
					return "", fmt.Errorf("limiting the CPU of a cgroup: %w", err)
				}
			}
			return filepath.Join(dir, "cgroup.procs"), nil
		}
	}
	return "", errors.New("limiting the CPU of a cgroup: no hierarchy has the controller cpu")
}

// limitMemory sets a limit in the hierarchy with the controller memory.
func limitMemory(path string, bytes int64) (*MemoryLimit, error) {
	roots, err := hierarchies()
	if err != nil {
		return nil, err
	}
	for _, root := range roots {
		dir := filepath.Join(root, path)
		for _, version := range []struct{ limit, swap, noSwap, peak string }{
			{"memory.max", "memory.swap.max", "0", "memory.peak"},
			// Version 1 limits the sum of memory and swap, after memory alone.
			{"memory.limit_in_bytes", "memory.memsw.limit_in_bytes", strconv.FormatInt(bytes, 10), "memory.max_usage_in_bytes"},
		} {
			if _, err := os.Stat(filepath.Join(dir, version.limit)); err != nil {
				continue
			}
			if err := os.WriteFile(filepath.Join(dir, version.limit), []byte(strconv.FormatInt(bytes, 10)), 0); err != nil {
				return nil, fmt.Errorf("limiting the memory of a cgroup: %w", err)
			}
			// This fails if the kernel does not count swap, which cluster machines do not have.
			_ = os.WriteFile(filepath.Join(dir, version.swap), []byte(version.noSwap), 0)
			return &MemoryLimit{dir: dir, peak: version.peak}, nil
		}
	}
	return nil, errors.New("limiting the memory of a cgroup: no hierarchy has the controller memory")
}

// needed are the controllers that a kubelet cannot start without.
var needed = []string{"cpu", "cpuset", "memory", "pids"}

func checkControllers(dir string) error {
	content, err := os.ReadFile(filepath.Join(dir, "cgroup.controllers"))
	if err != nil {
		return fmt.Errorf("looking for controllers: %w", err)
	}
	has := strings.Fields(string(content))
	for _, controller := range needed {
		if !slices.Contains(has, controller) {
			return fmt.Errorf("the cgroup %s lacks the controller %s: its parent does not enable it, as in a container with processes in its root cgroup", dir, controller)
		}
	}
	return nil
}

// removeCgroup kills all processes in the cgroup and below it, and removes it from every hierarchy.
func removeCgroup(name string) error {
	roots, err := hierarchies()
	if err != nil {
		return err
	}
	for _, root := range roots {
		err = errors.Join(err, emptyAndRemove(filepath.Join(root, name)))
	}
	return err
}

func emptyAndRemove(top string) error {
	deadline := time.Now().Add(killTimeout)
	for {
		err := removeTree(top)
		if err == nil || !errors.Is(err, syscall.EBUSY) || time.Now().After(deadline) {
			return err
		}
		time.Sleep(10 * time.Millisecond) // killed processes need a moment
	}
}

// removeTree kills all processes in a cgroup and below it, and removes it, children first. It fails with EBUSY until they
// have exited.
func removeTree(dir string) error {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("removing a cgroup: %w", err)
	}
	for _, entry := range entries {
		if entry.IsDir() {
			if err := removeTree(filepath.Join(dir, entry.Name())); err != nil {
				return err
			}
		}
	}
	inside, err := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, syscall.ENODEV) {
		return fmt.Errorf("removing a cgroup: %w", err)
	}
	for number := range strings.FieldsSeq(string(inside)) {
		if pid, err := strconv.Atoi(number); err == nil && pid > 0 {
			_ = syscall.Kill(pid, syscall.SIGKILL) // an error means that it has exited
		}
	}
	if err := syscall.Rmdir(dir); err != nil && !errors.Is(err, syscall.ENOENT) {
		return fmt.Errorf("removing the cgroup %s: %w", dir, err)
	}
	return nil
}
