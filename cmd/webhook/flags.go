package main

import (
	"flag"
	"log/slog"

	"github.com/credence-iam/credence/cmd/internal/injectflags"
	"github.com/credence-iam/credence/cmd/internal/program"
)

// options are the flags, and what is made of them without asking anybody: a value that cannot be
// right is a bad flag.
type options struct {
	listen, tlsCert, tlsKey, kubeconfig string
	adminListen                         string // empty: there are no metrics
	level                               slog.Level
	resolvConf                          string // always the same, but in tests

	injectflags.Options
}

const usage = `credence-webhook answers the API server's admission reviews: pods that are annotated
with a role get a sidecar that brings them AWS credentials, or are refused with the reason.

Usage: credence-webhook --broker=ADDRESS --sidecar-image=IMAGE [flags]`

// flags defines the flags; what it returns parses their values.
func flags(f *flag.FlagSet) func(args []string) (options, error) {
	o := options{resolvConf: resolvConf}
	f.StringVar(&o.listen, "listen", ":9443", "`address` to serve HTTPS on: /mutate, /healthz and /readyz")
	f.StringVar(&o.adminListen, "admin-listen", ":8080", "`address` to serve /metrics on, over plain HTTP; empty serves none")
	f.StringVar(&o.tlsCert, "tls-cert", "/etc/credence/tls/tls.crt", "PEM `file` with the serving certificate; replaced files are taken up without a restart")
	f.StringVar(&o.tlsKey, "tls-key", "/etc/credence/tls/tls.key", "PEM `file` with its private key")
	f.StringVar(&o.kubeconfig, "kubeconfig", "", "kubeconfig `file`; empty inside a cluster")
	f.TextVar(&o.level, "log-level", slog.LevelInfo, "least `level` that is logged: debug, info, warn or error")
	injection := injectflags.Define(f)
	return func(args []string) (options, error) {
		err := program.NoArguments(args)
		if err == nil {
			o.Options, err = injection()
		}
		return o, err
	}
}
