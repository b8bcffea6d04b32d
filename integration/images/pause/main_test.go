//go:build linux

package main

import (
	"bufio"
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// pauses makes this test binary be the program.
const pauses = "CREDENCE_TEST_PAUSES"

func TestMain(m *testing.M) {
	if os.Getenv(pauses) != "" {
		main()
		return
	}
	os.Exit(m.Run())
}

// start starts the program as the parent of a process that ends by itself: a shell leaves one behind before it
// becomes the program. It returns the number of that process.
func start(t *testing.T) (pause *exec.Cmd, child string) {
	t.Helper()
	pause = exec.CommandContext(t.Context(), "sh", "-c", `sleep 0.2 & echo $!; exec "$0"`, os.Args[0])
	pause.Env = append(os.Environ(), pauses+"=1")
	output, err := pause.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := pause.Start(); err != nil {
		t.Fatal(err)
	}
	line, err := bufio.NewReader(output).ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	return pause, strings.TrimSpace(line)
}

func TestReapsAndEndsWhenAsked(t *testing.T) {
	for _, signal := range []syscall.Signal{syscall.SIGTERM, syscall.SIGINT} {
		t.Run(signal.String(), func(t *testing.T) {
			pause, child := start(t)
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			for {
				if _, err := os.Stat(filepath.Join("/proc", child)); os.IsNotExist(err) {
					break
				}
				if ctx.Err() != nil {
					t.Fatal("its child has ended, and nobody took the exit")
				}
				time.Sleep(10 * time.Millisecond)
			}
			if err := pause.Process.Signal(signal); err != nil {
				t.Fatal(err)
			}
			if err := pause.Wait(); err != nil {
				t.Errorf("after %v: %v", signal, err)
			}
		})
	}
}
