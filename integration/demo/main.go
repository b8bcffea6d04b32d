//go:build unix

// Command demo shows the path from an annotated pod to an object in a bucket, step by step. It starts a real Kubernetes
// for that, and removes it again.
//
//	make demo
//	DEMO_ROLE=other make demo
//	KEEP=1 make demo
//
// As root on Linux it starts a cluster with a node, installs cert-manager and Credence with Helm, and runs pods.
// Elsewhere it starts a control plane without nodes, and runs as local processes what a node would run.
//
// No output is canned: the demo runs each command as shown, and shows its output. DEMO_ROLE is the role of the pod, by
// default "reports". The namespace permits the roles "reports" and "other", by name or ARN. Each opens the bucket of its
// own name. With any other role the demo ends at the refusal that a user would meet, with exit status 1.
//
// It needs neither AWS nor a cluster. It leaves no process and no folder behind, also when it is interrupted. After a
// failure it keeps the logs, and the error says where.
package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"syscall"
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/credence-iam/credence/integration/cluster"
)

func main() {
	// SIGHUP: the terminal was closed. SIGPIPE: the reader of the output has ended; by default it would end this program
	// before the cleanup.
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGPIPE)
	defer stop()
	d := &demo{
		printer: &printer{out: os.Stdout, color: wantsColor(os.Stdout)},
		role:    cmp.Or(os.Getenv("DEMO_ROLE"), "reports"), keep: os.Getenv("KEEP") != "" && os.Getenv("KEEP") != "0",
	}
	kind := onNodes
	if err := cluster.NodesPossible(); err != nil {
		d.say("Pods cannot run on this machine: " + err.Error() + ". So this demo has no nodes.")
		kind = onControlPlane
	}
	if err := d.run(ctx, kind(d)); err != nil {
		fmt.Fprintln(os.Stderr, "\ndemo:", err)
		os.Exit(1)
	}
}

// demo is one run of the demo: its settings, and what its steps have made so far.
type demo struct {
	*printer

	role string // as in the pod's annotation
	runs string // the parent of the cluster's folder; empty: the default
	keep bool   // leave everything running at the end, until a signal

	cluster *cluster.Cluster
	kubectl string // the path of the program
	pod     *corev1.Pod
}

// play is one kind of demo.
type play struct {
	opening string
	steps   []step // each needs those before it
	kept    func() // says how to use what is kept
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
	defer cancel() // stops the STS, which runs in this process
	defer func() {
		if err == nil {
			return
		}
		// Ctrl-C also reaches the commands that run, and their end may be seen before the signal.
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
			err = fmt.Errorf("%w\nthe logs are kept for a day in %s", err, d.cluster.Logs())
		}
		err = errors.Join(err, d.cluster.Stop())
	}()
	d.say("Credence gives each annotated pod its own short-lived AWS credentials.\nThis demo shows the whole path on a real " + p.opening)
	for i, step := range p.steps {
		d.headline(fmt.Sprintf("%d  %s", i, step.headline))
		if step.explanation != "" {
			d.say(step.explanation)
		}
		began := time.Now()
		if err := step.do(ctx); err != nil {
			return err
		}
		d.print(faint, "   ", fmt.Sprintf("(%.2f s)", time.Since(began).Seconds()))
	}
	d.headline("Try next")
	d.say(fmt.Sprintf(`DEMO_ROLE=%-16s the other role: it opens the other bucket, but not this one
DEMO_ROLE=admin make demo  a role that the namespace does not permit
KEEP=1 make demo           the same, running until you press Ctrl-C
docs/architecture.md       how it works, with one diagram
make test                  the tests, on the same control plane`, d.foreign()+" make demo"))
	if d.keep {
		d.headline("Running until you press Ctrl-C")
		d.say("In another terminal:")
		d.typed("", append(d.cluster.Enter(), d.kubectl, "--kubeconfig="+d.cluster.Kubeconfig(), "get", "pods", "--all-namespaces")...)
		p.kept()
		<-ctx.Done()
	}
	d.headline("Clean up")
	if err := d.cluster.Stop(); err != nil { // There is no data to save, so no program drains.
		return err
	}
	d.say("All processes are stopped, and their folder is removed.")
	return nil
}
