package policy_test

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/broker/policy"
)

// longest returns a role with the longest path and name that IAM has.
func longest(path string) string {
	path = strings.Repeat(path, 512/len(path)+1)
	return rolePrefix + strings.TrimRight(path[:510], "/") + "/" + strings.Repeat("a", 64)
}

// The rules refuse an expression that would take long to match a role, and do not match it.
func TestCostlyExpressions(t *testing.T) {
	rules := newRules(t, rolePrefix)
	for _, tt := range []struct{ expression, role string }{
		{"(((.*)*)*){1000}Z", rolePrefix + strings.Repeat("a", 494) + "/" + strings.Repeat("a", 64)}, // 590 characters
		{"(((.*)*)*){1000}Z", "cart"},
		{"(.*){1000}(.*){1000}Z|.*cart", "cart"},
		{"(.*){1000}(.*){1000}Z|.*cart", longest("cart/")},
		{strings.Repeat(".*", 1800) + "Z", longest("a")},
		{"(?:.?){1000}", longest("a")},
		{"(?:.+){500}Z", longest("a")},
		{"(?:.{0,30}){30}Z", longest("a")},
		{strings.Repeat("((((.*))))", 300) + "Z", longest("a")},
		{strings.Repeat(`\B*.*`, 300) + "Z", longest("a")},
		{strings.Repeat(`[^B]*`, 600) + "Z", longest("a")},
		{"(?i)" + strings.Repeat(`[a-z0-9:/]*`, 330) + "Z", longest("a")},
	} {
		_, err := rules.Grant(cart(map[policy.Key]string{policy.Role: tt.role}), shop(map[policy.Key]string{policy.Permitted: tt.expression}))
		mustRefuse(t, tt.expression, err, credential.ErrInvalid, credential.ReasonAnnotationInvalid,
			`annotation "iam.amazonaws.com/permitted" of namespace "shop"`, "takes more than 250000 steps, the limit", "instructions", "remove repetitions of repetitions")
	}
}

// The rules refuse expressions that make package syntax slow, and do not parse them.
func TestExpressionsBeyondASCII(t *testing.T) {
	rules := newRules(t, rolePrefix)
	for _, tt := range []struct{ expression, names string }{
		{`(?i)[B-\x{10FFFF}]*`, `"\\x"`}, // 200 of these take a second
		{"(?i)[B-\U0001e944]*", "\U0001e944"},
		{`[B-\777]*`, `"\\7"`},
		{`[B-\xff]*`, `"\\x"`},
		{`\pL*`, `"\\p"`},
		{`[\PL]*`, `"\\P"`},
		{"\xff", `"\xff"`},
		{".*é", "é"},
		{`.*\01`, `"\\0"`},
	} {
		_, err := rules.Grant(cart(map[policy.Key]string{policy.Role: "reader"}), shop(map[policy.Key]string{policy.Permitted: tt.expression}))
		mustRefuse(t, tt.expression, err, credential.ErrInvalid, credential.ReasonAnnotationInvalid,
			`annotation "iam.amazonaws.com/permitted" of namespace "shop"`, tt.names, "a role's ARN has letters, digits and marks of ASCII only")
	}
	if !permits(t, rules, "reader", map[policy.Key]string{policy.Permitted: `\Aarn:aws:iam::\d{12}:role/\w+[^\s]\z`}) {
		t.Error("an expression with other escapes is refused")
	}
}

// The rules compile an expression once, and match it once with each role. They cache permissions and refusals of every
// kind.
func TestDecisionsAreCached(t *testing.T) {
	rules := newRules(t, rolePrefix)
	use(t, rules, policy.File{Namespaces: []policy.NamespaceRules{edit("*", func(n *policy.NamespaceRules) {
		n.Accounts, n.Roles, n.ExternalIDs, n.SessionNames = []string{"*"}, []string{"/reader", "/team/*"}, []string{"ext-*"}, []string{"name-*"}
	})}})
	ended, end := context.WithCancel(t.Context())
	end()
	hold := rules.Hold(t) // from now on, no decision gets a turn
	for _, tt := range []struct {
		name    string
		pod, ns map[policy.Key]string
		reason  credential.Reason
	}{
		{"permitted", map[policy.Key]string{policy.Role: "reader"}, map[policy.Key]string{policy.Permitted: ".*"}, ""},
		{"not permitted", map[policy.Key]string{policy.Role: "reader"}, map[policy.Key]string{policy.Permitted: ".*/writer"}, credential.ReasonRoleNotPermitted},
		{"invalid expression", map[policy.Key]string{policy.Role: "reader"}, map[policy.Key]string{policy.Permitted: "("}, credential.ReasonAnnotationInvalid},
		{"too costly", map[policy.Key]string{policy.Role: "reader"}, map[policy.Key]string{policy.Permitted: "(((.*)*)*){1000}Z"}, credential.ReasonAnnotationInvalid},
		{"allowed", map[policy.Key]string{policy.Role: "reader"}, map[policy.Key]string{policy.AllowedRoles: `["read*"]`}, ""},
		{"not allowed", map[policy.Key]string{policy.Role: "reader"}, map[policy.Key]string{policy.AllowedRoles: `["write*"]`}, credential.ReasonRoleNotPermitted},
		{"invalid list", map[policy.Key]string{policy.Role: "reader"}, map[policy.Key]string{policy.AllowedRoles: "["}, credential.ReasonAnnotationInvalid},
		{"rules: role", map[policy.Key]string{policy.Role: "writer"}, anything, credential.ReasonRulesRole},
		{"rules: external id", map[policy.Key]string{policy.Role: "team/a", policy.ExternalID: "ext-1"}, anything, ""},
		{"rules: another external id", map[policy.Key]string{policy.Role: "team/a", policy.ExternalID: "other"}, anything, credential.ReasonRulesExternalID},
		{"rules: session name", map[policy.Key]string{policy.Role: "team/a", policy.SessionName: "name-1"}, anything, ""},
		{"rules: another session name", map[policy.Key]string{policy.Role: "team/a", policy.SessionName: "other"}, anything, credential.ReasonRulesSessionName},
	} {
		decide := func() credential.Reason {
			_, err := rules.Decide(ended, cart(tt.pod), shop(tt.ns))
			return credential.ReasonOf(err)
		}
		if got := decide(); got != credential.ReasonNamespaceBusy {
			t.Errorf("%s: the decision without a turn is %q", tt.name, got)
		}
		hold.Pause(func() {
			if got := decide(); got != tt.reason {
				t.Errorf("%s: the decision is %q, want %q", tt.name, got, tt.reason)
			}
		})
		if got := decide(); got != tt.reason {
			t.Errorf("%s: the cached decision is %q, want %q", tt.name, got, tt.reason)
		}
		other := shop(tt.ns)
		other.Name = "other"
		pod := cart(tt.pod)
		pod.Namespace = "other"
		if _, err := rules.Decide(ended, pod, other); credential.ReasonOf(err) != credential.ReasonNamespaceBusy {
			t.Errorf("%s: another namespace gets a cached decision of this one: %v", tt.name, err)
		}
	}
	// A new rules file takes effect immediately.
	pod, ns := cart(map[policy.Key]string{policy.Role: "reader"}), shop(anything)
	use(t, rules, policy.File{Namespaces: []policy.NamespaceRules{edit("*", func(n *policy.NamespaceRules) {
		n.Accounts, n.Roles = []string{"*"}, []string{"/other"}
	})}})
	hold.Pause(func() {
		if _, err := rules.Decide(ended, pod, ns); credential.ReasonOf(err) != credential.ReasonRulesRole {
			t.Errorf("with a new rules file: %v", err)
		}
	})
}

// BenchmarkCostlyNeighbor is the time of a decision for one namespace while 32 callers of another namespace need decisions of
// the maximum cost. It compares a cached decision with the same decision without these callers, and a decision that waits for
// its turn with one of their decisions, because it waits for one of them.
func BenchmarkCostlyNeighbor(b *testing.B) {
	for _, cached := range []bool{true, false} {
		b.Run(fmt.Sprintf("cached=%v", cached), func(b *testing.B) {
			rules, calls := newRules(b, rolePrefix), 0
			decide := func() {
				role := "reader"
				if calls++; !cached {
					role = fmt.Sprintf("reader-%d", calls)
				}
				if _, err := rules.Decide(b.Context(), cart(map[policy.Key]string{policy.Role: role}), shop(anything)); err != nil {
					b.Fatal(err)
				}
			}
			decideCostly := func(ctx context.Context, i, j int) {
				pod, ns := cart(map[policy.Key]string{policy.Role: longest(fmt.Sprintf("%d-%d/", i, j))}), shop(map[policy.Key]string{policy.Permitted: "(?:.*){190}Z"})
				pod.Namespace, ns.Name = "costly", "costly"
				_, _ = rules.Decide(ctx, pod, ns)
			}
			average := func(n int, f func(int)) time.Duration {
				began := time.Now()
				for i := range n {
					f(i)
				}
				return time.Since(began) / time.Duration(n)
			}
			base, unit := average(1000, func(int) { decide() }), "x/alone"
			if !cached {
				base, unit = average(50, func(i int) { decideCostly(b.Context(), 32, i) }), "x/costly"
			}

			ctx, cancel := context.WithCancel(b.Context())
			var costly sync.WaitGroup
			for i := range 32 {
				costly.Go(func() {
					for j := 0; ctx.Err() == nil; j++ {
						decideCostly(ctx, i, j)
					}
				})
			}
			for b.Loop() {
				decide()
			}
			b.ReportMetric(float64(b.Elapsed())/float64(b.N)/float64(base), unit)
			cancel()
			costly.Wait()
		})
	}
}
