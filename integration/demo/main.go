//go:build unix

// Command demo shows the whole path from an annotated pod to an object in a bucket, step by step, on a real
// Kubernetes that it starts and removes again.
//
//	make demo
//	DEMO_ROLE=other make demo
//	KEEP=1 make demo
//
// As root on Linux it is a cluster with a node: cert-manager and Credence are installed with Helm, and pods run.
// Elsewhere it is a control plane without nodes, and what a node would run, runs as local processes with what
// their pod's spec says.
//
// Nothing it prints is canned: commands are run as they are shown, and show what they answered. The
// role of the pod is $DEMO_ROLE, "reports" if that is not set. The namespace permits "reports" and
// "other", by name or ARN, each of which opens the bucket of its own name; with any other role the
// demonstration ends, with exit status 1, at the refusal that a user would meet.
//
// It needs neither AWS nor a cluster, and leaves neither a process nor a folder behind, nor when it is
// interrupted. After a failure the logs are kept, and the error says where.
package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"slices"
	"syscall"
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/credence-iam/credence/integration/cluster"
	"github.com/credence-iam/credence/integration/tools"
)

func main() {
	// SIGHUP: the terminal was closed. SIGPIPE: whoever reads the output has gone; without this it would
	// end us before we could clean up.
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGPIPE)
	defer stop()
	d := &demo{
		printer: newPrinter(os.Stdout, wantsColor(os.Stdout)),
		role:    cmp.Or(os.Getenv("DEMO_ROLE"), "reports"), keep: os.Getenv("KEEP") != "" && os.Getenv("KEEP") != "0",
	}
	err := cluster.NodesPossible()
	if err == nil {
		err = d.run(ctx, onNodes(d))
	} else {
		d.say("Pods cannot run on this machine: " + err.Error() + ". So this is the demonstration without nodes.")
		err = d.run(ctx, onControlPlane(d))
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "\ndemo:", err)
		os.Exit(1)
	}
}

// demo is one demonstration: what to show, and what the steps have made so far.
type demo struct {
	*printer

	role string // as the pod's annotation has it
	runs string // where the cluster's folder is made; empty: the default
	keep bool   // leave it running in the end, until a signal comes

	cluster *cluster.Cluster
	kubectl string // the path of the program
	pod     *corev1.Pod
}

// play is what a kind of demonstration consists of.
type play struct {
	opening string
	needs   []tools.Tool
	steps   []step // each relies on those before it
	kept    func() // says more of how to use what is kept
}

// step is one headline, and what is shown under it.
type step struct {
	headline string
	do       func(context.Context) error
}

// signalDelay is how long after a command's end a signal may come that has ended it: ample, and not felt.
const signalDelay = 200 * time.Millisecond

// run runs the steps until one fails or ctx ends, and cleans up whatever happens.
func (d *demo) run(ctx context.Context, p play) (err error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel() // ends the STS, which runs in this process
	defer func() {
		if err == nil {
			return
		}
		// A Ctrl-C reaches the commands that we run too, and their end may be seen before the signal.
		signaled, stop := context.WithTimeout(ctx, signalDelay)
		<-signaled.Done()
		stop()
		if ctx.Err() != nil {
			err = errors.New("interrupted; cleaned up")
		}
		if d.cluster == nil {
			return
		}
		if ctx.Err() == nil && !errors.Is(err, errRefused) {
			d.cluster.Run().KeepLogs()
			err = fmt.Errorf("%w\nlogs are kept for a day in %s", err, d.cluster.Logs())
		}
		err = errors.Join(err, d.cluster.Stop())
	}()
	d.say("Credence gives each annotated pod AWS credentials of its own. Here is the whole path, on a real " + p.opening)
	if err := d.build(ctx, p.needs); err != nil {
		return err
	}
	took := make([]time.Duration, len(p.steps))
	for i, step := range p.steps {
		d.headline(fmt.Sprintf("%d  %s", i, step.headline))
		began := time.Now()
		if err := step.do(ctx); err != nil {
			return err
		}
		took[i] = time.Since(began)
		d.took(took[i])
	}
	d.closing(p.steps, took)
	if d.keep {
		d.headline("Kept, until you press Ctrl-C")
		d.say("In another terminal:")
		d.typed("", append(d.cluster.Enter(), d.kubectl, "--kubeconfig="+d.cluster.Kubeconfig(), "get", "pods", "--all-namespaces")...)
		p.kept()
		<-ctx.Done()
	}
	return d.cleanUp()
}

// build builds the programs that are not built yet.
func (d *demo) build(ctx context.Context, needed []tools.Tool) error {
	missing := slices.DeleteFunc(slices.Clone(needed), tools.Built)
	if len(missing) == 0 {
		return nil
	}
	d.headline("Build what is missing, from source, once")
	for _, tool := range missing {
		if _, err := tools.Path(ctx, tool, d); err != nil {
			return err
		}
	}
	return nil
}

// closing prints the times of all steps, and what to try next.
func (d *demo) closing(steps []step, took []time.Duration) {
	d.headline("Times")
	var total time.Duration
	for i, step := range steps {
		d.line(plain, fmt.Sprintf("%s%6.2f s   %2d  %s", proseIndent, took[i].Seconds(), i, step.headline))
		total += took[i]
	}
	d.line(plain, fmt.Sprintf("%s%6.2f s   in all", proseIndent, total.Seconds()))
	d.headline("What to try next")
	d.item("DEMO_ROLE="+d.foreign()+" make demo", "the other role: it opens the other bucket, and is refused this one")
	d.item("DEMO_ROLE=admin make demo", "a role that the namespace does not permit")
	if !d.keep {
		d.item("KEEP=1 make demo", "the same, and it stays until you press Ctrl-C")
	}
	d.item("docs/architecture.md", "how it works, with one diagram")
	d.item("make test", "the same and much more, as tests, on the same control plane")
}

// cleanUp ends every process and removes their folder. There is no data to save, so nobody is asked to
// drain.
func (d *demo) cleanUp() error {
	d.headline("Clean up")
	if err := d.cluster.Stop(); err != nil {
		return err
	}
	d.say("Every process is ended, and the folder they worked in is removed.")
	return nil
}
