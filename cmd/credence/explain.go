package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"slices"

	"github.com/spf13/cobra"
	"k8s.io/klog/v2"

	"github.com/credence-iam/credence/operator/explain"
	"github.com/credence-iam/credence/operator/finding"
	"github.com/credence-iam/credence/operator/installation"
	"github.com/credence-iam/credence/operator/snapshot"
)

// explainOptions are the flags of explain.
type explainOptions struct {
	file       string
	output     *output
	watch, try bool
}

// newExplain returns the command explain.
func newExplain(c *cluster) *cobra.Command {
	var o explainOptions
	command := &cobra.Command{
		Use:   "explain (POD | KIND/NAME | -f FILE)",
		Short: "say why a pod has no credentials, and what to do",
		Long: `Follows the credentials' way to one pod: from the label of its namespace through admission, sidecar, brokers and STS
to the environment of its containers. Ends with one sentence: the cause, and what to do.

Of a controller, such as deployment/cart, it explains the pod that shows most, or why there is none. With -f it says
what would happen to the pods and controllers of a manifest. It changes nothing, unless --try is set, and reads no
Secret.

It exits with status 0 if nothing is wrong, and with 1 if something is.`,
		Example: `  credence explain cart-7d4b9c-x2x5q -n shop
  credence explain deployment/cart -n shop --watch
  credence explain -f cart.yaml -o json`,
	}
	f := command.Flags()
	f.StringVarP(&o.file, "filename", "f", "", "YAML or JSON `file` with pods and controllers to explain, - for standard input")
	f.BoolVarP(&o.watch, "watch", "w", false, "repeat until nothing is wrong")
	f.BoolVar(&o.try, "try", false, "also request credentials from inside the pod, by an ephemeral container, which stays in the pod's status")
	o.output = newOutput(command, formatJSON)
	command.Args = func(_ *cobra.Command, args []string) error {
		switch {
		case o.file == "" && len(args) != 1:
			return wrongFlags(errors.New("name one pod, one controller as KIND/NAME, or a file with -f"))
		case o.file != "" && len(args) > 0:
			return wrongFlags(fmt.Errorf("-f and %q cannot be combined", args[0]))
		case o.file != "" && o.watch:
			return wrongFlags(errors.New("-f and --watch cannot be combined: a file does not change by itself"))
		case o.try && (o.file != "" || o.watch):
			return wrongFlags(errors.New("--try can be combined neither with -f nor with --watch: it changes a pod, once"))
		}
		return nil
	}
	command.RunE = func(command *cobra.Command, args []string) error {
		klog.SetSlogLogger(slog.New(slog.DiscardHandler)) // client-go logs a response that comes too late. The step says so, too.
		ctx, out := command.Context(), command.OutOrStdout()
		if o.file != "" {
			return c.explainFile(ctx, interruptible(ctx, command.InOrStdin()), out, o)
		}
		kind, name, err := snapshot.ParseTarget(args[0])
		if err != nil {
			return wrongFlags(err)
		}
		return c.explainTarget(ctx, out, kind, name, o)
	}
	return command
}

// explainTarget explains a pod or controller of the cluster.
func (c *cluster) explainTarget(ctx context.Context, out io.Writer, kind, name string, o explainOptions) error {
	namespace, err := c.namespaceOrDefault()
	if err != nil {
		return err
	}
	var last []finding.Finding
	for first := true; ; first = false {
		x, err := c.explain(ctx, snapshot.Request{Namespace: namespace, Kind: kind, Name: name}, o.try)
		if err != nil {
			return err
		}
		// Texts have ages, which always change. A step that is briefly unknown is not a change.
		now := slices.DeleteFunc(slices.Clone(x.Findings), func(f finding.Finding) bool { return f.State == finding.Unknown })
		if first || x.Healthy || !slices.EqualFunc(last, now, func(a, b finding.Finding) bool { return a.Step == b.Step && a.State == b.State }) {
			if !first && !o.output.json() {
				_, _ = fmt.Fprintln(out)
			}
			if err := writeExplanation(out, x, o.output); err != nil {
				return err
			}
		}
		last = now
		if x.Healthy || !o.watch {
			return found(x)
		}
		if wait(ctx, watchInterval); ctx.Err() != nil {
			return found(x)
		}
	}
}

// explainFile explains the pods and controllers of a file.
func (c *cluster) explainFile(ctx context.Context, stdin io.Reader, out io.Writer, o explainOptions) error {
	if o.file != "-" {
		file, err := os.Open(o.file)
		if err != nil {
			return err
		}
		defer file.Close()
		stdin = file
	}
	manifests, err := snapshot.ReadManifests(stdin)
	switch {
	case err != nil:
		return fmt.Errorf("reading %s: %w", o.file, err)
	case len(manifests) == 0:
		return fmt.Errorf("%s has no pod and no controller", o.file)
	}
	namespace, err := c.namespaceOrDefault()
	if err != nil {
		return err
	}
	var result error
	for i, manifest := range manifests {
		request := snapshot.Request{Namespace: namespace, Manifest: &manifest, File: o.file}
		if manifest.Namespace != "" {
			request.Namespace = manifest.Namespace
		}
		x, err := c.explain(ctx, request, false)
		if err != nil {
			return err
		}
		if i > 0 && !o.output.json() {
			_, _ = fmt.Fprintln(out)
		}
		if err := writeExplanation(out, x, o.output); err != nil {
			return err
		}
		result = errors.Join(result, found(x))
	}
	return result
}

// explain explains what the request names. If try is set, it also requests credentials in the pod.
func (c *cluster) explain(ctx context.Context, r snapshot.Request, try bool) (explain.Explanation, error) {
	client, known, err := c.find(ctx)
	if err != nil && !errors.Is(err, installation.ErrNone) {
		return explain.Explanation{}, err
	}
	r.Judge = judgeOf(known)
	r.Target = c.target()
	s, err := snapshot.Gather(ctx, client, known, r)
	if err != nil {
		return explain.Explanation{}, err
	}
	if try {
		if err := s.Try(ctx, client); err != nil {
			s.Problems[snapshot.SourceTrial] = snapshot.ProblemOf(err)
		}
	}
	return explain.Explain(s), nil
}

// found returns errFound if the explanation has something wrong.
func found(x explain.Explanation) error {
	if _, wrong := x.Cause(); wrong {
		return errFound
	}
	return nil
}

func writeExplanation(out io.Writer, x explain.Explanation, o *output) error {
	if o.json() {
		return finding.WriteJSON(out, x)
	}
	return x.Write(out, finding.Style{Color: colored(out)})
}
