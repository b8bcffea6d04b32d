package inject_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/webhook/inject/podview"
)

// TestQuantities: Inject refuses a quantity that would take minutes to compare.
func TestQuantities(t *testing.T) {
	for text, refused := range map[string]bool{
		`"1"`: false, `1`: false, `"1e3"`: false, `1e3`: false, `"1E"`: false, `"1Ei"`: false, `"1e99"`: false, `"1E-30"`: false,
		`"1e99999999"`: true, `1e99999999`: true, `"+1.5e+100"`: true, `"-1E-99999999"`: true, `" 1e99999999"`: true, `"1e99999999 "`: true, `" 1e9 "`: false, `"1e0000001"`: true,
		`"` + strings.Repeat("1", 60) + `"`: false, `"` + strings.Repeat("1", 1000) + `"`: true, `1` + strings.Repeat("0", 1000): true,
	} {
		for _, place := range []string{
			`"containers":[{"name":"app","resources":{"limits":{"cpu":%s,"memory":"1"},"requests":{"cpu":"1","memory":"1"}}}]`,
			`"containers":[{"name":"app","resources":{"limits":{"cpu":"1","memory":"1"},"requests":{"cpu":%s,"memory":"1"}}}]`,
			`"resources":{"limits":{"memory":%s}},"containers":[{"name":"app"}]`,
		} {
			_, err := newInjector(t).Inject(fmt.Appendf(nil, `{"metadata":{"annotations":{"iam.amazonaws.com/role":"r"}},"spec":{`+place+`}}`, text), namespace)
			if (err != nil) != refused || refused && !strings.Contains(err.Error(), "an exponent of more than 2 digits") {
				t.Errorf("%.40s in %s: error is %v, want a refusal: %v", text, place, err, refused)
			}
		}
	}
}

// TestOtherSourcesOfVariables: Inject does not decode fields of variables that it does not need. A divisor can take minutes
// to decode.
func TestOtherSourcesOfVariables(t *testing.T) {
	for _, from := range []string{
		`{"resourceFieldRef":{"resource":"limits.cpu","divisor":"1e-99999999"}}`,
		`{"resourceFieldRef":{"resource":"limits.cpu","divisor":"not decoded"}}`,
		`{"secretKeyRef":{"optional":"not decoded"}}`,
	} {
		raw := `{"metadata":{"annotations":{"iam.amazonaws.com/role":"r"}},"spec":{"containers":[{"name":"app","env":[{"name":"AWS_ACCESS_KEY_ID","valueFrom":` + from + `}]}]}}`
		result, err := newInjector(t).Inject([]byte(raw), namespace)
		if err != nil || len(result.Warnings) != 1 || !strings.Contains(result.Warnings[0], "sets AWS_ACCESS_KEY_ID") {
			t.Errorf("%s: error %v, warnings %q", from, err, result.Warnings)
		}
	}
}

// TestManyVariables: variables that may give another identity take little more time than other variables.
func TestManyVariables(t *testing.T) {
	const n = 30_000
	duration := func(name, value string) time.Duration {
		var env strings.Builder
		for at := range n {
			fmt.Fprintf(&env, `{"name":"%s%05d","value":"%s"},`, name, at%(n/2), value)
		}
		// These override the first ones: the last variable with a name applies.
		for at := range n / 2 {
			fmt.Fprintf(&env, `{"name":"%s%05d"},`, name, at)
		}
		raw := []byte(`{"metadata":{"annotations":{"iam.amazonaws.com/role":"r"}},"spec":{"containers":[{"name":"app","env":[` + strings.TrimSuffix(env.String(), ",") + `]}]}}`)
		shortest := time.Hour
		for range 3 {
			began := time.Now()
			if _, err := newInjector(t).Inject(raw, namespace); err != nil {
				t.Fatal(err)
			}
			shortest = min(shortest, time.Since(began))
		}
		return shortest
	}
	const agent = "http://169.254.170.23/v1/credentials"
	if other, family := duration("AWS_CONFIGURED_", agent), duration("AWS_CONTAINER_", agent); family > 8*other {
		t.Errorf("variables of the AWS_CONTAINER_ family take %s, others %s", family, other)
	}
}

// counted is a context that ends after left calls of Err.
type counted struct {
	context.Context
	left int
}

func (c *counted) Err() error {
	if c.left--; c.left < 0 {
		return context.DeadlineExceeded
	}
	return nil
}

// TestInjectWithin: work on a pod stops at the end of its context, and if there is no memory for it.
func TestInjectWithin(t *testing.T) {
	raw := []byte(`{"metadata":{"annotations":{"iam.amazonaws.com/role":"r"}},"spec":{"containers":[{"name":"c"}` + strings.Repeat(`,{"name":"c"}`, 99) + `]}}`)
	i := newInjector(t)
	for _, left := range []int{0, 1, 50} {
		ctx := &counted{t.Context(), left}
		result, err := i.InjectWithin(ctx, raw, namespace, func(int) error { return nil })
		if !errors.Is(err, context.DeadlineExceeded) || result.Patch != nil || !result.Annotated {
			t.Errorf("context that ends after %d calls: patch %+v, error %v", left, result.Patch, err)
		}
		if ctx.left != -1 {
			t.Errorf("InjectWithin continues after the end of its context, for %d containers", -ctx.left-1)
		}
	}
	full := errors.New("no memory")
	reserved := 0
	if _, err := i.InjectWithin(t.Context(), raw, namespace, func(containers int) error { reserved = containers; return full }); !errors.Is(err, full) || reserved != 100 {
		t.Errorf("without memory for %d containers, want 100: error %v", reserved, err)
	}
	result, err := i.InjectWithin(t.Context(), raw, namespace, func(int) error { return nil })
	if err != nil || len(result.Patch) == 0 {
		t.Errorf("with time and memory: error %v", err)
	}
	// It does not decode objects that are too large.
	for name, raw := range map[string]string{
		"bytes":  `{` + strings.Repeat(" ", podview.MaxObject),
		"values": `[` + strings.Repeat(`,`, podview.MaxValues+1),
		"depth":  strings.Repeat(`[`, podview.MaxDepth+1),
	} {
		_, err := i.InjectWithin(t.Context(), []byte(raw), namespace, func(int) error { return nil })
		if credential.ReasonOf(err) != credential.ReasonPodUnsupported || strings.Contains(err.Error(), "cannot read") {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestLongNames: Inject refuses long names before messages and the patch repeat them.
func TestLongNames(t *testing.T) {
	long := strings.Repeat("x", 254)
	for _, spec := range []string{
		`"containers":[{"name":"` + long + `"}]`,
		`"containers":[{"name":"app"}],"serviceAccountName":"` + long + `"`,
		`"containers":[{"name":"app"}],"serviceAccount":"` + long + `"`,
	} {
		_, err := newInjector(t).Inject([]byte(`{"metadata":{"annotations":{"iam.amazonaws.com/role":"r"}},"spec":{`+spec+`}}`), namespace)
		if err == nil || !strings.Contains(err.Error(), "is longer than 253 characters") {
			t.Errorf("%.60s: %v", spec, err)
		}
	}
}

// TestManyNames: a refusal lists at most 20 containers.
func TestManyNames(t *testing.T) {
	raw := `{"metadata":{"annotations":{"iam.amazonaws.com/role":"r","iam.amazonaws.com/containers":"x"}},"spec":{"containers":[{"name":"c"}` + strings.Repeat(`,{"name":"c"}`, 99) + `]}}`
	_, err := newInjector(t).Inject([]byte(raw), namespace)
	if err == nil || !strings.HasSuffix(err.Error(), `"c" "c"] and 80 more; correct the name`) || strings.Count(err.Error(), `"c"`) != 20 {
		t.Errorf("refusal is %v", err)
	}
}
