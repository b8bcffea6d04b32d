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

// The sidecar must have the same key as the brokers, from variables and from flags.
func TestRoutingKey(t *testing.T) {
	const fromWebhook = policy.RoutingKey("00112233445566778899aabbccddeeff")
	required := []string{"--broker=localhost:1", "--token-file=t", "--roots-file=r", "--authorization=a"}
	for name, tt := range map[string]struct {
		env  map[string]string
		args []string
		want policy.RoutingKey
	}{
		"none":      {},
		"shared":    {env: map[string]string{"CREDENCE_ROUTING_KEY": string(fromWebhook)}, want: fromWebhook},
		"pod's own": {env: map[string]string{"CREDENCE_ROUTING_KEY": string(fromWebhook), "CREDENCE_POD_UID": "uid-1"}, want: fromWebhook.ForPod("uid-1")},
		"flags":     {args: []string{"--routing-key=" + string(fromWebhook), "--pod-uid=uid-1"}, want: fromWebhook.ForPod("uid-1")},
		// Without a routing key, any broker is called. The UID alone is no key.
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
				t.Errorf("key = %q, want %q", got, tt.want)
			}
		})
	}
}

// docs/sidecar.md has a row for each flag with its variable, and no other rows.
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
		t.Errorf("docs/sidecar.md has\n%q, want\n%q", documented, want)
	}
}
