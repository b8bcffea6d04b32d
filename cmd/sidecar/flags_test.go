package main

import (
	"flag"
	"os"
	"regexp"
	"slices"
	"testing"

	"github.com/credence-iam/credence/broker/policy"
	"github.com/credence-iam/credence/sidecar/contract"
)

// The key must be the one that brokers make of the pod, from variables as from flags.
func TestRoutingKey(t *testing.T) {
	const webhooks = policy.RoutingKey("00112233445566778899aabbccddeeff")
	required := []string{"--broker=localhost:1", "--token-file=t", "--roots-file=r", "--authorization=a"}
	for name, tt := range map[string]struct {
		env  map[string]string
		args []string
		want policy.RoutingKey
	}{
		"none":       {},
		"shared":     {env: map[string]string{"CREDENCE_ROUTING_KEY": string(webhooks)}, want: webhooks},
		"of the pod": {env: map[string]string{"CREDENCE_ROUTING_KEY": string(webhooks), "CREDENCE_POD_UID": "uid-1"}, want: webhooks.ForPod("uid-1")},
		"flags":      {args: []string{"--routing-key=" + string(webhooks), "--pod-uid=uid-1"}, want: webhooks.ForPod("uid-1")},
		// Who has no key asks any broker, and has no more of one with a UID.
		"UID alone": {args: []string{"--pod-uid=uid-1"}},
	} {
		t.Run(name, func(t *testing.T) {
			for variable, value := range tt.env {
				t.Setenv(variable, value)
			}
			f := flag.NewFlagSet("credence-sidecar", flag.ContinueOnError)
			finish := flags(f)
			if err := f.Parse(append(tt.args, required...)); err != nil {
				t.Fatal(err)
			}
			o, err := finish(f.Args())
			if err != nil {
				t.Fatal(err)
			}
			if got := o.key(); got != tt.want {
				t.Errorf("the key is %q, want %q", got, tt.want)
			}
		})
	}
}

// docs/sidecar.md has every flag with its variable, and no other.
func TestSettingsAreDocumented(t *testing.T) {
	page, err := os.ReadFile("../../docs/sidecar.md")
	if err != nil {
		t.Fatal(err)
	}
	var documented, want []string
	for _, row := range regexp.MustCompile("(?m)^\\| `--([a-z-]+)` \\| `([A-Z_]+)` \\|").FindAllSubmatch(page, -1) {
		documented = append(documented, string(row[1])+" "+string(row[2]))
	}
	f := flag.NewFlagSet("credence-sidecar", flag.ContinueOnError)
	flags(f)
	f.VisitAll(func(f *flag.Flag) { want = append(want, f.Name+" "+contract.Env(f.Name)) })
	if !slices.Equal(documented, want) {
		t.Errorf("documented are\n%q, there are\n%q", documented, want)
	}
}
