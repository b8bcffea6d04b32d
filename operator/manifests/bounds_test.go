package manifests_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/credence-iam/credence/operator/manifests"
)

// TestListsOfAliases: a few lines of aliases stand for more lists than the command can read. It refuses them.
func TestListsOfAliases(t *testing.T) {
	lists := func(branches int) string {
		text := "x0: &x0 {apiVersion: v1, kind: List, items: []}\n"
		for level := range 8 {
			text += fmt.Sprintf("x%d: &x%[1]d {apiVersion: v1, kind: List, items: [%s]}\n", level+1, strings.Repeat(fmt.Sprintf("*x%d,", level), branches))
		}
		return text + "apiVersion: v1\nkind: List\nitems: [" + strings.Repeat("*x8,", branches) + "]\n"
	}
	// Four aliases per list make 349,525 lists, five make 2,441,406. More aliases would test the same, but the test would not
	// end without the bound.
	if out, said := must(t, lists(4)); out != lists(4) || said != "" {
		t.Errorf("output\n%s\nmessages\n%s", out, said)
	}
	const want = "standard input: cannot read document 2, which begins in line 2: " +
		"its lists have more than 1048576 objects, aliases resolved; split the document"
	if _, _, err := run(t, "a: b\n---\n"+lists(5)); err == nil || err.Error() != want {
		t.Errorf("error %v, want %s", err, want)
	}
}

// TestListsInLists: the command reads lists in lists, up to a maximum depth that no user needs.
func TestListsInLists(t *testing.T) {
	for lists, injected := range map[int]bool{1: true, 9: true, 10: false, 30: false} {
		text := strings.Repeat(`{"apiVersion":"v1","kind":"List","items":[`, lists) +
			`{"apiVersion":"v1","kind":"Pod","metadata":{"name":"p","annotations":{"iam.amazonaws.com/role":"r"}},"spec":` + podSpec + `}` +
			strings.Repeat(`]}`, lists)
		if out, _ := must(t, text); strings.Contains(out, "/credence-sidecar") != injected || !injected && out != text {
			t.Errorf("in %d lists: want injected %v, got\n%s", lists, injected, out)
		}
	}
}

// TestAliasesWrittenOut: the command refuses a document that exceeds the maximum size once its aliases are resolved.
func TestAliasesWrittenOut(t *testing.T) {
	pod := func(values int) string {
		return "apiVersion: v1\nkind: Pod\nmetadata: {name: p, annotations: {iam.amazonaws.com/role: r}}\n" +
			"x-containers: &c [{name: app}]\nspec:\n  containers: *c\n" +
			"x-values: &v\n" + strings.Repeat("- 0\n", values) + "x-more:\n- *v\n- *v\n- *v\n"
	}
	if out, said := must(t, pod(3)); strings.Count(out, "- 0\n") != 12 || !strings.Contains(said, "rewritten") {
		t.Errorf("output\n%s\nmessages\n%s", out, said)
	}
	_, said, err := run(t, pod(265_000))
	const want = "standard input: document 1 (line 1): refused: cannot add the sidecar to the text: its aliases stand for more than 1048576 values; shorten the document\n"
	if err == nil || !strings.Contains(said, want) {
		t.Errorf("error %v, messages\n%s\nwant\n%s", err, said, want)
	}
}

// TestLongLine: the time for a line is not quadratic in its length; if it were, this test would take minutes. Additions
// after a long line, and after characters beyond ASCII, are in the right place.
func TestLongLine(t *testing.T) {
	text := `{"apiVersion":"v1","kind":"Pod","x":["é"` + strings.Repeat(`,"é"`, 300_000) + `],"spec":` + podSpec + `,` + "\n" +
		`"y":"é","metadata":{"name":"p","annotations":{"iam.amazonaws.com/role":"r"}}}`
	if out, _ := must(t, text); strings.Count(out, "/credence-sidecar:v1") != 1 {
		t.Errorf("output %.200s", out[strings.Index(out, `"spec"`):])
	}
}

// TestUnreadableOnce: a document that cannot be read, such as one whose alias contains itself, has one message, not one for
// each of its objects.
func TestUnreadableOnce(t *testing.T) {
	text := "apiVersion: v1\nkind: List\nx: &x [*x]\nitems:\n" +
		strings.Repeat("- {apiVersion: v1, kind: Pod, metadata: {name: p}, spec: "+podSpec+"}\n", 3)
	_, said, err := run(t, text)
	const want = "standard input: document 1 (line 1), Pod p: refused: cannot read it: "
	if err == nil || !strings.HasPrefix(said, want) || strings.Count(said, "\n") != 1 {
		t.Errorf("error %v, messages\n%s\nwant one line that begins with\n%s", err, said, want)
	}
}

// TestCancelAtWork: an interrupted command stops at once, between documents and within a long one.
func TestCancelAtWork(t *testing.T) {
	const aNamespace = `{"apiVersion":"v1","kind":"Namespace","metadata":{"name":"x"}}`
	pod := `{"apiVersion":"v1","kind":"Pod","metadata":{"name":"p","annotations":{"iam.amazonaws.com/role":"r"}},"spec":` + podSpec + `}`
	aliased := `{apiVersion: v1, kind: Pod, metadata: {name: p, annotations: {iam.amazonaws.com/role: r}}, x: &c [{name: app}], spec: {containers: *c}}`
	list := func(what string, n int) string {
		return "{apiVersion: v1, kind: List, items: [\n" + strings.Repeat(what+",\n", n) + "]}\n"
	}
	const few, more = 2, 5
	for name, tt := range map[string]struct {
		text func(n int) string
		each int // minimum number of times that the command checks its context, for each of n
	}{
		"documents":  {func(n int) string { return strings.Repeat("a: b\n---\n", n) }, 2},   // while it parses and injects
		"JSON":       {func(n int) string { return strings.Repeat(aNamespace+"\n", n) }, 4}, // and while it reads namespaces
		"namespaces": {func(n int) string { return list(aNamespace, n) }, 2},                // while it reads namespaces and skips objects
		"pods":       {func(n int) string { return list(pod, n) }, 5},                       // and while it patches, checks and compares
		"rewritten":  {func(n int) string { return list(aliased, n) }, 5},
	} {
		t.Run(name, func(t *testing.T) {
			asked := func(n int) int {
				ctx := &counted{Context: t.Context(), until: 1 << 30}
				if err := work(ctx, t, tt.text(n)); err != nil {
					t.Fatal(err)
				}
				return int(ctx.n.Load())
			}
			if got := asked(more) - asked(few); got < tt.each*(more-few) {
				t.Errorf("%d more objects: it checks its context %d times, want %d for each", more-few, got, tt.each)
			}
			for until := range asked(few) {
				ctx := &counted{Context: t.Context(), until: int64(until)}
				if err := work(ctx, t, tt.text(few)); !errors.Is(err, context.Canceled) {
					t.Errorf("context ended at check %d: error %v", until, err)
				}
				if n := ctx.n.Load(); n > int64(until)+6 {
					t.Errorf("context ended at check %d: %d more checks", until, n-int64(until))
				}
			}
		})
	}
}

// work runs the command. It returns an error if the command refuses, or fails and still writes output.
func work(ctx context.Context, t *testing.T, text string) error {
	t.Helper()
	cfg := config(t)
	var out strings.Builder
	cfg.Stdin, cfg.Stdout, cfg.Stderr = strings.NewReader(text), &out, io.Discard
	err := manifests.Inject(ctx, cfg)
	if err != nil && out.Len() > 0 {
		return fmt.Errorf("error %v comes with output", err) //nolint:errorlint // The caller compares the error itself.
	}
	return err
}

// counted is a context that ends after until calls of its Err.
type counted struct {
	context.Context
	until int64
	n     atomic.Int64
}

func (c *counted) Err() error {
	if c.n.Add(1) > c.until {
		return context.Canceled
	}
	return nil
}
