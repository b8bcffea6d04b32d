//go:build unix

package main

import (
	"context"
	"crypto/rand"
	"crypto/rsa"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"

	"github.com/credence-iam/credence/broker/assume/ststest"
	"github.com/credence-iam/credence/broker/client"
	"github.com/credence-iam/credence/broker/placement"
	"github.com/credence-iam/credence/broker/policy"
	"github.com/credence-iam/credence/certs"
	"github.com/credence-iam/credence/integration/bench/report"
	"github.com/credence-iam/credence/integration/process"
)

const (
	failoverBrokers = 3
	// failoverClients are many, and ask seldom: each is to be a sidecar that asks once while the broker is lost.
	failoverClients = 600
	failoverPause   = 6 * time.Second
	// failoverRoles are those for whose service accounts the API server of this benchmark has objects.
	failoverRoles = 25
	// noticing is how long the lost broker is still in DNS. Kubernetes takes a second or two after a process has
	// ended, DNS caches up to 5 s more, and a node that is lost is noticed after 40 s.
	noticing = 5 * time.Second
	// calm is how long calls go on before and after.
	calm = 2 * time.Second
)

// failover is what came of the loss of one broker.
type failover struct {
	calls, failed int
	p99           time.Duration // of calls begun before everybody was told
}

// worse is the worse of both in each respect.
func (f failover) worse(g failover) failover {
	return failover{calls: f.calls + g.calls, failed: f.failed + g.failed, p99: max(f.p99, g.p99)}
}

// losses are what came of the runs, once there were any.
var losses []failover

// failovers loses brokers, once killed and once stopped for each run; once for all figures.
func (b *bench) failovers(ctx context.Context, figure func(failover) float64) ([]report.Run, error) {
	for len(losses) < min(b.runs, 3) {
		var all failover
		for _, sig := range []syscall.Signal{syscall.SIGKILL, syscall.SIGSTOP} {
			f, err := b.failover(ctx, sig)
			if err != nil {
				return nil, err
			}
			all = all.worse(f)
		}
		losses = append(losses, all)
	}
	var runs []report.Run
	for _, f := range losses {
		runs = append(runs, report.Run{Value: figure(f)})
	}
	return runs, nil
}

// failover starts brokers, has clients call them, and sends one of them sig.
func (b *bench) failover(ctx context.Context, sig syscall.Signal) (failover, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	t, brokers, err := b.startBrokers(ctx)
	defer func() {
		for _, p := range brokers.programs {
			_ = syscall.Kill(p.PID(), syscall.SIGCONT) // so that it can end
			p.Stop(stopGrace)
		}
	}()
	if err != nil {
		return failover{}, err
	}
	clients, err := b.sidecarsOf(t, brokers)
	if err != nil {
		return failover{}, err
	}
	var mu sync.Mutex
	var result failover      // guarded by mu
	var took []time.Duration // guarded by mu
	var lost atomic.Pointer[time.Time]
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	var calling sync.WaitGroup
	for i, c := range clients {
		calling.Go(func() {
			for wait := failoverPause * time.Duration(i) / failoverClients; ; wait = failoverPause {
				select {
				case <-time.After(wait):
				case <-ctx.Done():
					return
				}
				began := time.Now()
				_, err := c.Credentials(context.WithoutCancel(ctx))
				mu.Lock()
				result.calls++
				if err != nil {
					result.failed++
				}
				if at := lost.Load(); at != nil && !began.Before(*at) && began.Before(at.Add(noticing)) {
					took = append(took, time.Since(began))
				}
				mu.Unlock()
			}
		})
	}
	steps := []struct {
		wait time.Duration
		then func() error
	}{
		{calm, func() error {
			lost.Store(new(time.Now()))
			return syscall.Kill(brokers.programs[0].PID(), sig)
		}},
		{noticing, func() error { brokers.remove(0); return nil }},
		{calm, func() error { return nil }},
	}
	for _, step := range steps {
		select {
		case <-time.After(step.wait):
		case <-ctx.Done():
			return failover{}, ctx.Err()
		}
		if err := step.then(); err != nil {
			return failover{}, fmt.Errorf("losing a broker: %w", err)
		}
	}
	stop()
	calling.Wait()
	if len(took) == 0 {
		return failover{}, errors.New("no call was made while a broker was lost")
	}
	slices.Sort(took)
	result.p99 = took[len(took)*99/100]
	return result, nil
}

// brokers are programs that share the work, and what says so.
type brokers struct {
	api      *apiServer
	key      *rsa.PrivateKey
	port     int
	programs []*process.Process

	mu        sync.Mutex
	addresses []netip.Addr // in DNS; guarded by mu
}

// remove takes a broker out of DNS and out of the endpoints.
func (s *brokers) remove(i int) {
	s.mu.Lock()
	s.addresses = slices.Delete(slices.Clone(s.addresses), i, i+1)
	s.mu.Unlock()
	s.tell()
}

func (s *brokers) tell() {
	var ready []string
	for _, a := range s.lookup() {
		ready = append(ready, a.String())
	}
	s.api.brokers.set(ready...)
}

func (s *brokers) lookup() []netip.Addr {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.addresses
}

// startBrokers returns when all are ready and each session is held by two of them. What was started is returned beside an
// error, too.
func (b *bench) startBrokers(ctx context.Context) (t trust, s *brokers, err error) {
	s = &brokers{}
	program, err := b.build(ctx, "cmd/broker", "credence-broker")
	if err != nil {
		return t, s, err
	}
	dir, err := os.MkdirTemp(b.programs.Dir(), "failover-")
	if err != nil {
		return t, s, fmt.Errorf("making a folder: %w", err)
	}
	if t, err = newTrust(dir); err != nil {
		return t, s, err
	}
	if s.key, err = rsa.GenerateKey(rand.Reader, 2048); err != nil {
		return t, s, fmt.Errorf("making a token-signing key: %w", err)
	}
	var api string
	if s.api, api, err = serveAPI(ctx, t, s.key, podRoles*(failoverClients/failoverRoles), true); err != nil {
		return t, s, err
	}
	sts, err := ststest.Start(ctx, ststest.Config{Account: account})
	if err != nil {
		return t, s, err
	}
	context.AfterFunc(ctx, sts.Close)
	if s.port, err = process.FreePort(ctx); err != nil {
		return t, s, err
	}
	for i := range failoverBrokers {
		s.addresses = append(s.addresses, netip.AddrFrom4([4]byte{127, 0, 0, byte(2 + i)}))
	}
	s.tell()
	kubeconfig, err := writeKubeconfig(dir, api, t)
	if err != nil {
		return t, s, err
	}
	var admins []string
	for i, a := range s.lookup() {
		port, err := process.FreePort(ctx)
		if err != nil {
			return t, s, err
		}
		admins = append(admins, net.JoinHostPort(loopback, strconv.Itoa(port)))
		p, err := b.programs.Start(process.Command{
			Name: fmt.Sprintf("credence-broker-%s-%d", filepath.Base(dir), i), Path: program,
			Args: []string{
				"--listen=" + netip.AddrPortFrom(a, uint16(s.port)).String(), "--admin-listen=" + admins[i], "--debug-listen=", //nolint:gosec // A port.
				"--kubeconfig=" + kubeconfig, "--roots-file=", "--audience=" + audience,
				"--namespace=" + brokerNamespace, "--service=" + brokerService, "--pod-ips=" + a.String(), "--settle-time=1s",
				"--tls-cert=" + filepath.Join(dir, "tls", "tls.crt"), "--tls-key=" + filepath.Join(dir, "tls", "tls.key"),
				"--sts-endpoint=" + sts.URL(), "--region=" + region, "--base-arn=arn:aws:iam::" + account + ":role/",
			},
			Env: brokerEnv(sts),
		})
		if err != nil {
			return t, s, err
		}
		s.programs = append(s.programs, p)
	}
	waiting, stop := context.WithTimeout(ctx, warmTimeout)
	defer stop()
	for i, p := range s.programs {
		if err := p.WaitReady(waiting, func(ctx context.Context) error {
			if n := sts.Count("AssumeRole", ""); n < placement.Owners*podRoles {
				return fmt.Errorf("%d of %d sessions are warm", n, placement.Owners*podRoles)
			}
			return ready(ctx, admins[i])
		}); err != nil {
			return t, s, err
		}
	}
	return t, s, nil
}

// sidecarsOf are the clients of sidecars, each of another pod.
func (b *bench) sidecarsOf(t trust, s *brokers) ([]*client.Client, error) {
	roots, err := certs.NewRoots(t.rootsFile, discard)
	if err != nil {
		return nil, err
	}
	keys, err := policy.NewKeys(policy.DefaultPrefix)
	if err != nil {
		return nil, err
	}
	signer, err := newSigner(s.key)
	if err != nil {
		return nil, err
	}
	var clients []*client.Client
	for i := range failoverClients {
		role := i % failoverRoles
		m := madePod(i/failoverRoles*podRoles + role)
		pod := policy.Pod{Namespace: m.Namespace, Name: m.Name, UID: string(m.UID), ServiceAccount: accountName(role), Request: keys.Request(m.Annotations)}
		account := madeAccount(role*podNamespaces + role%podNamespaces)
		token, err := podToken(signer, pod, string(account.UID))
		if err != nil {
			return nil, err
		}
		file := filepath.Join(b.programs.Dir(), fmt.Sprintf("failover-token-%d", i))
		if err := os.WriteFile(file, []byte(token), 0o600); err != nil {
			return nil, fmt.Errorf("writing a token: %w", err)
		}
		key, err := pod.RoutingKey()
		if err != nil {
			return nil, err
		}
		c, err := client.New(client.Config{
			Target: net.JoinHostPort(serverName, strconv.Itoa(s.port)), TLS: certs.ClientConfig(roots, serverName), TokenFile: file,
			RoutingKey: key,
			Lookup:     func(context.Context, string, string) ([]netip.Addr, error) { return s.lookup(), nil },
		})
		if err != nil {
			return nil, err
		}
		clients = append(clients, c)
	}
	return clients, nil
}

// writeKubeconfig writes a kubeconfig file for the API server of this benchmark.
func writeKubeconfig(dir, api string, t trust) (string, error) {
	file := filepath.Join(dir, "kubeconfig")
	if err := clientcmd.WriteToFile(clientcmdapi.Config{
		Clusters:       map[string]*clientcmdapi.Cluster{"c": {Server: "https://" + api, CertificateAuthorityData: t.rootsPEM}},
		AuthInfos:      map[string]*clientcmdapi.AuthInfo{"u": {Token: "x"}},
		Contexts:       map[string]*clientcmdapi.Context{"x": {Cluster: "c", AuthInfo: "u"}},
		CurrentContext: "x",
	}, file); err != nil {
		return "", fmt.Errorf("writing a kubeconfig: %w", err)
	}
	return file, nil
}
