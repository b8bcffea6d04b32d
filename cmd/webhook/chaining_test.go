package main

import (
	"testing"

	"github.com/credence-iam/credence/broker/policy"
)

func TestRoleChaining(t *testing.T) {
	for flag, refused := range map[string]bool{"--role-chaining": true, "--role-chaining=false": false} {
		o, err := parse([]string{"--broker=b:1", "--sidecar-image=i", "--base-arn=arn:aws:iam::123456789012:role/", "--tls-cert=c", "--tls-key=k", flag})
		if err != nil {
			t.Fatal(err)
		}
		_, err = o.Rules.Grant(
			policy.Pod{Namespace: "shop", Name: "cart", ServiceAccount: "cart", Request: o.Rules.Keys().Request(map[string]string{"iam.amazonaws.com/role": "r", "iam.amazonaws.com/duration": "12h"})},
			policy.Namespace{Name: "shop", Labels: map[string]string{"iam.amazonaws.com/inject": "enabled"}, Annotations: map[string]string{"iam.amazonaws.com/permitted": ".*"}})
		if got := err != nil; got != refused {
			t.Errorf("%s: a session of 12 hours is refused: %v, want %v (%v)", flag, got, refused, err)
		}
	}
}
