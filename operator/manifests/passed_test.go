package manifests_test

import (
	"fmt"
	"strings"
	"testing"

	"github.com/credence-iam/credence/operator/manifests"
)

// TestPassedBy: an annotated template of an unknown kind stays unchanged, and a note names it.
func TestPassedBy(t *testing.T) {
	const rollout = "apiVersion: argoproj.io/v1alpha1\nkind: Rollout\nmetadata:\n  name: r\nspec:\n  template:\n    metadata:\n      annotations:\n        iam.amazonaws.com/role: r\n    spec:\n      containers: [{name: a}]\n"
	note := func(document, line int, name, kind, at string, key string) string {
		return fmt.Sprintf("standard input: document %d (line %d), %s: note: unchanged, because credence inject does not know the kind %s; "+
			"the webhook injects its pods at their creation, if they get the annotations of line %s, %s", document, line, name, kind, at, key)
	}
	for name, tt := range map[string]struct{ text, said string }{
		"Rollout":  {"a: b\n---\n" + rollout, note(2, 3, "Rollout r", "Rollout of argoproj.io/v1alpha1", "10", "spec.template.metadata.annotations, and their namespace is opted in\n")},
		"opted in": {optedIn + rollout, note(2, 8, "Rollout r", "Rollout of argoproj.io/v1alpha1", "15", "spec.template.metadata.annotations\n")},
		"not opted in": {strings.Replace(optedIn, ": enabled", ": disabled", 1) + rollout,
			note(2, 8, "Rollout r", "Rollout of argoproj.io/v1alpha1", "15", `spec.template.metadata.annotations, but namespace "team-a" is not opted in; label it iam.amazonaws.com/inject=enabled`+"\n")},
		"Knative, in a list": {"apiVersion: v1\nkind: List\nitems:\n- apiVersion: serving.knative.dev/v1\n  kind: Service\n  metadata: {name: s, namespace: x}\n  spec:\n    template:\n      metadata: {annotations: {iam.amazonaws.com/role: r}}\n",
			note(1, 1, "Service x/s", "Service of serving.knative.dev/v1", "9", "spec.template.metadata.annotations, and their namespace is opted in\n")},
		"kruise, JSON": {`{"apiVersion":"apps.kruise.io/v1alpha1","kind":"CloneSet","metadata":{"name":"c"},` + "\n" + `"spec":{"template":` + template + "}}\n",
			note(1, 1, "CloneSet c", "CloneSet of apps.kruise.io/v1alpha1", "2", "spec.template.metadata.annotations")},
		"Advanced StatefulSet": {"apiVersion: apps.kruise.io/v1beta1\nkind: StatefulSet\nmetadata: {name: c}\nspec: {template: " + template + "}\n",
			note(1, 1, "StatefulSet c", "StatefulSet of apps.kruise.io/v1beta1", "4", "spec.template.metadata.annotations")},
		"annotations alone": {"apiVersion: sparkoperator.k8s.io/v1beta2\nkind: SparkApplication\nmetadata: {name: s}\nspec:\n  driver:\n    podAnnotations: {iam.amazonaws.com/role: r}\n",
			note(1, 1, "SparkApplication s", "SparkApplication of sparkoperator.k8s.io/v1beta2", "6", "spec.driver.podAnnotations")},
		"merged": {"apiVersion: x/v1\nkind: X\nx-common: &c {iam.amazonaws.com/role: r}\nspec:\n  annotations:\n    <<: *c\n",
			note(1, 1, "X", "X of x/v1", "5", "spec.annotations")},
		"its own annotations": {"apiVersion: v1\nkind: ServiceAccount\nmetadata: {name: x, annotations: {iam.amazonaws.com/role: r}}\n", ""},
		"in a text":           {"apiVersion: v1\nkind: ConfigMap\ndata:\n  annotations: 'iam.amazonaws.com/role: r'\n", ""},
		"others":              {strings.ReplaceAll(rollout, "iam.amazonaws.com", "example.org"), ""},
	} {
		out, said := must(t, tt.text)
		if out != tt.text {
			t.Errorf("%s: output\n%s", name, out)
		}
		if !strings.HasPrefix(said, tt.said) || tt.said == "" && said != "" {
			t.Errorf("%s: messages\n%s\nwant\n%s", name, said, tt.said)
		}
	}
	// Without a namespace, the command cannot check whether it is opted in.
	_, said := must(t, rollout, func(c *manifests.Config) { c.Namespace = "" })
	if !strings.HasSuffix(said, "and their namespace is opted in\n") {
		t.Errorf("without a namespace: messages\n%s", said)
	}
}
