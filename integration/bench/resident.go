//go:build unix

package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/rsa"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"time"

	"github.com/credence-iam/credence/broker/assume/ststest"
	"github.com/credence-iam/credence/integration/bench/report"
	"github.com/credence-iam/credence/integration/process"
)

var residentMetrics = []metric{
	{
		Metric: report.Metric{
			Name: "broker_rss_10k_pods_bytes", Unit: "bytes",
			// kiam's server took 286 MB for as many, kube2iam 148 MB.
			Goal: &report.Goal{Of: report.Value, Op: "<=", Value: 60e6},
		},
		about: "VmRSS of the broker's program with 10,000 injected pods of " + strconv.Itoa(podRoles) + " roles in " + strconv.Itoa(podNamespaces) + " namespaces, when it is ready and\n" +
			"\thas warmed a session for each role. The API server it watches answers the metadata of pods of some 6 kB as real\n" +
			"\tones do, over TLS, in protobuf, and streams lists. All pages of the program that are in memory are counted.",
		measure: func(ctx context.Context, b *bench) ([]report.Run, error) {
			return b.resident(ctx, 10_000, "VmRSS", false, true)
		},
	}, {
		Metric: report.Metric{
			Name: "broker_rss_100k_pods_bytes", Unit: "bytes",
			Goal: &report.Goal{Of: report.Value, Op: "<=", Value: 250e6},
		},
		about: "The highest VmRSS (VmHWM) of the broker's program with 100,000 such pods, from its start to after a relist that the\n" +
			"\tAPI server has forced (410 Gone). Each run is the larger of two: with an API server that streams lists, and with\n" +
			"\tone, as before Kubernetes 1.34, that has to be asked for pages.",
		measure: func(ctx context.Context, b *bench) ([]report.Run, error) {
			return b.resident(ctx, 100_000, "VmHWM", true, true, false)
		},
	},
}

// resident starts a broker for each run and each kind of API server, and reads what the line of /proc/PID/status says
// when it is warm. A run has the largest, so that no median hides what one kind of API server costs.
func (b *bench) resident(ctx context.Context, pods int, line string, relist bool, streams ...bool) ([]report.Run, error) {
	if runtime.GOOS != "linux" {
		return nil, notRun(line + " is in /proc, which " + runtime.GOOS + " does not have")
	}
	var runs []report.Run
	for i := range min(b.runs, 3) { // processes that do the same: they differ by some per cent
		var run report.Run
		for n, streams := range streams {
			value, err := b.residentOnce(ctx, 2*i+n, pods, line, relist, streams)
			if err != nil {
				return nil, err
			}
			run.Value = max(run.Value, value)
		}
		runs = append(runs, run)
	}
	return runs, nil
}

const warmTimeout = 2 * time.Minute // on a machine that does something else besides

func (b *bench) residentOnce(ctx context.Context, i, pods int, line string, relist, streams bool) (float64, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	program, err := b.build(ctx, "cmd/broker", "credence-broker")
	if err != nil {
		return 0, err
	}
	dir, err := os.MkdirTemp(b.programs.Dir(), "resident-")
	if err != nil {
		return 0, fmt.Errorf("making a folder: %w", err)
	}
	t, err := newTrust(dir)
	if err != nil {
		return 0, err
	}
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		return 0, fmt.Errorf("making a token-signing key: %w", err)
	}
	api, address, err := serveAPI(ctx, t, key, pods, streams)
	if err != nil {
		return 0, err
	}
	kubeconfig, err := writeKubeconfig(dir, address, t)
	if err != nil {
		return 0, err
	}
	sts, err := ststest.Start(ctx, ststest.Config{Account: account})
	if err != nil {
		return 0, err
	}
	defer sts.Close()
	var ports [2]string
	for i := range ports {
		port, err := process.FreePort(ctx)
		if err != nil {
			return 0, err
		}
		ports[i] = net.JoinHostPort(loopback, strconv.Itoa(port))
	}
	p, err := b.programs.Start(process.Command{
		Name: fmt.Sprintf("credence-broker-%d-%d", pods, i), Path: program,
		Args: []string{
			"--listen=" + ports[0], "--admin-listen=" + ports[1], "--kubeconfig=" + kubeconfig, "--roots-file=",
			"--tls-cert=" + filepath.Join(dir, "tls", "tls.crt"), "--tls-key=" + filepath.Join(dir, "tls", "tls.key"),
			"--sts-endpoint=" + sts.URL(), "--region=" + region, "--base-arn=arn:aws:iam::" + account + ":role/",
		},
		Env: brokerEnv(sts),
	})
	if err != nil {
		return 0, err
	}
	defer p.Stop(stopGrace)
	ctx, cancelWait := context.WithTimeout(ctx, warmTimeout)
	defer cancelWait()
	if err := p.WaitReady(ctx, func(ctx context.Context) error { return ready(ctx, ports[1]) }); err != nil {
		return 0, err
	}
	if err := p.WaitReady(ctx, func(context.Context) error {
		if n := len(sts.Calls()); n < podRoles {
			return fmt.Errorf("%d of %d roles are warm", n, podRoles)
		}
		return nil
	}); err != nil {
		return 0, err
	}
	if relist {
		listed := api.lists.Load()
		api.relist()
		if err := p.WaitReady(ctx, func(context.Context) error {
			if api.lists.Load() == listed {
				return errors.New("the broker has not listed anew")
			}
			return nil
		}); err != nil {
			return 0, err
		}
	}
	// Until the broker has taken in what it was sent.
	timer := time.NewTimer(settle)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
		return 0, ctx.Err()
	}
	return statusLine(p.PID(), line)
}

// brokerEnv is the environment of a broker's program that calls sts, with keys of its.
func brokerEnv(sts *ststest.Server) []string {
	keyID, secret := sts.Keys()
	return []string{
		"AWS_ACCESS_KEY_ID=" + keyID, "AWS_SECRET_ACCESS_KEY=" + secret.Reveal(), "AWS_EC2_METADATA_DISABLED=true",
		"AWS_CONFIG_FILE=" + os.DevNull, "AWS_SHARED_CREDENTIALS_FILE=" + os.DevNull,
	}
}

func ready(ctx context.Context, address string) error {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+address+"/readyz", nil)
	if err != nil {
		return err
	}
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	if response.StatusCode != http.StatusOK {
		return fmt.Errorf("it answers %s", response.Status)
	}
	return nil
}

// statusLine reads a number of kB from a line of proc_pid_status(5), in bytes.
func statusLine(pid int, name string) (float64, error) {
	status, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/status")
	if err != nil {
		return 0, fmt.Errorf("reading a process's memory: %w", err)
	}
	_, after, _ := bytes.Cut(status, []byte("\n"+name+":"))
	line, _, _ := bytes.Cut(after, []byte("\n"))
	kb, err := strconv.Atoi(string(bytes.TrimSpace(bytes.TrimSuffix(bytes.TrimSpace(line), []byte("kB")))))
	if err != nil {
		return 0, fmt.Errorf("reading %s of process %d: %w", name, pid, err)
	}
	return float64(kb) * 1024, nil
}
