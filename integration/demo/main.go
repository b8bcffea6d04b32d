//go:build unix

// Command demo shows the whole path from an annotated pod to an object in a bucket, step by step, on a
// real Kubernetes control plane that it starts and removes again.
//
//	make demo
//	DEMO_ROLE=other make demo
//
// Nothing it prints is canned: commands are run as they are shown, and show what they answered. The
// role of the pod is $DEMO_ROLE, "reports" if that is not set. The namespace permits "reports" and
// "other", by name or ARN, each of which opens the bucket of its own name; with any other role the
// demonstration ends, with exit status 1, at the refusal that a user would meet.
//
// It needs neither root, nor AWS, nor a cluster, and leaves neither a process nor a folder behind, nor
// when it is interrupted. After a failure the logs are kept, and the error says where. It runs no
// container: there is no node, so programs run as local processes with what their pod's spec says.
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
	"github.com/credence-iam/credence/integration/minio"
	"github.com/credence-iam/credence/integration/stack"
)

func main() {
	// SIGHUP: the terminal was closed. SIGPIPE: whoever reads the output has gone; without this it would
	// end us before we could clean up.
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGPIPE)
	defer stop()
	d := &demo{printer: newPrinter(os.Stdout, wantsColor(os.Stdout)), role: cmp.Or(os.Getenv("DEMO_ROLE"), "reports")}
	if err := d.run(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "\ndemo:", err)
		os.Exit(1)
	}
}

// demo is one demonstration: what to show, and what the steps have made so far.
type demo struct {
	*printer

	role string // as the pod's annotation has it
	runs string // where the cluster's folder is made; empty: the default

	cluster   *cluster.Cluster
	store     *minio.Server
	stack     *stack.Stack
	kubectl   string // the path of the program
	awsclient string // the path of the program
	pod       *corev1.Pod
	sidecar   *stack.Sidecar
}

// steps are what is shown, in order. Each relies on those before it.
var steps = []struct {
	headline string
	do       func(*demo, context.Context) error
}{
	{"Start a control plane, Credence, an STS and an object store", (*demo).start},
	{"A namespace opts in, and says which roles its pods may have", (*demo).optIn},
	{"A pod asks for a role", (*demo).createPod},
	{"What the webhook has added to it", (*demo).showInjected},
	{"The token that says which pod this is", (*demo).showToken},
	{"The injected sidecar, run as the pod's spec says", (*demo).runSidecar},
	{"The application: an AWS SDK that knows nothing of Credence", (*demo).runApplication},
	{"What is refused, while somebody is looking", (*demo).showRefusals},
	{"What the broker has written down", (*demo).showAudit},
	{"Clean up", (*demo).cleanUp},
}

// signalDelay is how long after a command's end a signal may come that has ended it: ample, and not felt.
const signalDelay = 200 * time.Millisecond

// run runs the steps until one fails or ctx ends, and cleans up whatever happens.
func (d *demo) run(ctx context.Context) (err error) {
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
	d.say("Credence gives each annotated pod AWS credentials of its own. Here is the whole path, on a real " +
		"Kubernetes control plane without nodes: what a node would run, runs here as local processes.")
	took := make([]time.Duration, len(steps))
	for i, step := range steps {
		d.headline(fmt.Sprintf("%d  %s", i, step.headline))
		began := time.Now()
		if err := step.do(d, ctx); err != nil {
			return err
		}
		took[i] = time.Since(began)
		d.took(took[i])
	}
	d.closing(took)
	return nil
}

// closing prints the times of all steps, and what to try next.
func (d *demo) closing(took []time.Duration) {
	d.headline("Times")
	var total time.Duration
	for i, step := range steps {
		d.line(plain, fmt.Sprintf("%s%6.2f s   %d  %s", proseIndent, took[i].Seconds(), i, step.headline))
		total += took[i]
	}
	d.line(plain, fmt.Sprintf("%s%6.2f s   in all", proseIndent, total.Seconds()))
	d.headline("What to try next")
	d.item("DEMO_ROLE="+d.foreign()+" make demo", "the other role: it opens the other bucket, and is refused this one")
	d.item("DEMO_ROLE=admin make demo", "a role that the namespace does not permit")
	d.item("docs/architecture.md", "how it works, with one diagram")
	d.item("make test", "the same and much more, as tests, on the same control plane")
}

// cleanUp ends every process and removes their folder. There is no data to save, so nobody is asked to
// drain.
func (d *demo) cleanUp(context.Context) error {
	if err := d.cluster.Stop(); err != nil {
		return err
	}
	d.say("Every process is ended, and the folder they worked in is removed.")
	return nil
}
