package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/credence-iam/credence/cmd/internal/program/processtest"
	"github.com/credence-iam/credence/sidecar/contract"
)

const (
	// patient clients connect first, and keep their connections open as long as the sidecar permits.
	patient = 128
	// Every fourth client sends wordy header fields, nearly as many as a header has room for, and far more than a request
	// may have. Another fourth sends as much as a request may have: fat fields of fatSize bytes.
	wordy, fat, fatSize = 1_800, 55, 140
	// silence is after which time the sidecar closes a connection without a request. If the kernel's queue is full, it
	// makes clients resend after ever longer pauses, and on a loaded machine clients also write late. They retry, as
	// SDKs do, but not after a reset that comes earlier.
	silence = 2 * time.Second
	// maxResets is how often one client may retry. It only ends the test if the sidecar never responds.
	maxResets = 30
	// maxAnonymous limits the anonymous memory of the process in bytes, whatever clients send. It is 8 MB of the 16.8 MB
	// that the container may have by default. The kernel needs 2 MB for sockets, threads and tables. The first pod on a
	// node also pays for the pages of the program, 6.5 MB all the time, because it is the first to read them.
	maxAnonymous = 8_000_000
)

// TestMemory runs the released program, and measures its memory while many clients call at once.
func TestMemory(t *testing.T) {
	if testing.Short() {
		t.Skip("not run: with -short, because the test builds the program")
	}
	if err := allowFiles(crowd + 500); err != nil {
		t.Skip("not run: ", err)
	}
	program := filepath.Join(t.TempDir(), "credence-sidecar")
	buildReleased(t, program)
	address := processtest.FreeAddress(t)
	pid, ended := startProgram(t, program, address)

	call := func(ctx context.Context, fields ...string) (net.Conn, error) {
		return callOnce(ctx, address, fields...)
	}
	var many, large []string
	for i := range wordy {
		many = append(many, strconv.FormatInt(int64(i), 36)+":")
	}
	for i := range fat {
		large = append(large, strconv.Itoa(i)+":"+strings.Repeat("x", fatSize))
	}
	var kept []net.Conn
	for len(kept) < patient {
		conn, err := call(t.Context())
		if errors.Is(err, syscall.ECONNREFUSED) {
			select {
			case <-ended:
				t.Fatal("the program has exited")
			default:
				continue // it does not listen yet
			}
		}
		if err != nil {
			t.Fatal(err)
		}
		kept = append(kept, conn)
	}
	peak := watch(t, pid)
	var all sync.WaitGroup
	var succeeded, resets atomic.Int32
	failed := make(chan error, crowd)
	for i := range crowd {
		all.Go(func() {
			var fields []string
			switch i % 4 {
			case 0:
				fields = large
			case 1:
				// It gets status 400, or its connection is closed while it sends.
				if conn, err := call(t.Context(), many...); err == nil {
					conn.Close()
					failed <- errors.New("a request with 1,800 header fields got credentials")
					return
				}
				succeeded.Add(1)
				return
			}
			conn, err := callPatiently(func() (net.Conn, error) { return call(t.Context(), fields...) }, &resets)
			if err != nil {
				failed <- err
				return
			}
			conn.Close()
			succeeded.Add(1)
		})
	}
	for _, conn := range kept {
		conn.Close()
	}
	all.Wait()
	highest := peak()
	if n := succeeded.Load(); n != crowd {
		t.Errorf("%d of %d clients got the right response; one failed: %v", n, crowd, <-failed)
	}
	t.Logf("%d bytes at most, %d connections reset", highest, resets.Load())
	if highest > maxAnonymous {
		t.Errorf("the program had %d bytes of anonymous memory, want at most %d", highest, maxAnonymous)
	}
}

// allowFiles raises the limit of open files of this process to n.
func allowFiles(n uint64) error {
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		return fmt.Errorf("reading the limit of open files: %w", err)
	}
	if limit.Cur >= n {
		return nil
	}
	limit.Cur, limit.Max = max(limit.Cur, n), max(limit.Max, n)
	if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		return fmt.Errorf("raising the limit of open files to %d: %w", n, err)
	}
	return nil
}

// startProgram starts the program on address, with a broker. Both stop with the test.
func startProgram(t *testing.T, program, address string) (pid int, ended <-chan struct{}) {
	t.Helper()
	cmd := exec.CommandContext(context.WithoutCancel(t.Context()), program, append(newWorld(t).args, "--listen="+address)...)
	cmd.Env = []string{} // not that of the test
	var log bytes.Buffer
	cmd.Stderr = &log
	processtest.Must(t, cmd.Start())
	var err error
	done := make(chan struct{})
	go func() {
		defer close(done)
		err = cmd.Wait()
	}()
	t.Cleanup(func() {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		<-done
		if err != nil || t.Failed() {
			t.Errorf("the program exited with error %v; its log:\n%s", err, log.String())
		}
	})
	return cmd.Process.Pid, done
}

// callPatiently repeats call if the sidecar may have closed the connection because it was silent. It counts these resets.
func callPatiently(call func() (net.Conn, error), resets *atomic.Int32) (net.Conn, error) {
	for n := 1; ; n++ {
		begin := time.Now()
		conn, err := call()
		if !errors.Is(err, syscall.ECONNRESET) && !errors.Is(err, io.ErrUnexpectedEOF) {
			return conn, err
		}
		if spent := time.Since(begin); spent < silence || n > maxResets {
			return nil, fmt.Errorf("reset number %d of a client, %s after it began to connect: %w", n, spent, err)
		}
		resets.Add(1)
	}
}

// callOnce requests credentials on a new connection, and returns the connection when it has the response.
func callOnce(ctx context.Context, address string, fields ...string) (_ net.Conn, err error) {
	conn, err := new(net.Dialer).DialContext(ctx, "tcp", address)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			conn.Close()
		}
	}()
	if _, err := io.WriteString(conn, "GET "+contract.CredentialsPath+" HTTP/1.1\r\nHost: "+address+"\r\nAuthorization: "+authorization+"\r\n"+strings.Join(slices.Concat(fields, []string{""}), "\r\n")+"\r\n"); err != nil {
		return nil, err
	}
	response, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		return nil, err
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	if err == nil && response.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s: %s", response.Status, body)
	}
	return conn, err
}

// watch measures a process's anonymous memory until peak is called. peak returns the maximum in
// bytes.
func watch(t *testing.T, pid int) (peak func() int) {
	t.Helper()
	ctx, stop := context.WithCancel(t.Context())
	var watching sync.WaitGroup
	maximum := 0
	watching.Go(func() {
		ticker := time.NewTicker(2 * time.Millisecond) // the runtime keeps memory for seconds
		defer ticker.Stop()
		for ctx.Err() == nil && !t.Failed() {
			maximum = max(maximum, anonymous(t, pid))
			<-ticker.C
		}
	})
	return func() int {
		stop()
		watching.Wait()
		return maximum
	}
}

// anonymous returns RssAnon of proc_pid_status(5) in bytes.
func anonymous(t *testing.T, pid int) int {
	t.Helper()
	status, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/status")
	if err != nil {
		t.Error(err)
		return 0
	}
	_, after, _ := strings.Cut(string(status), "\nRssAnon:")
	line, _, _ := strings.Cut(after, "\n")
	kB, err := strconv.Atoi(strings.TrimSpace(strings.TrimSuffix(line, "kB")))
	if err != nil {
		t.Errorf("reading RssAnon of %q: %v", line, err)
	}
	return kB << 10
}
