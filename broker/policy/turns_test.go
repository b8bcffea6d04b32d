package policy

import (
	"fmt"
	"maps"
	"sync"
	"testing"
	"testing/synctest"
)

// Decide waits for the turn of its namespace. Grant waits for a turn that all its calls share, whatever their namespaces.
func TestDecisionsWaitForTheirTurn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		keys, err := NewKeys(DefaultPrefix)
		if err != nil {
			t.Fatal(err)
		}
		rules, err := New(Config{Keys: keys})
		if err != nil {
			t.Fatal(err)
		}
		hold := rules.Hold(t)
		var calls sync.WaitGroup
		defer calls.Wait()
		start := func(namespace, role string, decide func(Pod, Namespace) (Grant, error)) {
			pod := Pod{Namespace: namespace, Request: keys.Request(map[string]string{keys.Name(Role): "arn:aws:iam::123456789012:role/" + role})}
			ns := Namespace{Name: namespace, Labels: map[string]string{keys.Name(Inject): Enabled}, Annotations: map[string]string{keys.Name(Permitted): ".*"}}
			calls.Go(func() {
				if _, err := decide(pod, ns); err != nil {
					t.Errorf("role %s of namespace %s: %v", role, namespace, err)
				}
			})
			synctest.Wait()
		}
		byCaller := func(pod Pod, ns Namespace) (Grant, error) { return rules.Decide(t.Context(), pod, ns) }
		for i := range 32 {
			start("hog", fmt.Sprint("role-", i), byCaller)
		}
		start("shop", "cart", byCaller)
		start("shop", "prefetched", rules.Grant)
		start("hog", "prefetched", rules.Grant)
		if got, want := rules.gate.Waiting(), map[string]int{"hog": 32, "shop": 1, noNamespace: 2}; !maps.Equal(got, want) {
			t.Errorf("the callers that wait are %v, want %v", got, want)
		}
		hold.release()
	})
}
