//go:build unix

package stack

import (
	"errors"
	"fmt"
	"os/exec"
	"runtime"
)

// emulators are the programs of qemu-user by architecture, and their names in distributions.
var emulators = map[string][]string{
	"amd64": {"qemu-x86_64-static", "qemu-x86_64"},
	"arm64": {"qemu-aarch64-static", "qemu-aarch64"},
}

// Emulator returns the path of the program that runs Linux programs for an architecture. It is empty if this machine runs
// them itself. The error says that no such program is installed.
func Emulator(architecture string) (path string, err error) {
	if architecture == runtime.GOARCH {
		return "", nil
	}
	if runtime.GOOS != "linux" || emulators[architecture] == nil {
		return "", fmt.Errorf("programs for %s cannot run on %s/%s", architecture, runtime.GOOS, runtime.GOARCH)
	}
	for _, name := range emulators[architecture] {
		if path, err = exec.LookPath(name); err == nil {
			return path, nil
		}
	}
	return "", errors.New("qemu-user is not installed; on Debian, run apt-get install qemu-user-static")
}

// command returns the path and the arguments that run the built program that an image would have at path.
func (s *Stack) command(path string, args []string) (string, []string) {
	if s.emulator == "" {
		return s.program(path), args
	}
	return s.emulator, append([]string{s.program(path)}, args...)
}
