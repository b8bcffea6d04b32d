//go:build linux

// Package soak shows what happens when a part fails: of Credence, of the cluster, or AWS's STS. It runs on a real cluster
// with nodes, with Credence installed by Helm beside a real cert-manager. Applications with real AWS SDKs call all the time,
// and new pods are created all the time. No application may ever be without credentials. How long new pods wait, what is
// logged and which alerts fire is recorded: the tests write docs/reliability.md.
//
// "make soak" runs the failures and sets CREDENCE_E2E. It needs root and more than an hour. Without it, a test only compares
// the page with the recorded results. Effects of failures on programs in virtual time are tests of their packages.
package soak

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/credence-iam/credence/integration/cluster"
	"github.com/credence-iam/credence/integration/deployment"
)

const (
	// sessionVariable sets the session duration of the applications that the failures are about.
	sessionVariable = "CREDENCE_SOAK_SESSION"

	sdkImage    = "localhost/sdk:1"
	chrootImage = "localhost/chroot:1" // runs programs of the node
)

// All failures share one cluster.
var (
	d    *deployment.Deployment
	seen *recorder

	// session is the session duration. The default is the shortest that AWS allows. An outage that is about the session
	// duration then takes a quarter of the time that it takes with the default of users, one hour.
	session = 15 * time.Minute

	// stsDown makes the STS close each connection of brokers. Applications reach it as before, as any other AWS service.
	stsDown atomic.Bool
	// settings are the arguments of Helm for each installation.
	settings []string
	// product is the last commit that changed the installed programs and chart.
	product string
)

// part returns the same part of the load's session duration as d is of one hour.
func part(d time.Duration) time.Duration {
	return time.Duration(float64(d) * session.Hours())
}

func TestMain(m *testing.M) {
	flag.Parse()
	if !enabled() {
		os.Exit(m.Run())
	}
	if text := os.Getenv(sessionVariable); text != "" {
		var err error
		if session, err = time.ParseDuration(text); err != nil {
			fmt.Fprintln(os.Stderr, sessionVariable+":", err)
			os.Exit(1)
		}
	}
	os.Exit(deployment.RunTests(cluster.Config{Nodes: 2}, deployment.Config{
		Images: map[string]string{sdkImage: "soak/sdk", chrootImage: "e2e/chroot"},
	}, setUp, m.Run))
}

// enabled reports whether the failures run.
func enabled() bool { return os.Getenv(deployment.Variable) == "soak" }

// setUp installs Credence and starts the load, which ends with ctx.
func setUp(ctx context.Context, prepared *deployment.Deployment) (err error) {
	d = prepared
	if product, err = commit(ctx); err != nil {
		return err
	}
	url, err := serveSTS(ctx)
	if err != nil {
		return err
	}
	settings = []string{"--set=aws.stsEndpoint=" + url}
	if err := d.Install(ctx, settings...); err != nil {
		return err
	}
	// The nodes have no zones, as in many clusters outside of clouds.
	for _, component := range []string{"broker", "webhook"} {
		if err := onTwoNodes(ctx, component); err != nil {
			return err
		}
	}
	return startLoad(ctx)
}

// upgrade installs or changes Credence.
func upgrade(ctx context.Context, more ...string) error {
	return d.Upgrade(ctx, slices.Concat(settings, more)...)
}

// serveSTS serves the STS for brokers alone, until ctx ends, so that it can fail for them alone.
func serveSTS(ctx context.Context) (url string, err error) {
	host := d.Cluster.Host()
	listener, err := host.Listen(ctx, "tcp", net.JoinHostPort(host.Address(), "0"))
	if err != nil {
		return "", err
	}
	server := &http.Server{ReadHeaderTimeout: time.Minute, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if stsDown.Load() {
			panic(http.ErrAbortHandler) // closes the connection
		}
		d.STS.ServeHTTP(w, r)
	})}
	context.AfterFunc(ctx, func() { _ = server.Close() })
	go func() { _ = server.Serve(listener) }()
	return "http://" + listener.Addr().String(), nil
}

// commit returns the last commit that changed the product, and whether files were changed since.
func commit(ctx context.Context) (string, error) {
	git := func(args ...string) (string, error) {
		cmd := exec.CommandContext(ctx, "git", append(args, "--", "broker", "certs", "charts", "cmd", "sidecar", "webhook")...)
		cmd.Dir = "../.."
		out, err := cmd.Output()
		return strings.TrimSpace(string(out)), err
	}
	text, err := git("log", "-1", "--abbrev=9", "--format=%h")
	changed, err2 := git("status", "--porcelain")
	if err := errors.Join(err, err2); err != nil {
		return "", fmt.Errorf("reading the commit: %w", err)
	}
	if changed != "" {
		text += " with changes"
	}
	return text, nil
}

// node returns a node by its name.
func node(name string) *cluster.Node {
	nodes := d.Cluster.Nodes()
	return nodes[slices.IndexFunc(nodes, func(n *cluster.Node) bool { return n.Name() == name })]
}

// crash kills a program of the cluster, and starts it again after some time, as its supervisor would.
func crash(name string, after time.Duration) error {
	command, err := d.Cluster.Run().Kill(name)
	if err != nil {
		return err
	}
	time.Sleep(after)
	_, err = d.Cluster.Run().Start(command)
	return err
}

// onTwoNodes returns an error if the failure of one node would be the failure of all pods of a component.
func onTwoNodes(ctx context.Context, component string) error {
	pods, err := d.Pods(ctx, component)
	if err != nil {
		return err
	}
	nodes := make(map[string]bool)
	for _, pod := range pods {
		nodes[pod.Spec.NodeName] = true
	}
	if len(nodes) < 2 {
		return fmt.Errorf("the %d pods of the %s are on %d node", len(pods), component, len(nodes))
	}
	return nil
}
