package policy_test

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"

	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/broker/policy"
)

// Roles of all partitions match in the same way, in allowed-roles and in the rules file.
func TestPartitions(t *testing.T) {
	for _, partition := range []string{"aws", "aws-cn", "aws-us-gov", "aws-iso", "aws-iso-b", "aws-eusc"} {
		role := "arn:" + partition + ":iam::123456789012:role/team/reader"
		for _, tt := range []struct {
			glob string
			want bool
		}{
			{role, true},
			{"arn:" + partition + ":*", true},
			{"arn:" + partition + ":iam::*:role/team/*", true},
			{"arn:" + partition + ":iam::123456789012:role/*reader", true},
			{"arn:*:iam::123456789012:role/team/reader", true},
			{"arn:*", true},
			{"arn:" + partition + "x:*", false},
			{"arn:" + partition, false},
			{"arn:" + partition + ":iam::210987654321:*", false},
			{"arn:" + partition + ":iam::123456789012:role/reader", false},
			{"arn:other:*", false},
			{"arn:" + partition + ":*-admin", false},
		} {
			rules := newRules(t, rolePrefix)
			list, err := json.Marshal([]string{tt.glob})
			if err != nil {
				t.Fatal(err)
			}
			pod := cart(map[policy.Key]string{policy.Role: role})
			if _, err := rules.Grant(pod, shop(map[policy.Key]string{policy.AllowedRoles: string(list)})); (err == nil) != tt.want {
				t.Errorf("allowed-roles %s, role %s: %v", list, role, err)
			}
			use(t, rules, entries(edit("*", func(n *policy.NamespaceRules) { n.Accounts, n.Roles = []string{"*"}, []string{tt.glob} })))
			if _, err := rules.Grant(pod, shop(anything)); (err == nil) != tt.want {
				t.Errorf("rules file with %s, role %s: %v", tt.glob, role, err)
			}
		}
		// Globs for path and name have no partition.
		for glob, want := range map[string]bool{"/team/reader": true, "/team/*": true, "*/reader": true, "*": true, "/reader": false, "*/team": false, "*:role/team/reader": false} {
			rules := newRules(t, rolePrefix)
			use(t, rules, entries(edit("*", func(n *policy.NamespaceRules) { n.Accounts, n.Roles = []string{"*"}, []string{glob} })))
			if _, err := rules.Grant(cart(map[policy.Key]string{policy.Role: role}), shop(anything)); (err == nil) != want {
				t.Errorf("rules file with %s, role %s: %v", glob, role, err)
			}
		}
	}
}

// The length of lists of globs is limited, because a decision tries each glob.
func TestGlobBounds(t *testing.T) {
	rules := newRules(t, rolePrefix)
	stars := func(n int) string { return strings.Repeat("*r", n) }
	entry := func(length int) string { return `"` + strings.Repeat("r", length-2) + `"` }
	for _, tt := range []struct{ list, want string }{
		{`["` + stars(33) + `"]`, "has 33 *, the limit is 32"},
		{`["reader","` + stars(33) + `"]`, "has 33 *, the limit is 32"},
		{"[" + entry(131071) + "]", "has 131073 characters, the limit is 131072"},
	} {
		_, err := rules.Grant(cart(map[policy.Key]string{policy.Role: "reader"}), shop(map[policy.Key]string{policy.AllowedRoles: tt.list}))
		mustRefuse(t, fmt.Sprintf("allowed-roles %.40s", tt.list), err, credential.ErrInvalid, credential.ReasonAnnotationInvalid,
			`annotation "iam.amazonaws.com/allowed-roles" of namespace "shop"`, tt.want)
	}
	for _, list := range []string{`["` + stars(32) + `","reader"]`, `["reader",` + entry(131061) + "]"} {
		if !permits(t, rules, "reader", map[policy.Key]string{policy.AllowedRoles: list}) {
			t.Errorf("allowed-roles of %d characters, %.60s, does not permit reader", len(list), list)
		}
	}

	// Use refuses a rules file with such a glob, and the previous file stays in force.
	use(t, rules, entries(open("*")))
	for name, change := range map[string]func(*policy.NamespaceRules){
		"match":        func(n *policy.NamespaceRules) { n.Match = []string{stars(33)} },
		"roles":        func(n *policy.NamespaceRules) { n.Roles = []string{"*", "*" + stars(32)} },
		"externalIDs":  func(n *policy.NamespaceRules) { n.ExternalIDs = []string{stars(33)} },
		"sessionNames": func(n *policy.NamespaceRules) { n.SessionNames = []string{strings.Repeat("*", 33)} },
	} {
		err := rules.Use(entries(edit("a", change)))
		if err == nil || !strings.Contains(err.Error(), "namespaces[0]."+name+"[") || !strings.Contains(err.Error(), "has 33 *, the limit is 32") {
			t.Errorf("a glob with 33 * in %s: %v", name, err)
		}
		if _, err := rules.Grant(cart(map[policy.Key]string{policy.Role: "reader"}), shop(anything)); err != nil {
			t.Errorf("after an invalid file: %v", err)
		}
	}
	use(t, rules, entries(edit("*", func(n *policy.NamespaceRules) { n.Roles = []string{"*" + stars(31)} })))
}
