//go:build unix

package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/certs"
	"github.com/credence-iam/credence/certs/certstest"
	"github.com/credence-iam/credence/integration/process"
)

// world is where one metric is measured. It works like a testing.B: check, must and Fatalf end the measurement, and
// Cleanup registers a function that undoes a start. Only the goroutine of the measurement may call these.
type world struct {
	testing.TB // nil: doubles for tests take one, and call only the methods below
	*bench

	ctx      context.Context // ends with the measurement
	cleanups []func()
}

// failure carries the error that ended a measurement.
type failure struct{ error }

// notRun says why a metric cannot be measured on this machine. That is not a failure.
type notRun string

func (n notRun) Error() string { return string(n) }

// check ends the measurement if there is an error.
func check(err error) {
	if err != nil {
		panic(failure{err})
	}
}

// must returns value, or ends the measurement.
func must[T any](value T, err error) T {
	check(err)
	return value
}

// Helper implements testing.TB.
func (w *world) Helper() {}

// Fatal implements testing.TB.
func (w *world) Fatal(args ...any) { check(errors.New(fmt.Sprint(args...))) }

// Fatalf implements testing.TB.
func (w *world) Fatalf(format string, args ...any) { check(fmt.Errorf(format, args...)) }

// TempDir makes a folder, which is removed with everything that this program started.
func (w *world) TempDir() string { return must(os.MkdirTemp(w.programs.Dir(), "world-")) }

// Cleanup calls undo at the end of the measurement, the last one first.
func (w *world) Cleanup(undo func()) { w.cleanups = append(w.cleanups, undo) }

func inWorld[T any](ctx context.Context, b *bench, measure func(*world) T) (result T, err error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	w := &world{bench: b, ctx: ctx}
	defer func() {
		if p := recover(); p != nil {
			failed, ok := p.(failure)
			if !ok {
				panic(p)
			}
			err = failed.error
		}
	}()
	defer func() {
		for _, undo := range slices.Backward(w.cleanups) {
			undo()
		}
	}()
	return measure(w), nil
}

// repeat measures n runs, each in a world of its own.
func (w *world) repeat(n int, once func(w *world, i int) measurement) []measurement {
	var runs []measurement
	for i := range n {
		runs = append(runs, must(inWorld(w.ctx, w.bench, func(w *world) measurement { return once(w, i) })))
	}
	return runs
}

// side is one of the two sides that a paired metric compares. It measures as often as it can in the given time, and
// at least once.
type side func(length time.Duration) []float64

// slice is how long one side measures before it is the other's turn. It is short, so that other work of the machine
// disturbs both sides equally.
const slice = 100 * time.Millisecond

// paired measures ours beside bare in all runs.
func (w *world) paired(ours, bare side) []measurement {
	var runs []measurement
	for i := range w.runs {
		runs = append(runs, w.pair(i, ours, bare))
	}
	return runs
}

// pair is the i-th run. Its values are the medians of each side's measurements. The side that begins alternates, so
// that neither always profits from what the other has warmed. The first turn of both warms up and does not count.
func (w *world) pair(i int, ours, bare side) measurement {
	var measured [2][]float64
	for turn := range 1 + max(1, int(w.duration/slice)) {
		for n := range 2 {
			which := (n + turn + i) % 2
			xs := []side{ours, bare}[which](slice)
			check(w.ctx.Err())
			if turn > 0 {
				measured[which] = append(measured[which], xs...)
			}
		}
	}
	return beside(median(measured[0]), median(measured[1]))
}

// repeated makes a side of a function that measures once.
func repeated(once func() float64) side {
	return func(length time.Duration) []float64 {
		var xs []float64
		for end := time.Now().Add(length); len(xs) == 0 || time.Now().Before(end); {
			xs = append(xs, once())
		}
		return xs
	}
}

// timed makes a side of the time that a function takes.
func timed(unit time.Duration, do func() error) side {
	return repeated(func() float64 {
		began := time.Now()
		check(do())
		return float64(time.Since(began)) / float64(unit)
	})
}

// load runs all callers at once for the given time, each with one call after the other. It returns how long each
// call took.
func load(callers []func() error, length time.Duration) []time.Duration {
	took := make([][]time.Duration, len(callers))
	errs := make([]error, len(callers))
	var calling sync.WaitGroup
	end := time.Now().Add(length)
	for i, call := range callers {
		calling.Go(func() {
			for now := time.Now(); now.Before(end); {
				if errs[i] = call(); errs[i] != nil {
					return
				}
				done := time.Now()
				took[i] = append(took[i], done.Sub(now))
				now = done
			}
		})
	}
	calling.Wait()
	check(errors.Join(errs...))
	return slices.Concat(took...)
}

// rate makes a side: calls per second of all callers together.
func rate(callers []func() error) side {
	return func(length time.Duration) []float64 {
		began := time.Now()
		calls := len(load(callers, length))
		return []float64{float64(calls) / time.Since(began).Seconds()}
	}
}

// p99 makes a side: the latency, in microseconds, that one call in a hundred exceeds.
func p99(callers []func() error) side {
	return func(length time.Duration) []float64 {
		took := load(callers, length)
		slices.Sort(took)
		return []float64{float64(took[len(took)*99/100]) / float64(time.Microsecond)}
	}
}

// How programs are built for a release.
var (
	buildEnv   = []string{"CGO_ENABLED=0"}
	buildFlags = []string{"-trimpath", "-tags", "grpcnotrace", "-ldflags", "-s -w"}
)

// build builds the package in folder of this module once, and returns the program's file.
func (b *bench) build(ctx context.Context, folder, name string, env ...string) string {
	file := filepath.Join(b.bin, name)
	if _, err := os.Stat(file); err == nil {
		return file
	}
	args := append(append([]string{"build"}, buildFlags...), "-o", file, "./"+folder)
	cmd := exec.CommandContext(ctx, "go", args...) //nolint:gosec // The arguments are constants of this program.
	cmd.Dir = b.root
	cmd.Env = append(append(os.Environ(), buildEnv...), env...)
	if printed, err := cmd.CombinedOutput(); err != nil {
		check(fmt.Errorf("building %s: %w\n%s", folder, err, printed))
	}
	return file
}

// test runs tests of this module and returns their output, which has figures as name=value.
func (w *world) test(env string, args ...string) []byte {
	test := exec.CommandContext(w.ctx, "go", append([]string{"test", "-count=1", "-v"}, args...)...) //nolint:gosec // Constants.
	test.Dir, test.Stderr = w.root, os.Stderr
	test.Env = append(os.Environ(), env)
	out, err := test.Output()
	if err != nil {
		check(fmt.Errorf("running go test %s: %w\n%s", strings.Join(args, " "), err, out))
	}
	return out
}

// figure reads a figure from the output of a test.
func figure(out []byte, name string) float64 {
	found := regexp.MustCompile(`\b` + name + `=([0-9.]+)`).FindSubmatch(out)
	if found == nil {
		check(fmt.Errorf("the test does not print %s", name))
	}
	return must(strconv.ParseFloat(string(found[1]), 64))
}

func (w *world) sleep(d time.Duration) {
	select {
	case <-time.After(d):
	case <-w.ctx.Done():
		check(w.ctx.Err())
	}
}

// freeAddress returns a loopback address that nothing listens on.
func freeAddress(ctx context.Context) string {
	return net.JoinHostPort(loopback, strconv.Itoa(must(process.FreePort(ctx))))
}

// needsProc ends the measurement on systems without /proc.
func needsProc(what string) {
	if runtime.GOOS != "linux" {
		check(notRun(what + " is in /proc, which " + runtime.GOOS + " does not have"))
	}
}

// procField reads a number from a line of proc_pid_status(5).
func procField(file, name string) float64 {
	for line := range strings.Lines(string(must(os.ReadFile(file)))) {
		if value, ok := strings.CutPrefix(line, name+":"); ok {
			return must(strconv.ParseFloat(strings.TrimSuffix(strings.TrimSpace(value), " kB"), 64))
		}
	}
	check(fmt.Errorf("%s has no line %s", file, name))
	return 0
}

// procBytes reads an amount of a process's memory, such as VmRSS, in bytes.
func procBytes(pid int, name string) float64 {
	return 1024 * procField(fmt.Sprintf("/proc/%d/status", pid), name)
}

const (
	loopback = "127.0.0.1"
	// serverName is the host name of all servers here, because clients verify names and not addresses.
	serverName = "localhost"
	// stopGrace is how long a program may take to stop.
	stopGrace = 5 * time.Second
)

var discard = slog.New(slog.DiscardHandler)

// trust is the certificate of a TLS server and the root that its clients trust.
type trust struct {
	pair              *certs.KeyPair
	certFile, keyFile string
	rootsFile         string
	roots             *certs.Roots
	ca                *certstest.CA
}

func (w *world) newTrust() trust {
	ca, dir := certstest.NewCA(w), w.TempDir()
	t := trust{ca: ca, rootsFile: ca.WriteTo(filepath.Join(dir, "roots"))}
	t.certFile, t.keyFile = ca.Leaf(serverName).WriteTo(filepath.Join(dir, "tls"))
	t.pair, t.roots = must(certs.NewKeyPair(t.certFile, t.keyFile, discard)), must(certs.NewRoots(t.rootsFile, discard))
	return t
}

func (t trust) client() *tls.Config { return certs.ClientConfig(t.roots, serverName) }

// listen returns a listener, and its address with the name in the server's certificate.
func (w *world) listen() (net.Listener, string) {
	listener := must(new(net.ListenConfig).Listen(w.ctx, "tcp", net.JoinHostPort(loopback, "0")))
	_, port, err := net.SplitHostPort(listener.Addr().String())
	check(err)
	return listener, net.JoinHostPort(serverName, port)
}

// session is an AWS session of the usual lengths.
func session() credential.Credential {
	now := time.Now()
	return credential.Credential{
		AccessKeyID:     "ASIA" + strings.Repeat("B", 16),
		SecretAccessKey: credential.NewSecret(strings.Repeat("s", 40)),
		SessionToken:    credential.NewSecret(strings.Repeat("t", 1000)),
		Issued:          now,
		Expiration:      now.Add(time.Hour),
	}
}
