package policy_test

import (
	"strings"
	"testing"

	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/broker/policy"
)

// TestBasis: the basis names what permits the role, and its error is that of the decision.
func TestBasis(t *testing.T) {
	const role = "arn:aws:iam::123456789012:role/cart"
	base, err := credential.ParseRoleBase("arn:aws:iam::123456789012:role/")
	if err != nil {
		t.Fatal(err)
	}
	keys, err := policy.NewKeys(policy.DefaultPrefix)
	if err != nil {
		t.Fatal(err)
	}
	rules, err := policy.New(policy.Config{Keys: keys, Base: base})
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name, role, permitted, allowed string
		file                           []policy.NamespaceRules
		key                            policy.Key
		text, entry, err               string
	}{
		{name: "expression", role: "cart", permitted: ".*:role/(cart|till)", key: policy.Permitted, text: ".*:role/(cart|till)"},
		{name: "glob", role: role, allowed: `["till-*", "ca*", "cart"]`, key: policy.AllowedRoles, text: "ca*"},
		{name: "glob beside an expression", role: role, permitted: "till", allowed: `["*"]`, key: policy.AllowedRoles, text: "*"},
		{name: "nothing", role: role, err: "permits no roles"},
		{name: "another role", role: role, permitted: "till", err: "does not permit role " + role},
		{name: "unparsable", role: role, permitted: "a)|(?:.*", err: "is not a regular expression"},
		{name: "no role", permitted: ".*", err: "is empty"},
		{name: "rules", role: role, permitted: ".*", file: []policy.NamespaceRules{{Match: []string{"shop"}, Roles: []string{"*"}, Accounts: []string{"*"}}},
			key: policy.Permitted, text: ".*", entry: `namespaces[0], "shop"`},
		{name: "refused by rules", role: role, permitted: ".*", file: []policy.NamespaceRules{{Match: []string{"shop"}, Accounts: []string{"210987654321"}}},
			key: policy.Permitted, text: ".*", entry: `namespaces[0], "shop"`, err: "rules file"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			rules := rules
			if tt.file != nil {
				if rules, err = policy.New(policy.Config{Keys: keys, Base: base}); err != nil {
					t.Fatal(err)
				}
				if err := rules.Use(policy.File{Namespaces: tt.file}); err != nil {
					t.Fatal(err)
				}
			}
			annotations := map[string]string{}
			for key, value := range map[policy.Key]string{policy.Permitted: tt.permitted, policy.AllowedRoles: tt.allowed} {
				if value != "" {
					annotations[keys.Name(key)] = value
				}
			}
			ns := policy.Namespace{Name: "shop", Labels: map[string]string{keys.Name(policy.Inject): policy.Enabled}, Annotations: annotations}
			pod := policy.Pod{Namespace: "shop", Name: "app", ServiceAccount: "default", Request: keys.Request(map[string]string{keys.Name(policy.Role): tt.role})}
			b, err := rules.Basis(pod, ns)
			grant, want := rules.Grant(pod, ns)
			if b.Grant != grant || (err == nil) != (want == nil) || err != nil && err.Error() != want.Error() {
				t.Errorf("decision is %v, %v; Grant returns %v, %v", b.Grant, err, grant, want)
			}
			if b.Key != tt.key || b.Text != tt.text || b.Entry != tt.entry {
				t.Errorf("basis is %q %q %q, want %q %q %q", b.Key, b.Text, b.Entry, tt.key, tt.text, tt.entry)
			}
			if tt.role != "" && b.Role.String() != role {
				t.Errorf("role is %s", b.Role)
			}
			if tt.err == "" && err != nil || tt.err != "" && (err == nil || !strings.Contains(err.Error(), tt.err)) {
				t.Errorf("error is %v, want %q", err, tt.err)
			}
		})
	}
}
