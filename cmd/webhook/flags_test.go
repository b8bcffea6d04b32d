package main

import (
	"flag"
	"io"
	"strings"
	"testing"
)

// parse parses args as package program does.
func parse(args []string) (options, error) {
	f := flag.NewFlagSet("credence-webhook", flag.ContinueOnError)
	f.SetOutput(io.Discard)
	finish := flags(f)
	if err := f.Parse(args); err != nil {
		return options{}, err
	}
	return finish(f.Args())
}

func TestBadFlags(t *testing.T) {
	good := []string{"--broker=broker:9443", "--sidecar-image=registry.example/credence-sidecar:v1"}
	if _, err := parse(good); err != nil {
		t.Fatalf("good flags: %v", err)
	}
	for _, tc := range []struct {
		args []string
		want string
	}{
		{good[:1], "--broker and --sidecar-image are required"},
		{good[1:], "--broker and --sidecar-image are required"},
		{append(good, "word"), `unexpected argument "word": everything is set by flags`},
		{append(good, "--annotation-prefix=A/b"), `--annotation-prefix: annotation prefix "A/b" is not a DNS subdomain such as iam.amazonaws.com`},
		{append(good, "--sidecar-port=80"), "sidecar port 80: --sidecar-port must be from 1024 to 65535"},
		{append(good, "--sidecar-run-as-user=0"), "sidecar user id 0: the sidecar never runs as root, so --sidecar-run-as-user must be above 0"},
		{append(good, "--on-shadowed=allow"), `on shadowed credentials "allow": --on-shadowed must be refuse or warn`},
	} {
		if _, err := parse(tc.args); err == nil || err.Error() != tc.want {
			t.Errorf("%q: error is %v, want %s", tc.args, err, tc.want)
		}
	}
	if _, err := parse(append(good, "--base-arn=x")); err == nil || !strings.HasPrefix(err.Error(), "--base-arn: ") {
		t.Errorf("--base-arn=x: error is %v", err)
	}
}

func TestPlatformChoosesUser(t *testing.T) {
	o, err := parse([]string{"--broker=b:1", "--sidecar-image=i", "--sidecar-run-as-user=-1"})
	if err != nil || o.Injector == nil || o.Rules == nil {
		t.Errorf("--sidecar-run-as-user=-1: %+v, %v", o, err)
	}
}
