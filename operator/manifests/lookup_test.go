package manifests_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/credence-iam/credence/broker/policy"
	"github.com/credence-iam/credence/operator/manifests"
)

func podIn(namespace string) string {
	return fmt.Sprintf("apiVersion: v1\nkind: Pod\nmetadata: {name: p, namespace: %s, annotations: {iam.amazonaws.com/role: app}}\nspec: {containers: [{name: app}]}\n---\n", namespace)
}

// TestLookUp: only namespaces of annotated pods are looked up, each once, and not those in the documents.
func TestLookUp(t *testing.T) {
	var names []string
	look := func(cfg *manifests.Config) {
		cfg.LookUp = func(_ context.Context, name string) (policy.Namespace, string, error) {
			names = append(names, name)
			if name == "hidden" {
				return policy.Namespace{}, "it is hidden", nil
			}
			return policy.Namespace{
				Name: name, Labels: map[string]string{"iam.amazonaws.com/inject": "enabled"},
				Annotations: map[string]string{"iam.amazonaws.com/permitted": ".*:role/app"},
			}, "", nil
		}
	}
	input := "apiVersion: v1\nkind: Namespace\nmetadata: {name: own}\n---\n" +
		podIn("shop") + podIn("shop") + podIn("hidden") + podIn("hidden") + podIn("own") +
		"apiVersion: v1\nkind: Pod\nmetadata: {name: p, namespace: plain}\nspec: {containers: [{name: app}]}\n"
	_, said, err := run(t, input, look)
	if err != nil || !slices.Equal(names, []string{"shop", "hidden"}) {
		t.Errorf("looked up %q (%v), want shop and hidden", names, err)
	}
	if strings.Count(said, "note: its role is not checked, because it is hidden\n") != 2 || strings.Count(said, "\n") != 3 || !strings.Contains(said, `namespace "own" is not opted in`) {
		t.Errorf("messages are\n%s", said)
	}
	_, said, err = run(t, strings.Replace(podIn("shop"), "role: app", "role: other", 1), look)
	if err == nil || !strings.Contains(said, `refused: namespace "shop" does not permit role`) {
		t.Errorf("%v: %s", err, said)
	}
}

// TestLookUpFails: without the namespace, nothing is written, because the user expects that roles are checked. The number
// of namespaces is limited.
func TestLookUpFails(t *testing.T) {
	down := errors.New("down")
	_, _, err := run(t, podIn("shop"), func(cfg *manifests.Config) {
		cfg.LookUp = func(context.Context, string) (policy.Namespace, string, error) { return policy.Namespace{}, "", down }
	})
	if !errors.Is(err, down) || err.Error() != `reading namespace "shop": down` {
		t.Errorf("error is %v", err)
	}
	_, _, err = run(t, "apiVersion: argoproj.io/v1alpha1\nkind: Rollout\nmetadata: {name: r, namespace: shop}\nspec: {template: {metadata: {annotations: {iam.amazonaws.com/role: x}}}}\n", func(cfg *manifests.Config) {
		cfg.LookUp = func(context.Context, string) (policy.Namespace, string, error) { return policy.Namespace{}, "", down }
	})
	if !errors.Is(err, down) {
		t.Errorf("for an object of another kind, the error is %v", err)
	}
	var input strings.Builder
	for n := range 1001 {
		input.WriteString(podIn(fmt.Sprintf("n%d", n)))
	}
	calls := 0
	_, _, err = run(t, input.String(), func(cfg *manifests.Config) {
		cfg.LookUp = func(context.Context, string) (policy.Namespace, string, error) {
			calls++
			return policy.Namespace{}, "it is hidden", nil
		}
	})
	if err == nil || calls != 1000 || err.Error() != "the documents name more than 1000 namespaces; use --namespaces" {
		t.Errorf("after %d calls, the error is %v", calls, err)
	}
}
