package webhook_test

import (
	"context"
	"encoding/json"
	"net/http"
	"slices"
	"strings"
	"testing"

	jsonpatch "github.com/evanphx/json-patch/v5"
	corev1 "k8s.io/api/core/v1"

	"github.com/credence-iam/credence/broker/policy"
	"github.com/credence-iam/credence/webhook"
)

// TestCheckTemplate: a PodTemplate is injected by its template, and its namespace need not be opted in.
func TestCheckTemplate(t *testing.T) {
	var decisions []string
	client, url := startTCP(t, func(cfg *webhook.Config) {
		cfg.Namespaces = namespaces(func(context.Context, string) (policy.Namespace, error) {
			t.Error("the namespace of a check is read")
			return policy.Namespace{}, nil
		})
		cfg.Observe = func(o webhook.Observation) { decisions = append(decisions, o.Decision) }
	})
	of := func(template string) string {
		return `{"apiVersion":"v1","kind":"PodTemplate","metadata":{"name":"credence-check","annotations":{"iam.amazonaws.com/role":"x"}},"template":` + template + `}`
	}
	send := func(object, resource string) (*corev1.PodTemplate, string) {
		t.Helper()
		code, text := post(t, client, url+"/mutate", "application/json", review(object, `"resource":"pods"`, `"resource":"`+resource+`"`))
		if code != http.StatusOK {
			t.Fatalf("status %d: %s", code, text)
		}
		response := decodeReview(t, text, "0b2e5d3c")
		if !response.Allowed {
			return nil, response.Result.Message
		}
		injected := []byte(object)
		if response.Patch != nil {
			patch, err := jsonpatch.DecodePatch(response.Patch)
			if err == nil {
				injected, err = patch.Apply(injected)
			}
			if err != nil {
				t.Fatalf("%v: %s", err, response.Patch)
			}
		}
		var template corev1.PodTemplate
		if err := json.Unmarshal(injected, &template); err != nil {
			t.Fatal(err)
		}
		return &template, ""
	}
	native := func(p *corev1.PodTemplate) bool {
		return slices.ContainsFunc(p.Template.Spec.InitContainers, func(c corev1.Container) bool { return c.Name == "credence-sidecar" && c.Image == image })
	}
	if got, refusal := send(of(pod("check", "")), "podtemplates"); got == nil || !native(got) || got.Template.Labels["iam.amazonaws.com/injected"] != "true" {
		t.Errorf("the template is not injected: %+v %s", got, refusal)
	}
	// Only the template's own annotations count.
	if got, refusal := send(of(`{"spec":{"containers":[{"name":"app"}]}}`), "podtemplates"); got == nil || native(got) {
		t.Errorf("a template without annotations is injected or refused: %s", refusal)
	}
	if got, _ := send(of(pod("check", "")), "replicationcontrollers"); got == nil || native(got) {
		t.Error("another resource is injected or refused")
	}
	for name, tt := range map[string]struct{ object, want string }{
		"unsupported": {of(pod("check", `"hostNetwork":true,`)), "the pod has hostNetwork"},
		"too long":    {of(pod("check", `"nodeName":"`+strings.Repeat("x", 16<<10)+`",`)), "the PodTemplate is longer than 16384 bytes"},
		"no template": {`{"template":7}`, "cannot read the pod"},
		"no object":   {`"text"`, "internal error"},
	} {
		if got, refusal := send(tt.object, "podtemplates"); got != nil || !strings.Contains(refusal, tt.want) {
			t.Errorf("%s: refusal is %q, want %q", name, refusal, tt.want)
		}
	}
	if want := []string{"checked", "checked", "untouched", "refused", "refused", "refused", "refused"}; !slices.Equal(decisions, want) {
		t.Errorf("decisions are %v, want %v", decisions, want)
	}
}
