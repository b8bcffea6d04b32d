package policy_test

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"

	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/broker/policy"
)

// A glob matches a whole text: what stands before the first * begins it, what stands behind the last * ends it, and
// what stands between is found in that order, without overlap.
func TestGlobs(t *testing.T) {
	for _, tt := range []struct {
		glob, text string
		want       bool
	}{
		{"", "", true},
		{"", "a", false},
		{"a", "a", true},
		{"a", "aa", false},
		{"a", "ba", false},
		{"a", "", false},
		{"*", "", true},
		{"*", "a/b", true},
		{"**", "", true},
		{"**", "a", true},

		{"a*", "a", true},
		{"a*", "ab", true},
		{"a*", "ba", false},
		{"a*", "", false},
		{"admin*", "x-admin", false},

		{"*a", "a", true},
		{"*a", "ba", true},
		{"*a", "ab", false},
		{"*-read", "x-read", true},
		{"*-read", "x-read-admin", false},
		{"*-read", "x-read-read", true},
		{"*-read", "-read", true},
		{"*-read", "read", false},

		{"a*c", "ac", true},
		{"a*c", "abc", true},
		{"a*c", "abcd", false},
		{"a*c", "babc", false},
		{"a*a", "a", false}, // one a is not both
		{"a*a", "aa", true},
		{"ab*ba", "aba", false},
		{"ab*ba", "abba", true},

		{"*b*", "abc", true},
		{"*b*", "b", true},
		{"*b*", "ac", false},
		{"*a*b*", "ab", true},
		{"*a*b*", "ba", false}, // in their order
		{"*a*a*", "a", false},  // not twice the same
		{"*a*a*", "xaya", true},
		{"*ab*b", "ab", false},
		{"*ab*b", "abb", true},
		{"a*b*c", "a-b-c", true},
		{"a*b*c", "a-c", false},
		{"a*b*c", "a-b", false},
		{"a*b*c", "a-b-cd", false},
		{"a*bb*c", "abc", false},
		{"a*b*b*c", "abc", false},
		{"a*b*b*c", "abbc", true},

		{"A*", "a", false},
		{"a?c", "abc", false},
		{"a.c", "abc", false},
		{"[a]*", "a", false},
		{`\*`, "*", false},
		{`\*`, `\x`, true},
	} {
		if got := policy.MatchGlob(tt.glob, tt.text); got != tt.want {
			t.Errorf("glob %q matches %q: %v", tt.glob, tt.text, got)
		}
	}
}

// Roles of every partition are matched as those of the first one, by allowed-roles and by the rules file.
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

// Lists of globs are bounded by what one decision takes to walk them.
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

	// A rules file with such a glob is refused as a whole, and the one before stays.
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
			t.Errorf("after a wrong file: %v", err)
		}
	}
	use(t, rules, entries(edit("*", func(n *policy.NamespaceRules) { n.Roles = []string{"*" + stars(31)} })))
}
