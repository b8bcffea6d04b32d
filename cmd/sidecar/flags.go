package main

import (
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"os"
	"time"

	"github.com/credence-iam/credence/broker/policy"
	"github.com/credence-iam/credence/sidecar/contract"
)

const usage = `credence-sidecar serves a pod's AWS credentials to the SDKs in that pod; with the argument probe,
it waits until the one that serves has credentials.

Usage: credence-sidecar [flags] [probe]

The webhook runs it in each pod that it injects. Each flag but version can be set by an environment variable:
--token-file by CREDENCE_TOKEN_FILE, and so on. All but broker-dns-name, listen, log-level, metadata, routing-key,
pod-uid, zone and start-timeout are required to serve; probe needs none.`

type options struct {
	broker, dnsName, routingKey, podUID, listen, tokenFile, rootsFile, authorization, metadata, zone string
	startTimeout                                                                                     time.Duration
	level                                                                                            slog.Level
	probe                                                                                            bool
}

// flags defines the flags, with what the environment says as their defaults.
func flags(f *flag.FlagSet) func([]string) (options, error) {
	var o options
	f.StringVar(&o.broker, contract.Broker, "", "where the brokers are, `HOST:PORT`")
	f.StringVar(&o.dnsName, contract.BrokerDNSName, "", "full `name` that is looked up for the brokers' addresses, with a final dot; if empty or if it does not exist, the host of --broker is looked up, which is also what certificates must be for")
	f.StringVar(&o.routingKey, contract.RoutingKey, "", "`text` that says which brokers have the pod's session warm; empty asks any of them")
	f.StringVar(&o.podUID, contract.PodUID, "", "the pod's `UID`, where its session is its own: a part of the routing key")
	f.StringVar(&o.listen, contract.Listen, "127.0.0.1:9779", "loopback `address` to serve on")
	f.StringVar(&o.tokenFile, contract.TokenFile, "", "`file` with the pod's token for the broker; read at each call")
	f.StringVar(&o.rootsFile, contract.RootsFile, "", "PEM `file` with the certificates that the broker is verified against; read at each handshake")
	f.StringVar(&o.authorization, contract.Authorization, "", "`text` that requests for container credentials must carry")
	f.StringVar(&o.metadata, contract.Metadata, string(policy.MetadataV2), "`form` of the emulated instance metadata: v2, v1 as well, or off")
	f.StringVar(&o.zone, contract.Zone, "", "availability `zone` that the pod runs in, for the emulated instance metadata; empty when unknown")
	f.DurationVar(&o.startTimeout, contract.StartTimeout, policy.DefaultStartTimeout,
		"how long probe waits for the first credentials; 0 for ever (`duration`)")
	f.TextVar(&o.level, contract.LogLevel, slog.LevelInfo, "least `level` that is logged: debug, info, warn or error")
	problem := setFromEnv(f)

	return func(args []string) (options, error) {
		switch {
		case problem != nil:
			return options{}, problem
		case len(args) == 1 && args[0] == contract.ProbeArgument:
			o.probe = true
			return o, nil
		case len(args) > 0:
			return options{}, fmt.Errorf("unexpected argument %q: there is probe, and none to serve", args[0])
		}
		for _, name := range []string{contract.Broker, contract.TokenFile, contract.RootsFile, contract.Authorization} {
			if f.Lookup(name).Value.String() == "" {
				return options{}, fmt.Errorf("--%s or %s is required", name, contract.Env(name))
			}
		}
		return o, nil
	}
}

// key is the routing key as brokers make it of the pod. The UID is not in what the webhook writes, since a pod
// has none by then.
func (o options) key() policy.RoutingKey {
	key := policy.RoutingKey(o.routingKey)
	if key != "" && o.podUID != "" {
		key = key.ForPod(o.podUID)
	}
	return key
}

func setFromEnv(f *flag.FlagSet) error {
	var problems []error
	f.VisitAll(func(f *flag.Flag) {
		value, ok := os.LookupEnv(contract.Env(f.Name))
		if !ok || f.Name == "version" {
			return
		}
		if err := f.Value.Set(value); err != nil {
			problems = append(problems, fmt.Errorf("%s is %q: %w", contract.Env(f.Name), value, err))
		}
	})
	return errors.Join(problems...)
}
