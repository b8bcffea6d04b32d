// Command credence is for those who write manifests and those who run a cluster. Its command inject does to
// files what the webhook does to pods.
//
// What it makes goes to standard output, and what is to be said of it to standard error. It exits with 1 when
// something is refused or cannot be done, and with 2 when its command line cannot be right.
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
			}.Command("do to manifests what the webhook does to pods"),
		},
	}.Main()
}

func inject(ctx context.Context, cfg operator.InjectConfig) error {
	cfg.Stdin, cfg.Stdout, cfg.Stderr = os.Stdin, os.Stdout, os.Stderr
	return operator.Inject(ctx, cfg)
}
