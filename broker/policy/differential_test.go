package policy_test

import (
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"

	"github.com/credence-iam/credence/broker/policy"
)

// Whatever the cache has, a decision is the same as that of rules without a cache. The texts of pods, namespaces and rules
// files change all the time, and some do not fit into the cache.
func TestCacheChangesNoDecision(t *testing.T) {
	padding := func(n int) string { return fmt.Sprintf("%*s", n, "") }
	values := map[policy.Key][]string{
		policy.Role:        {"reader", "writer", "/team/reader", "arn:aws:iam::123456789012:role/reader", "arn:aws-cn:iam::210987654321:role/reader", "", "no role", longest("a/")},
		policy.SessionTags: {"a=1", "b=1,a=2", "a", " a=1", "c=1"}, policy.SessionPolicy: {`{"Statement":[]}`, `{ "Statement": [] }`, "{}", "x"},
		policy.SessionName: {"name-1", "other"}, policy.ExternalID: {"ext-1", "other"}, policy.Duration: {"15m", "12h", "x"},
		policy.SessionScope: {"role", "pod", "service-account"}, policy.PolicyARNs: {"arn:aws:iam::aws:policy/ReadOnlyAccess"},
	}
	namespaceValues := map[policy.Key][]string{
		policy.Permitted:    {".*", ".*/reader", "(", ".*/reader" + padding(1), "(((.*)*)*){1000}Z", "a{0,1000}{0,1000}", ".*reader|" + padding(4000), padding(250_000), ""},
		policy.AllowedRoles: {`["*"]`, `["reader"]`, `["/team/*"]`, `["arn:aws-cn:*"]`, "[", `["*"]` + padding(120_000), `[]`, padding(250_000)},
		policy.DefaultRole:  {"reader", "writer"}, policy.PermittedTags: {"a", "a,b", "a,a"},
	}
	file := func(r *rand.Rand) policy.File {
		pick := func(list ...[]string) []string { return list[r.IntN(len(list))] }
		return policy.File{KubernetesTags: r.IntN(2) == 0, Namespaces: []policy.NamespaceRules{
			edit("shop", func(n *policy.NamespaceRules) {
				n.Accounts, n.Roles = pick([]string{"*"}, []string{"123456789012"}), pick([]string{"*"}, []string{"/reader"}, []string{"arn:aws:*"})
				n.ExternalIDs, n.SessionNames = pick([]string{"*"}, []string{"ext-*"}), pick([]string{"*"}, []string{"name-*"})
			}),
			edit("*", func(n *policy.NamespaceRules) {
				n.Accounts, n.Roles = []string{"*"}, pick([]string{"*"}, []string{"/writer"})
			}),
		}}
	}
	choose := func(r *rand.Rand, from map[policy.Key][]string) map[policy.Key]string {
		some := map[policy.Key]string{}
		for key, list := range from {
			if key == policy.Role || key == policy.Permitted || r.IntN(4) == 0 {
				some[key] = list[r.IntN(len(list))]
			}
		}
		return some
	}
	cached := []*policy.Rules{newRules(t, rolePrefix), newRules(t, "")}
	for round := range uint64(15) {
		r := rand.New(rand.NewPCG(round, 1))
		if round > 0 { // at first there is no file
			f := file(r)
			for i := range cached {
				use(t, cached[i], f)
			}
		}
		var calls sync.WaitGroup
		for caller := range uint64(4) {
			calls.Go(func() {
				r := rand.New(rand.NewPCG(round, 2+caller))
				for range 20 {
					chosen := choose(r, values)
					pod, ns := cart(chosen), shop(choose(r, namespaceValues))
					pod.Namespace = []string{"shop", "bank", "team"}[r.IntN(3)]
					ns.Name = pod.Namespace
					i := r.IntN(2)
					got, err := cached[i].Decide(t.Context(), pod, ns)
					want, wantErr := cached[i].Uncached().Grant(pod, ns)
					if got != want || fmt.Sprint(err) != fmt.Sprint(wantErr) {
						t.Errorf("%v in %v: decided %s (%.300v), want %s (%.300v)", chosen, ns.Name, got, err, want, wantErr)
					}
				}
			})
		}
		calls.Wait()
	}
}
