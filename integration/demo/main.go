//go:build unix

// Command demo shows the path from an annotated pod to an object in a bucket, step by step. It starts a real Kubernetes
// for that, and removes it again.
//
//	make demo
//	DEMO_ROLE=other make demo
//	KEEP=1 make demo
//	make demo CONTEXT=NAME
//
// As root on Linux it starts a cluster with a node, installs cert-manager and Credence with Helm, and runs pods. If the
// programs for that must be built first, it has two parts: it shows what a control plane alone can show while it builds
// those for the node. Where nodes cannot run, it runs as local processes what a node would run.
//
// No output is canned: the demo runs each command as shown, and shows its output. DEMO_ROLE is the role of the pod, by
// default "reports". The namespace permits the roles "reports" and "other", by name or ARN. Each opens the bucket of its
// own name. With any other role the demo ends at the refusal that a user would meet, with exit status 1.
//
// It needs neither AWS nor a cluster. It leaves no process and no folder behind, also when it is interrupted. After a
// failure it keeps the logs, and the error says where.
//
// CONTEXT names a context of the user's kubeconfig files. Then the demo runs on that cluster, where Credence must be
// installed. It asks first, unless CONFIRM is yes. It makes one namespace and removes it again. Its pods are dry runs.
package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/klog/v2"

	"github.com/credence-iam/credence/integration/cluster"
	"github.com/credence-iam/credence/integration/tools"
)

func main() {
	// SIGHUP: the terminal was closed. SIGPIPE: the reader of the output has ended; by default it would end this program
	// before the cleanup.
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGPIPE)
	defer stop()
	klog.SetSlogLogger(slog.New(slog.DiscardHandler)) // client-go would log to the terminal, between the lines of a step
	d := &demo{
		printer: &printer{out: os.Stdout, color: wantsColor(os.Stdout)},
		role:    os.Getenv("DEMO_ROLE"), keep: os.Getenv("KEEP") != "" && os.Getenv("KEEP") != "0",
	}
	d.say("Credence gives each annotated pod its own short-lived AWS credentials.")
	p, err := choose(ctx, d, os.Getenv("CONTEXT"))
	if err == nil {
		err = d.run(ctx, p)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "\ndemo:", err)
		os.Exit(1)
	}
}

// choose returns the kind of demo for this machine, or for the context.
func choose(ctx context.Context, d *demo, name string) (play, error) {
	if name != "" {
		return onContext(ctx, d, name, os.Stdin)
	}
	if err := cluster.NodesPossible(); err != nil {
		p := onControlPlane(d)
		p.opening += "\nIt has no nodes, because pods cannot run on this machine: " + err.Error() + "."
		return p, nil
	}
	missing := notBuilt(tools.Deployment())
	if slices.ContainsFunc(missing, onlyForNodes) {
		return inTwoParts(d, missing), nil
	}
	return onNodes(d, missing), nil
}

// notBuilt returns those of the tools that must be built first.
func notBuilt(list []tools.Tool) (missing []tools.Tool) {
	for _, tool := range list {
		if !tools.Built(tool) {
			missing = append(missing, tool)
		}
	}
	return missing
}

// onlyForNodes reports whether a control plane alone does not need the tool.
func onlyForNodes(tool tools.Tool) bool { return !slices.Contains(tools.ControlPlane(), tool) }

// demo is one run of the demo: its settings, and what its steps have made so far.
type demo struct {
	*printer

	role string // as in the pod's annotation; empty: a default
	runs string // the parent of the cluster's folder; empty: the default
	keep bool   // leave everything running at the end, until a signal

	namespace  string           // of the pods
	prefix     string           // of labels and annotations
	cluster    *cluster.Cluster // nil: none yet, or the user's
	kubectl    string           // the path of the program
	kubeFlags  []string         // that each call has
	background *background      // nil: nothing is built in the background
	pod        *corev1.Pod
}

// play is one kind of demo.
type play struct {
	opening string
	steps   []step // each needs those before it
	next    string // what a user can try next
	kept    func() // says how to use what is kept
	stop    func(context.Context) error
	stopped string // what stop has done
}

// step is a headline, an explanation, and what is shown below them.
type step struct {
	headline, explanation string
	do                    func(context.Context) error
}

// signalDelay is how long after a command's end the signal may arrive that ended it. It is ample, and too short to notice.
const signalDelay = 200 * time.Millisecond

// run runs the steps until one fails or ctx ends, and always cleans up.
func (d *demo) run(ctx context.Context, p play) (err error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel() // stops the doubles, which run in this process
	stop := func() error {
		cleanup := context.WithoutCancel(ctx)
		cancel()
		_ = d.background.wait() // for its compilers; a step has reported its error
		return p.stop(cleanup)
	}
	defer func() {
		if err == nil {
			return
		}
		// Ctrl-C also reaches the commands that run, and their end may be seen before the signal.
		signaled, done := context.WithTimeout(ctx, signalDelay)
		<-signaled.Done()
		done()
		switch {
		case ctx.Err() != nil:
			err = errors.New("interrupted; cleaned up")
		case d.cluster != nil && !errors.Is(err, errRefused):
			d.cluster.Run().KeepLogs()
			err = fmt.Errorf("%w\nthe logs are kept for a day in %s", err, d.cluster.Logs())
		}
		err = errors.Join(err, stop())
	}()
	d.say(p.opening)
	for i, step := range p.steps {
		d.headline(fmt.Sprintf("%d  %s", i, step.headline))
		if step.explanation != "" {
			d.say(step.explanation)
		}
		began := time.Now()
		if err := step.do(ctx); err != nil {
			return err
		}
		d.print(faint, "   ", fmt.Sprintf("(%.2f s)%s", time.Since(began).Seconds(), d.background.news()))
	}
	d.headline("Try next")
	d.say(p.next)
	if d.keep {
		d.headline("Running until you press Ctrl-C")
		p.kept()
		<-ctx.Done()
	}
	d.headline("Clean up")
	if err := stop(); err != nil { // There is no data to save, so no program drains.
		return err
	}
	d.say(p.stopped)
	return nil
}

// local completes a play on a cluster that the demo makes.
func (d *demo) local(p play) play {
	d.role, d.namespace, d.prefix = cmp.Or(d.role, buckets[0]), "shop", "iam.amazonaws.com"
	p.next = fmt.Sprintf(`DEMO_ROLE=%-16s the other role: it opens the other bucket, but not this one
DEMO_ROLE=admin make demo  a role that the namespace does not permit
KEEP=1 make demo           the same, running until you press Ctrl-C
docs/architecture.md       how it works, with one diagram
make test                  the tests, on the same control plane`, d.foreign()+" make demo")
	kept := p.kept
	p.kept = func() {
		d.say("In another terminal:")
		d.typed("", append(d.cluster.Enter(), d.kubectl, "--kubeconfig="+d.cluster.Kubeconfig(), "get", "pods", "--all-namespaces")...)
		if kept != nil {
			kept()
		}
	}
	p.stop = func(context.Context) error { return d.stopCluster() }
	p.stopped = "All processes are stopped, and their folder is removed."
	return p
}

func (d *demo) stopCluster() error {
	if d.cluster == nil {
		return nil
	}
	return d.cluster.Stop()
}

// How long the demo takes on two processors with empty caches, and until the control plane is built. Measured: 7.4 and 5.2
// minutes.
const (
	allMinutes          = 8
	controlPlaneMinutes = 6
)

// takes says how long a demo takes that needs these programs.
func takes(missing []tools.Tool) string {
	if len(missing) == 0 {
		return "All programs are built, so it takes about a minute. You can press Ctrl-C at any time: nothing keeps running."
	}
	folder, err := tools.CacheDir()
	if err != nil {
		folder = "the cache folder" // the build will report the error
	}
	var lines []string
	for line := range slices.Chunk(missing, 8) {
		lines = append(lines, names(line))
	}
	minutes := fmt.Sprintf("%d minutes", controlPlaneMinutes)
	if slices.ContainsFunc(missing, onlyForNodes) {
		minutes = fmt.Sprintf("%d minutes, %d of them until the control plane is built", allMinutes, controlPlaneMinutes)
	}
	return fmt.Sprintf(`These programs are not built yet, and are built from source:
  %s.
On two processors with empty caches, this takes about %s.
All programs together take about 1 GB in %s, and their parts several in Go's cache.
You can press Ctrl-C at any time: nothing keeps running, and the next run builds only what is missing.`,
		strings.Join(lines, ",\n  "), minutes, folder)
}

func names(list []tools.Tool) string {
	texts := make([]string, len(list))
	for i, tool := range list {
		texts[i] = string(tool)
	}
	return strings.Join(texts, ", ")
}
