package sessions

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"k8s.io/apimachinery/pkg/util/duration"

	"github.com/credence-iam/credence/broker/clip"
	"github.com/credence-iam/credence/operator/finding"
	"github.com/credence-iam/credence/operator/installation"
)

// Format is a form of output.
type Format string

// The formats: a table, a table with more columns, and JSON.
const (
	Table Format = ""
	Wide  Format = "wide"
	JSON  Format = "json"
)

// Maximum lengths of cells, in characters. All names of Kubernetes and AWS are shorter than maxWide.
const (
	maxName = 40
	maxWide = 400
)

// table prints cells in columns.
type table struct {
	tabs *tabwriter.Writer
	max  int
}

func newTable(w io.Writer, limit int, header ...string) *table {
	t := &table{tabwriter.NewWriter(w, 0, 0, 2, ' ', 0), limit}
	t.row(header...)
	return t
}

// row prints one row. Each cell is printable, and not empty.
func (t *table) row(cells ...string) {
	for n := range cells {
		cells[n] = cmp.Or(clip.Runes(finding.Printable(cells[n]), t.max), "-")
	}
	_, _ = fmt.Fprintln(t.tabs, strings.Join(cells, "\t")) // The last write returns the error.
}

// Write prints the brokers and the rows.
func (s Snapshot) Write(w io.Writer, rows []Row, format Format) error {
	if format == JSON {
		return finding.WriteJSON(w, map[string]any{"namespace": s.Namespace, "brokers": s.states(), "sessions": rows})
	}
	var out bytes.Buffer
	if len(rows) > 0 {
		s.writeRows(&out, rows, format)
	}
	s.writeProblems(&out)
	_, err := w.Write(out.Bytes())
	return err
}

func (s Snapshot) writeRows(w io.Writer, rows []Row, format Format) {
	short := s.shortNames()
	account := accountOf(rows)
	header := []string{"ROLE", "SESSION", "NAMESPACES", "PODS", "AGE", "LEFT", "RENEWAL", "BROKER", "LAST ERROR"}
	limit := maxName
	if format == Wide {
		header = []string{"ROLE", "SESSION", "NAMESPACES", "PODS", "AGE", "LEFT", "RENEWAL", "BROKER", "OWNER", "ACCESS KEY", "DURATION", "POD NAMES", "LAST ERROR"}
		limit = maxWide
	}
	t := newTable(w, limit, header...)
	for _, r := range rows {
		role, broker, failure := strings.TrimPrefix(r.Role, account), short[r.Broker], r.Reason
		if r.Failures > 1 {
			failure += fmt.Sprintf(" (%d times)", r.Failures)
		}
		cells := []string{role, r.SessionName, first(r.Namespaces, 2), strconv.Itoa(r.Pods), r.age(), r.left(), r.renewal(), broker}
		if format == Wide {
			cells[0], cells[2], cells[7] = r.Role, first(r.Namespaces, 5), r.Broker
			cells = append(cells, map[bool]string{true: "yes", false: "no"}[r.Owner], r.AccessKeyID, seconds(r.Duration), first(r.PodNames, 5))
			if r.Message != "" {
				failure += ": " + r.Message
			}
		}
		t.row(append(cells, failure)...)
	}
	_ = t.tabs.Flush() // into a buffer
}

func (s Snapshot) writeProblems(w io.Writer) {
	for _, b := range s.Brokers {
		if b.Err != nil {
			_, _ = fmt.Fprintf(w, "broker %s: %s\n", finding.Printable(b.Name), finding.Printable(clip.Runes(b.Err.Error(), 2*maxWide)))
		}
	}
}

// states returns the brokers for JSON.
func (s Snapshot) states() any {
	type state struct {
		Name     string `json:"name"`
		Sessions int    `json:"sessions"`
		Failing  int    `json:"failing"`
		Error    string `json:"error,omitempty"`
		Right    string `json:"missing_right,omitempty"`
	}
	all := []state{}
	for _, b := range s.Brokers {
		failing := 0
		for _, g := range b.Page.Grants {
			if g.Reason != "" {
				failing++
			}
		}
		one := state{Name: b.Name, Sessions: len(b.Page.Grants), Failing: failing}
		if b.Err != nil {
			one.Error = clip.Runes(b.Err.Error(), 2*maxWide)
			one.Right = rightOf(b.Err)
		}
		all = append(all, one)
	}
	return all
}

// shortNames returns the last parts of the brokers' names, or their names if these are equal.
func (s Snapshot) shortNames() map[string]string {
	short, seen := map[string]string{}, map[string]bool{}
	for _, b := range s.Brokers {
		last := b.Name[strings.LastIndexByte(b.Name, '-')+1:]
		if short[b.Name] = last; seen[last] {
			for _, b := range s.Brokers {
				short[b.Name] = b.Name
			}
			break
		}
		seen[last] = true
	}
	return short
}

// accountOf returns the beginning of the ARNs of all roles, up to the name, if they are of one account.
func accountOf(rows []Row) string {
	before, _, _ := strings.Cut(rows[0].Role, ":role/")
	prefix := before + ":role/"
	for _, r := range rows {
		if !strings.HasPrefix(r.Role, prefix) {
			return ""
		}
	}
	return prefix
}

// first returns the first names and how many more there are.
func first(names []string, limit int) string {
	if len(names) > limit {
		return fmt.Sprintf("%s and %d more", strings.Join(names[:limit], ","), len(names)-limit)
	}
	return strings.Join(names, ",")
}

func (r Row) age() string {
	if r.Issued == nil {
		return ""
	}
	return seconds(max(r.AgeSeconds, 0))
}

func (r Row) left() string {
	switch {
	case r.Expiration == nil:
		return ""
	case r.RemainingSeconds <= 0:
		return "expired"
	}
	return seconds(r.RemainingSeconds)
}

// renewal returns when the broker looks at the session next.
func (r Row) renewal() string {
	switch {
	case r.Fetching:
		return "now"
	case r.NextLook == nil || !r.Owner && r.Failures == 0:
		return "" // It ends without a renewal.
	}
	return seconds(max(r.NextLook.Sub(r.now).Seconds(), 0))
}

func seconds(n float64) string {
	return duration.HumanDuration(time.Duration(n * float64(time.Second)))
}

// rightOf returns the right whose lack caused err.
func rightOf(err error) string {
	if missing, ok := errors.AsType[*installation.ForbiddenError](err); ok {
		return missing.Right
	}
	return ""
}

// WriteKeys prints what is known of keys.
func WriteKeys(w io.Writer, keys []Key, problems []Problem, format Format) error {
	if format == JSON {
		if problems == nil {
			problems = []Problem{}
		}
		return finding.WriteJSON(w, map[string]any{"keys": keys, "problems": problems})
	}
	var out bytes.Buffer
	for n, k := range keys {
		if n > 0 {
			_, _ = fmt.Fprintln(&out)
		}
		k.write(&out, format)
	}
	for _, p := range problems {
		_, _ = fmt.Fprintf(&out, "%s: not read to its end: %s\n", finding.Printable(p.Source), finding.Printable(p.Error))
	}
	_, err := w.Write(out.Bytes())
	return err
}

func (k Key) write(w io.Writer, format Format) {
	_, _ = fmt.Fprintf(w, "access key %s\n", finding.Printable(clip.Runes(k.AccessKeyID, maxWide)))
	if k.Role == "" && len(k.Pods) == 0 {
		_, _ = fmt.Fprintln(w, "  no pod is known to have had it")
	} else {
		expires := ""
		if !k.Expiration.IsZero() {
			expires = ", expires " + k.Expiration.UTC().Format(time.RFC3339)
		}
		_, _ = fmt.Fprintf(w, "  role %s, session %s%s\n", finding.Printable(clip.Runes(k.Role, maxWide)), finding.Printable(clip.Runes(k.SessionName, maxWide)), expires)
	}
	limit := maxName
	if format == Wide {
		limit = maxWide
	}
	if len(k.Pods) > 0 {
		header := []string{"NAMESPACE", "POD", "FIRST", "LAST", "TIMES", "PEERS"}
		if format == Wide {
			header = append(header, "UID", "SOURCES")
		}
		t := newTable(w, limit, header...)
		for _, h := range k.Pods {
			cells := []string{h.Namespace, h.Pod, stamp(h.First), stamp(h.Last), strconv.Itoa(h.Times), first(h.Peers, 2)}
			if format == Wide {
				cells = append(cells, h.PodUID, strings.Join(h.Sources, ", "))
			}
			t.row(cells...)
		}
		_ = t.tabs.Flush() // into a buffer
	}
	if len(k.Events) > 0 {
		t := newTable(w, limit, "EVENT TIME", "EVENT", "SOURCE", "ADDRESS", "ERROR", "PODS", "USER AGENT")
		for _, e := range k.Events {
			pods := first(e.Pods, 2)
			if e.Issued {
				pods = "issued the key"
			}
			t.row(stamp(e.Time), e.Name, e.Source, e.Address, e.ErrorCode, pods, e.UserAgent)
		}
		_ = t.tabs.Flush() // into a buffer
	}
}

func stamp(t time.Time) string {
	if t.IsZero() {
		return ""
	}
	return t.UTC().Format(time.RFC3339)
}
