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

const usage = `credence-sidecar serves a pod's AWS credentials to the SDKs in that pod. With the argument probe,
it waits until the serving process has credentials, and fails now and then to report why there are none. With the
argument check, in a container of the application, it requests credentials as an SDK does, and prints the role, the
end of the access key ID and the expiration.

Usage: credence-sidecar [flags] [probe|check]

The webhook runs it in each pod that it injects. An environment variable can set each flag except version:
CREDENCE_TOKEN_FILE sets --token-file, and so on. Required are only authorization, broker, roots-file and
token-file. probe and check require no flag. Without the authorization, probe reports nothing.`

type options struct {
	broker, dnsName, routingKey, podUID, listen, tokenFile, rootsFile, authorization, metadata, zone string
	startTimeout                                                                                     time.Duration
	level                                                                                            slog.Level
	probe, check                                                                                     bool
}

// flags defines the flags. Environment variables set their defaults.
func flags(f *flag.FlagSet) func([]string) (options, error) {
	var o options
	f.StringVar(&o.broker, contract.Broker, "", "address of the brokers, `HOST:PORT`")
	f.StringVar(&o.dnsName, contract.BrokerDNSName, "", "full DNS `name` of the brokers, with a final dot. If it is empty or does not exist, the host of --broker is looked up. Certificates must be for the host of --broker")
	f.StringVar(&o.routingKey, contract.RoutingKey, "", "`key` that determines which brokers own the pod's session; if empty, any broker is called")
	f.StringVar(&o.podUID, contract.PodUID, "", "the pod's `UID`, part of the routing key if the pod does not share its session")
	f.StringVar(&o.listen, contract.Listen, "127.0.0.1:9779", "loopback `address` to serve on")
	f.StringVar(&o.tokenFile, contract.TokenFile, "", "`file` with the pod's token for the broker, read at each call")
	f.StringVar(&o.rootsFile, contract.RootsFile, "", "PEM `file` with the brokers' root certificates, read at each handshake")
	f.StringVar(&o.authorization, contract.Authorization, "", "`text` that requests for container credentials must have in their Authorization header")
	f.StringVar(&o.metadata, contract.Metadata, string(policy.MetadataV2), "`mode` of the emulated instance metadata: v2 (IMDSv2 only), v1 (IMDSv1 too) or off")
	f.StringVar(&o.zone, contract.Zone, "", "availability `zone` of the pod's node, for the emulated instance metadata; empty if unknown")
	f.DurationVar(&o.startTimeout, contract.StartTimeout, policy.DefaultStartTimeout,
		"maximum `time` that the startup probe waits for the first credentials; 0 means no limit")
	f.TextVar(&o.level, contract.LogLevel, slog.LevelInfo, "lowest `level` that is logged: debug, info, warn or error")
	envError := setFromEnv(f)

	return func(args []string) (options, error) {
		switch {
		case envError != nil:
			return options{}, envError
		case len(args) == 1 && args[0] == contract.ProbeArgument:
			o.probe = true
			return o, nil
		case len(args) == 1 && args[0] == contract.CheckArgument:
			o.check = true
			return o, nil
		case len(args) > 0:
			return options{}, fmt.Errorf("unexpected argument %q; the only arguments are probe and check", args[0])
		}
		for _, name := range []string{contract.Broker, contract.TokenFile, contract.RootsFile, contract.Authorization} {
			if f.Lookup(name).Value.String() == "" {
				return options{}, fmt.Errorf("--%s or %s is required", name, contract.Env(name))
			}
		}
		return o, nil
	}
}

// key returns the same routing key that the brokers compute for the pod. The webhook cannot include the UID, because
// a pod gets its UID after admission.
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
