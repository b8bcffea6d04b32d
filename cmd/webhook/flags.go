package main

import (
	"flag"
	"log/slog"

	"github.com/credence-iam/credence/cmd/internal/injectflags"
	"github.com/credence-iam/credence/cmd/internal/program"
)

// options has the values of the flags, and what follows from them without calls to other systems.
type options struct {
	listen, tlsCert, tlsKey, kubeconfig string
	adminListen                         string // empty: no metrics
	level                               slog.Level
	resolvConf                          string // constant except in tests

	injectflags.Options
}

const usage = `credence-webhook responds to the API server's admission reviews. It adds a sidecar, which provides AWS
credentials, to each annotated pod, or refuses the pod with a reason.

Usage: credence-webhook --broker=ADDRESS --sidecar-image=IMAGE [flags]
       credence-webhook check --namespace=NAMESPACE [flags]`

// flags defines the flags. It returns the function that validates their values after parsing.
func flags(f *flag.FlagSet) func(args []string) (options, error) {
	o := options{resolvConf: resolvConf}
	f.StringVar(&o.listen, "listen", ":9443", "`address` to serve HTTPS on: /mutate, /healthz and /readyz")
	f.StringVar(&o.adminListen, "admin-listen", ":8080", "`address` to serve /metrics on, over plain HTTP; if empty, no metrics are served")
	f.StringVar(&o.tlsCert, "tls-cert", "/etc/credence/tls/tls.crt", "PEM `file` with the serving certificate; a replaced file takes effect without a restart")
	f.StringVar(&o.tlsKey, "tls-key", "/etc/credence/tls/tls.key", "PEM `file` with the certificate's private key")
	f.StringVar(&o.kubeconfig, "kubeconfig", "", "kubeconfig `file`; leave empty inside a cluster")
	f.TextVar(&o.level, "log-level", slog.LevelInfo, "lowest `level` that is logged: debug, info, warn or error")
	injection := injectflags.Define(f)
	return func(args []string) (options, error) {
		err := program.NoArguments(args)
		if err == nil {
			o.Options, err = injection()
		}
		return o, err
	}
}
