// Command credence helps manifest authors and cluster admins. Its command inject changes files as the webhook changes pods.
//
// It writes its result to standard output and messages to standard error. It exits with status 1 if it refuses something
// or fails, and with 2 if its command line is wrong.
package main

import (
	"context"
	"os"

	"github.com/credence-iam/credence/cmd/internal/program"
	"github.com/credence-iam/credence/operator"
)

func main() {
	program.Commands{
		Name:  "credence",
		Usage: usage,
		Commands: []program.Command{
			program.Program[operator.InjectConfig]{
				Name: "credence inject", Usage: injectUsage, Flags: injectFlags, Run: inject,
			}.Command("change manifests as the webhook changes pods"),
		},
	}.Main()
}

func inject(ctx context.Context, cfg operator.InjectConfig) error {
	cfg.Stdin, cfg.Stdout, cfg.Stderr = os.Stdin, os.Stdout, os.Stderr
	return operator.Inject(ctx, cfg)
}
