package program

import (
	"math"
	"os"
	"path/filepath"
	"runtime/debug"
	"strconv"
	"strings"
)

// LimitMemory makes the garbage collector keep the process below nine tenths of its cgroup's memory limit. By default,
// the heap grows to twice the memory in use, so a process that uses half of its limit would reach the limit. Without a
// cgroup or a limit, or if the environment has GOMEMLIMIT, LimitMemory changes nothing.
func LimitMemory() {
	if os.Getenv("GOMEMLIMIT") != "" {
		return
	}
	if limit := cgroupMemory("/proc/self/cgroup", "/sys/fs/cgroup"); limit > 0 {
		debug.SetMemoryLimit(limit / 10 * 9)
	}
}

// cgroupMemory returns the memory limit of the cgroup that the file self names, in bytes; 0 if there is none. Lines of
// that file are HIERARCHY:CONTROLLERS:PATH, see cgroups(7). In a container, PATH is often / and the limit is in root.
func cgroupMemory(self, root string) int64 {
	text, err := os.ReadFile(self) //nolint:gosec // The kernel provides the file.
	if err != nil {
		return 0
	}
	limit := int64(math.MaxInt64)
	for line := range strings.Lines(string(text)) {
		fields := strings.SplitN(strings.TrimSpace(line), ":", 3)
		if len(fields) != 3 {
			continue
		}
		folder, file := filepath.Join(root, fields[2]), "memory.max" // version 2
		switch {
		case fields[0] == "0" && fields[1] == "":
		case fields[1] == "memory": // version 1
			folder, file = filepath.Join(root, "memory", fields[2]), "memory.limit_in_bytes"
		default:
			continue
		}
		for _, at := range []string{folder, strings.TrimSuffix(folder, fields[2])} {
			text, err := os.ReadFile(filepath.Join(at, file)) //nolint:gosec // The kernel provides the file.
			if err != nil {
				continue
			}
			if n, err := strconv.ParseInt(strings.TrimSpace(string(text)), 10, 64); err == nil && n > 0 {
				limit = min(limit, n)
			}
			break
		}
	}
	// In version 1, a number near the greatest one means no limit.
	if limit >= 1<<60 {
		return 0
	}
	return limit
}
