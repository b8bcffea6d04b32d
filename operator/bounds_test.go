package operator_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/credence-iam/credence/operator"
)

// TestListsOfAliases: a few lines of aliases stand for more lists than can be looked at.
func TestListsOfAliases(t *testing.T) {
	lists := func(branches int) string {
		text := "x0: &x0 {apiVersion: v1, kind: List, items: []}\n"
		for level := range 8 {
			text += fmt.Sprintf("x%d: &x%[1]d {apiVersion: v1, kind: List, items: [%s]}\n", level+1, strings.Repeat(fmt.Sprintf("*x%d,", level), branches))
		}
		return text + "apiVersion: v1\nkind: List\nitems: [" + strings.Repeat("*x8,", branches) + "]\n"
	}
	// Of four in each they are 349,525 lists, and of five 2,441,406. As many more would do, but the test would not end if the
	// bound were lost.
	if out, said := must(t, lists(4)); out != lists(4) || said != "" {
		t.Errorf("it became\n%s\nand said\n%s", out, said)
	}
	const want = "standard input: document 2, which begins in line 2, cannot be read: " +
		"its lists hold more than 1048576 objects, with those that aliases stand for"
	if _, _, err := run(t, "a: b\n---\n"+lists(5)); err == nil || err.Error() != want {
		t.Errorf("error is %v, want %s", err, want)
	}
}

// TestListsInLists: lists are looked into as deep as anybody puts them into one another, and not without end.
func TestListsInLists(t *testing.T) {
	for lists, injected := range map[int]bool{1: true, 9: true, 10: false, 30: false} {
		text := strings.Repeat(`{"apiVersion":"v1","kind":"List","items":[`, lists) +
			`{"apiVersion":"v1","kind":"Pod","metadata":{"name":"p","annotations":{"iam.amazonaws.com/role":"r"}},"spec":` + podSpec + `}` +
			strings.Repeat(`]}`, lists)
		if out, _ := must(t, text); strings.Contains(out, "/credence-sidecar") != injected || !injected && out != text {
			t.Errorf("in %d lists: want it injected: %v, got\n%s", lists, injected, out)
		}
	}
}

// TestAliasesWrittenOut: a document has to be written anew, and would become longer than any object may be.
func TestAliasesWrittenOut(t *testing.T) {
	pod := func(values int) string {
		return "apiVersion: v1\nkind: Pod\nmetadata: {name: p, annotations: {iam.amazonaws.com/role: r}}\n" +
			"x-containers: &c [{name: app}]\nspec:\n  containers: *c\n" +
			"x-values: &v\n" + strings.Repeat("- 0\n", values) + "x-more:\n- *v\n- *v\n- *v\n"
	}
	if out, said := must(t, pod(3)); strings.Count(out, "- 0\n") != 12 || !strings.Contains(said, "written anew") {
		t.Errorf("it became\n%s\nand said\n%s", out, said)
	}
	_, said, err := run(t, pod(265_000))
	const want = "standard input: document 1 (line 1): refused: cannot be edited: its aliases stand for more than 1048576 values\n"
	if err == nil || !strings.Contains(said, want) {
		t.Errorf("error is %v, and it said\n%s\nwant\n%s", err, said, want)
	}
}

// TestLongLine: the time that a line takes does not grow with the square of its length, or this would not end in minutes.
// What follows the line, and what comes behind other than ASCII, has its place.
func TestLongLine(t *testing.T) {
	text := `{"apiVersion":"v1","kind":"Pod","x":["é"` + strings.Repeat(`,"é"`, 300_000) + `],"spec":` + podSpec + `,` + "\n" +
		`"y":"é","metadata":{"name":"p","annotations":{"iam.amazonaws.com/role":"r"}}}`
	if out, _ := must(t, text); strings.Count(out, "/credence-sidecar:v1") != 1 {
		t.Errorf("it became %.200s", out[strings.Index(out, `"spec"`):])
	}
}

// TestUnreadableOnce: of a document that cannot be read, as one whose aliases hold themselves, that is said once, and not of
// each of its objects.
func TestUnreadableOnce(t *testing.T) {
	text := "apiVersion: v1\nkind: List\nx: &x [*x]\nitems:\n" +
		strings.Repeat("- {apiVersion: v1, kind: Pod, metadata: {name: p}, spec: "+podSpec+"}\n", 3)
	_, said, err := run(t, text)
	const want = "standard input: document 1 (line 1), Pod p: refused: it cannot be read: "
	if err == nil || !strings.HasPrefix(said, want) || strings.Count(said, "\n") != 1 {
		t.Errorf("error is %v, and it said\n%s\nwant one line that begins with\n%s", err, said, want)
	}
}

// TestCancelAtWork: who ends the command does not wait for the rest of the documents, nor for the rest of a long one.
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
		each int // how often it looks whether it has ended, at least, for each of n
	}{
		"documents":    {func(n int) string { return strings.Repeat("a: b\n---\n", n) }, 2},   // parsed, injected
		"JSON":         {func(n int) string { return strings.Repeat(aNamespace+"\n", n) }, 4}, // besides as namespaces
		"namespaces":   {func(n int) string { return list(aNamespace, n) }, 2},                // learnt, passed by
		"pods":         {func(n int) string { return list(pod, n) }, 5},                       // besides patched, checked, compared
		"written anew": {func(n int) string { return list(aliased, n) }, 5},
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
				t.Errorf("of %d more it looks %d times, want %d of each", more-few, got, tt.each)
			}
			for until := range asked(few) {
				ctx := &counted{Context: t.Context(), until: int64(until)}
				if err := work(ctx, t, tt.text(few)); !errors.Is(err, context.Canceled) {
					t.Errorf("ended at %d: error is %v", until, err)
				}
				if n := ctx.n.Load(); n > int64(until)+6 {
					t.Errorf("ended at %d: it looks %d times more", until, n-int64(until))
				}
			}
		})
	}
}

// work runs the command. What is refused is an error, and what is left of output too.
func work(ctx context.Context, t *testing.T, text string) error {
	t.Helper()
	cfg := config(t)
	var out strings.Builder
	cfg.Stdin, cfg.Stdout, cfg.Stderr = strings.NewReader(text), &out, io.Discard
	err := operator.Inject(ctx, cfg)
	if err != nil && out.Len() > 0 {
		return fmt.Errorf("error %v comes with output", err) //nolint:errorlint // it is to be no other
	}
	return err
}

// counted is a context that has ended once it was asked more than until times.
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
