//go:build unix

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/credence-iam/credence/integration/bench/report"
	"github.com/credence-iam/credence/sidecar/contract"
)

// sidecarMetrics are what a pod pays. None has a container's limits on it.
var sidecarMetrics = []metric{
	{
		Metric: report.Metric{Name: "sidecar_binary_bytes_amd64", Unit: "bytes", Goal: &binaryGoal},
		about:  "Size of the program for linux/amd64, built as it is released. Exact, so it has one run.",
		measure: func(ctx context.Context, b *bench) ([]report.Run, error) {
			return b.binarySize(ctx, "amd64")
		},
	}, {
		Metric: report.Metric{Name: "sidecar_binary_bytes_arm64", Unit: "bytes", Goal: &binaryGoal},
		about:  "The same for linux/arm64.",
		measure: func(ctx context.Context, b *bench) ([]report.Run, error) {
			return b.binarySize(ctx, "arm64")
		},
	}, {
		Metric: report.Metric{
			Name: "sidecar_rss_anon_bytes", Unit: "bytes",
			// It is paid once per pod, and a node has a hundred.
			Goal: &report.Goal{Of: report.Value, Op: "<=", Value: 3 << 20},
		},
		about: "RssAnon of a sidecar that has fetched and served its credentials once and is idle; beside it, a bare net/http server\n" +
			"\tthat has served once. Each run is another process. The file-backed pages of the program, which all pods of a\n" +
			"\tnode share, are not in it.",
		measure: memory,
	}, {
		Metric: report.Metric{
			Name: "sidecar_get_c1_p50", Unit: "us",
			// What time limits, routing and the check of headers may cost.
			Goal: &report.Goal{Of: report.Ratio, Op: "<=", Value: 1.15},
		},
		about: "Median latency of GET " + contract.CredentialsPath + " on one connection that is kept; beside it, a bare net/http server with a body\n" +
			"\tof the same size. The client writes prepared bytes, so that its own work hides no difference.\n" +
			"\tEach run has processes of its own.",
		measure: func(ctx context.Context, b *bench) ([]report.Run, error) { return b.eachBeside(ctx, latency) },
	}, {
		Metric: report.Metric{
			Name: "sidecar_get_c16_rps", Unit: "requests/s",
			// SDKs of several programs, or many sessions of one, at a start.
			Goal: &report.Goal{Of: report.Ratio, Op: ">=", Value: 0.85},
		},
		about:   "The same requests per second on " + strconv.Itoa(crowd) + " connections that are kept, each with one request at a time.",
		measure: func(ctx context.Context, b *bench) ([]report.Run, error) { return b.eachBeside(ctx, throughput) },
	},
}

// binaryGoal: every pod's node pulls the program once. 10 MB are gRPC, TLS and HTTP.
var binaryGoal = report.Goal{Of: report.Value, Op: "<=", Value: 11e6}

// How a program is built for release.
var (
	buildEnv   = []string{"CGO_ENABLED=0"}
	buildFlags = []string{"-trimpath", "-tags", "grpcnotrace", "-ldflags", "-s -w"}
)

// build builds the package in folder of this module and returns the program's file. It has been done
// once for a name that was asked for before.
func (b *bench) build(ctx context.Context, folder, name string, env ...string) (string, error) {
	file := filepath.Join(b.bin, name)
	if _, err := os.Stat(file); err == nil {
		return file, nil
	}
	args := append(append([]string{"build"}, buildFlags...), "-o", file, "./"+folder)
	cmd := exec.CommandContext(ctx, "go", args...) //nolint:gosec // The arguments are constants of this program.
	cmd.Dir = b.root
	cmd.Env = append(append(os.Environ(), buildEnv...), env...)
	if printed, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("building %s: %w\n%s", folder, err, printed)
	}
	return file, nil
}

func (b *bench) binarySize(ctx context.Context, arch string) ([]report.Run, error) {
	file, err := b.build(ctx, "cmd/sidecar", "credence-sidecar-linux-"+arch, "GOOS=linux", "GOARCH="+arch)
	if err != nil {
		return nil, err
	}
	info, err := os.Stat(file)
	if err != nil {
		return nil, fmt.Errorf("measuring the sidecar's size: %w", err)
	}
	return []report.Run{{Value: float64(info.Size())}}, nil
}

// eachBeside measures runs that have a sidecar and a bare server of their own: where a process lies in memory can make it
// a tenth faster or slower for all its life.
func (b *bench) eachBeside(ctx context.Context, measure func(*server) side) ([]report.Run, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	p, err := b.newPod(ctx)
	if err != nil {
		return nil, err
	}
	var runs []report.Run
	for i := range b.runs {
		run, err := p.beside(ctx, b, i, measure)
		if err != nil {
			return nil, err
		}
		runs = append(runs, run)
	}
	return runs, nil
}

func (p *pod) beside(ctx context.Context, b *bench, i int, measure func(*server) side) (report.Run, error) {
	ours, err := p.startSidecar(ctx)
	if err != nil {
		return report.Run{}, err
	}
	defer ours.stop()
	bare, err := p.startBare(ctx)
	if err != nil {
		return report.Run{}, err
	}
	defer bare.stop()
	if ours.size != bare.size {
		return report.Run{}, fmt.Errorf("the sidecar answers %d bytes and the bare server %d", ours.size, bare.size)
	}
	return b.pair(ctx, i, measure(ours), measure(bare))
}
func latency(s *server) side { return timed(s.get, time.Microsecond) }

const crowd = 16

// throughput measures requests per second of a crowd. It connects anew for each turn, before the clock starts.
func throughput(s *server) side {
	return func(ctx context.Context, length time.Duration) ([]float64, error) {
		var all []*server
		defer func() {
			for _, one := range all {
				_ = one.conn.Close()
			}
		}()
		for range crowd {
			one := &server{request: s.request}
			if err := one.first(ctx, s.conn.RemoteAddr().String()); err != nil {
				return nil, err
			}
			all = append(all, one)
		}
		var (
			wg     sync.WaitGroup
			counts = make([]int, crowd)
			errs   = make([]error, crowd)
			began  = time.Now()
		)
		for n, one := range all {
			wg.Go(func() {
				for errs[n] == nil && time.Since(began) < length {
					_, errs[n] = one.get(ctx)
					counts[n]++
				}
			})
		}
		wg.Wait()
		total := 0
		for _, n := range counts {
			total += n
		}
		return []float64{float64(total) / time.Since(began).Seconds()}, errors.Join(errs...)
	}
}

// settle is how long after its first answer a process counts as idle: what it frees by itself, it has
// freed by then.
const settle = 3 * time.Second

func memory(ctx context.Context, b *bench) ([]report.Run, error) {
	if runtime.GOOS != "linux" {
		return nil, notRun("RssAnon is in /proc, which " + runtime.GOOS + " does not have")
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	p, err := b.newPod(ctx)
	if err != nil {
		return nil, err
	}
	pids, stop, err := p.startIdle(ctx, b.runs)
	defer stop()
	if err != nil {
		return nil, err
	}
	var runs []report.Run
	for pair := range slices.Chunk(pids, 2) {
		value, err := rssAnon(pair[0])
		baseline, bareErr := rssAnon(pair[1])
		if err := errors.Join(err, bareErr); err != nil {
			return nil, err
		}
		runs = append(runs, report.Run{Value: value, Baseline: &baseline})
	}
	return runs, nil
}

// rssAnon reads a process's resident anonymous memory, in bytes.
func rssAnon(pid int) (float64, error) { return statusLine(pid, "RssAnon") }
