//go:build unix

package skew_test

import (
	"testing"

	"github.com/google/go-cmp/cmp"
	admissionregistrationv1 "k8s.io/api/admissionregistration/v1"

	"github.com/credence-iam/credence/integration/chart"
)

// TestEntriesOfWebhooks shows that each configuration of webhooks that both charts have, has the same entries in both.
// cert-manager adds roots to each entry, and Helm cannot remove a field that it does not own. Without an entry's other
// fields the API server refuses the object, so an upgrade or a rollback that drops the entry fails. A new entry needs a
// configuration of its own.
func TestEntriesOfWebhooks(t *testing.T) {
	t.Parallel()
	entries := [len(versions)]map[string][]string{{}, {}}
	for n := range versions {
		for _, hook := range chart.Of[*admissionregistrationv1.MutatingWebhookConfiguration](objects(t, n)) {
			for _, entry := range hook.Webhooks {
				entries[n][hook.Name] = append(entries[n][hook.Name], entry.Name)
			}
		}
	}
	shared := 0
	for name, before := range entries[0] {
		if now, ok := entries[1][name]; ok {
			shared++
			if diff := cmp.Diff(before, now); diff != "" {
				t.Errorf("entries of configuration %s (- previous, + this):\n%s", name, diff)
			}
		}
	}
	if shared == 0 {
		t.Error("the charts share no configuration of webhooks")
	}
}
