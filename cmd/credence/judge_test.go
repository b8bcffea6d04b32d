package main

import (
	"strings"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"

	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/operator/installation"
)

// withArgs returns an installation whose webhook has these arguments.
func withArgs(args ...string) *installation.Installation {
	d := &appsv1.Deployment{}
	d.Spec.Template.Spec.Containers = []corev1.Container{{Name: "webhook", Args: args}}
	return &installation.Installation{Webhook: d}
}

// TestJudge: the judge decides by the arguments and files of the webhook.
func TestJudge(t *testing.T) {
	args := []string{"--listen=:9443", "--annotation-prefix=example.org", "--audience=a", "--broker=b.credence.svc:9443", "--sidecar-image=i:1", "--rules-file=/r"}
	found := withArgs(args...)
	found.Settings, found.Rules = "port: 9000", "namespaces: [{match: [shop]}]"
	judge := judgeOf(found)
	if judge.RulesErr != nil || judge.Injector == nil || judge.Injector.Image() != "i:1" || judge.Injector.Settings().Port != 9000 || judge.Rules.Keys().Prefix() != "example.org" {
		t.Fatalf("judge is %+v", judge)
	}
	if got := judge.Rules.Keys().Prefix(); got != "example.org" {
		t.Errorf("prefix is %s", got)
	}
	if newer := judgeOf(withArgs(append([]string{"--shield=strong"}, args...)...)); newer.Injector == nil || newer.Rules.Keys().Prefix() != "example.org" {
		t.Errorf("a webhook with a flag that is not known: %+v", newer)
	}
	base, err := credential.ParseRoleBase("arn:aws:iam::123456789012:role/")
	if err != nil {
		t.Fatal(err)
	}
	if rebased := judge.Rebase(base); rebased == judge.Rules || rebased.Keys() != judge.Rules.Keys() {
		t.Error("the rules have no other base")
	}
	found.Rules = "namespace: []"
	if judge := judgeOf(found); judge.RulesErr == nil || !strings.Contains(judge.RulesErr.Error(), "unknown field") || judge.Rules == nil {
		t.Errorf("invalid rules: %+v", judge)
	}
	if judge := judgeOf(nil); judge.Rules != nil {
		t.Errorf("without an installation: judge is %+v", judge)
	}
	for name, found := range map[string]*installation.Installation{
		"unknown webhook": {}, "missing flags": withArgs("--audience=a"), "invalid flag": withArgs(append(args, "--sidecar-port=x")...),
	} {
		if judge := judgeOf(found); judge.Injector != nil || judge.Rules == nil || judge.Rules.Keys().Prefix() != "iam.amazonaws.com" || judge.Rebase(base) == nil {
			t.Errorf("%s: judge is %+v", name, judge)
		}
	}
}
