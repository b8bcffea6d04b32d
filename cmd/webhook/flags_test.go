package main

import (
	"flag"
	"io"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/credence-iam/credence/cmd/internal/injectflags"
	"github.com/credence-iam/credence/webhook/inject"
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
		{append(good, "word"), `unexpected argument "word"; use flags only`},
		{append(good, "--annotation-prefix=A/b"), `--annotation-prefix: annotation prefix "A/b" is not a DNS subdomain such as iam.amazonaws.com`},
		{append(good, "--sidecar-port=80"), "--sidecar-port: 80 is out of bounds: from 1024 to 65535"},
		{append(good, "--sidecar-run-as-user=0"), "--sidecar-run-as-user: 0 is not a user ID from 1 to 2147483647, and the sidecar never runs as root; with -1 the platform chooses"},
		{append(good, "--sidecar-memory=8Mi"), `invalid value "8Mi" for flag -sidecar-memory: 8Mi is out of bounds: from 12Mi to 256Mi`},
		{append(good, "--sidecar-cpu-request=0"), "--sidecar-cpu-request: 0 is out of bounds: from 1m to 1"},
		{append(good, "--sidecar-cpu-request=200m"), "--sidecar-cpu-limit: 100m is less than the request, 200m; raise the limit, or lower the request"},
		{append(good, "--sidecar-cpu-limit=5m"), "--sidecar-cpu-limit: 5m is out of bounds: from 10m to 1, or 0 for no limit"},
		{append(good, "--sidecar-cpu-guaranteed=0"), "--sidecar-cpu-guaranteed: 0 is out of bounds: from 10m to 1"},
		{append(good, "--sidecar-log-level=trace"), `invalid value "trace" for flag -sidecar-log-level: "trace" is none of ["debug" "info" "warn" "error"]`},
		{append(good, "--sidecar-image-pull-policy=Sometimes"), `--sidecar-image-pull-policy: "Sometimes" is not Always, IfNotPresent or Never`},
		{append(good, "--on-shadowed=allow"), `action "allow" for shadowed credentials is unknown; set --on-shadowed to refuse or warn`},
	} {
		if _, err := parse(tc.args); err == nil || err.Error() != tc.want {
			t.Errorf("%q: error is %v, want %s", tc.args, err, tc.want)
		}
	}
	if _, err := parse(append(good, "--base-arn=x")); err == nil || !strings.HasPrefix(err.Error(), "--base-arn: ") {
		t.Errorf("--base-arn=x: error is %v", err)
	}
}

// TestSharedFlags: the webhook has the flags of package injectflags and those that the package says do not change what it
// injects. So the credence command knows each argument of a webhook of its own version.
func TestSharedFlags(t *testing.T) {
	var all, shared []string
	f := flag.NewFlagSet("", flag.ContinueOnError)
	flags(f)
	f.VisitAll(func(f *flag.Flag) { all = append(all, f.Name) })
	f = flag.NewFlagSet("", flag.ContinueOnError)
	injectflags.Define(f)
	f.VisitAll(func(f *flag.Flag) { shared = append(shared, f.Name) })
	if diff := cmp.Diff(all, slices.Sorted(slices.Values(append(shared, injectflags.WebhookOnly...)))); diff != "" {
		t.Errorf("flags (-webhook +package injectflags):\n%s", diff)
	}
}

func TestSidecarFlags(t *testing.T) {
	o, err := parse([]string{
		"--broker=b:1", "--sidecar-image=i", "--sidecar-image-pull-policy=Always", "--sidecar-memory=64Mi", "--sidecar-cpu-request=50m", "--sidecar-cpu-limit=0",
		"--sidecar-cpu-guaranteed=60m", "--sidecar-port=9780", "--sidecar-run-as-user=1000", "--sidecar-log-level=warn", "--sidecar-settings-file=/file",
	})
	if err != nil {
		t.Fatal(err)
	}
	want := inject.Settings{
		ImagePullPolicy: "Always", Memory: 64, CPU: inject.CPU{Request: 50, Limit: 0, Guaranteed: 60}, Port: 9780, RunAsUser: 1000, LogLevel: "warn",
	}
	if diff := cmp.Diff(want, o.Injector.Settings()); diff != "" || o.SettingsFile != "/file" {
		t.Errorf("file %q, settings (-want +got):\n%s", o.SettingsFile, diff)
	}
}

func TestPlatformChoosesUser(t *testing.T) {
	o, err := parse([]string{"--broker=b:1", "--sidecar-image=i", "--sidecar-run-as-user=-1"})
	if err != nil || o.Injector.Settings().RunAsUser != inject.PlatformUser || o.Rules == nil {
		t.Errorf("--sidecar-run-as-user=-1: %+v, %v", o, err)
	}
}
