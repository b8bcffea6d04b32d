package injectflags_test

import (
	"flag"
	"maps"
	"slices"
	"testing"

	"github.com/credence-iam/credence/cmd/internal/injectflags"
)

// TestOfWebhook: the arguments are understood as package flag does, and what is unknown is named.
func TestOfWebhook(t *testing.T) {
	for name, tt := range map[string]struct {
		args    []string
		want    map[string]string
		unknown []string
	}{
		"each form":         {[]string{"--broker=b:1", "-audience", "a", "--role-chaining", "--listen=:1", "--log-level", "debug"}, map[string]string{"broker": "b:1", "audience": "a", "role-chaining": "true"}, nil},
		"the last one wins": {[]string{"--broker=a", "--broker=b"}, map[string]string{"broker": "b"}, nil},
		"no boolean":        {[]string{"--role-chaining=false", "--broker="}, map[string]string{"role-chaining": "false", "broker": ""}, nil},
		"a newer webhook":   {[]string{"--shield=strong", "--broker=b", "--verbose"}, map[string]string{"broker": "b"}, []string{"--shield=strong", "--verbose"}},
		"no value":          {[]string{"--broker"}, map[string]string{}, []string{"--broker"}},
		"no flag":           {[]string{"broker", "-", "--", ""}, map[string]string{}, []string{"broker", "-", "--", ""}},
		"a value with =":    {[]string{"--broker", "a=b"}, map[string]string{"broker": "a=b"}, nil},
	} {
		f := flag.NewFlagSet("", flag.ContinueOnError)
		injectflags.Define(f)
		if got, unknown := injectflags.OfWebhook(f, tt.args); !maps.Equal(got, tt.want) || !slices.Equal(unknown, tt.unknown) {
			t.Errorf("%s: %q, unknown %q", name, got, unknown)
		}
	}
}
