package broker_test

import (
	"slices"
	"testing"
	"testing/synctest"

	"github.com/credence-iam/credence/broker/assume/ststest"
	"github.com/credence-iam/credence/broker/cache"
	"github.com/credence-iam/credence/broker/policy"
)

// The broker reports the webhook's warnings on a pod when the pod calls, also if it refuses the pod. It reports nothing on a
// pod without warnings.
func TestShadowedPods(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEngine(t, ststest.Config{}, cache.Config[policy.Grant]{})
		e.pod("shop", "plain", "role", "reader")
		e.pod("shop", "empty", "role", "reader", "warnings", "")
		e.pod("shop", "shadowed", "role", "reader", "warnings", "container c has AWS_PROFILE")
		e.pod("shop", "refused", "role", "", "warnings", "container c has AWS_PROFILE")
		for _, name := range []string{"plain", "empty", "shadowed"} {
			if _, err := e.get(t.Context(), "shop/"+name); err != nil {
				t.Errorf("%s: %v", name, err)
			}
		}
		if _, err := e.get(t.Context(), "shop/refused"); err == nil {
			t.Error("a pod without a role got credentials")
		}
		want := []string{"shadowed: container c has AWS_PROFILE", "refused: container c has AWS_PROFILE"}
		e.mu.Lock()
		defer e.mu.Unlock()
		if !slices.Equal(e.warned, want) {
			t.Errorf("reported %q, want %q", e.warned, want)
		}
	})
}
