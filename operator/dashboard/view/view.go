package view

import (
	"cmp"
	"fmt"
	"maps"
	"math"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/operator/finding"
	"github.com/credence-iam/credence/operator/metrics"
)

const (
	// sessionsShown is the number of sessions on one page.
	sessionsShown = 100
	// podsShown is the number of pods that the page shows for one reason.
	podsShown = 8
	// maxFilter limits the text that a user filters by.
	maxFilter = 200
	// stale is the age at which the page says that its data is old.
	stale = 2 * time.Minute
)

// Choice is what the user chose to see, from the query of the URL.
type Choice struct {
	Text      string // sessions with this text
	Attention bool   // only sessions that need attention
	From      int    // the first session
}

// ChoiceOf returns the choice in the query of a URL. It takes nonsense for the first page of all sessions.
func ChoiceOf(query url.Values) Choice {
	from, _ := strconv.Atoi(query.Get("from")) // Nonsense is 0, the first page.
	text := query.Get("q")
	return Choice{Text: text[:min(len(text), maxFilter)], Attention: query.Get("show") == "attention", From: max(from, 0)}
}

// link returns the query of the page of sessions that starts at from.
func (c Choice) link(from int) string {
	q := url.Values{}
	if c.Text != "" {
		q.Set("q", c.Text)
	}
	if c.Attention {
		q.Set("show", "attention")
	}
	if from > 0 {
		q.Set("from", strconv.Itoa(from))
	}
	return "?" + q.Encode() + "#sessions"
}

// Page is all that the page shows, as texts.
type Page struct {
	Cluster, Namespace string
	Collecting         bool // there is no snapshot yet
	Read, ReadExact    string
	Age                string
	Stale              bool
	Over               string // what "recent" means
	State              finding.State
	Summary            string
	Findings           []healthRow
	Facts              []fact
	Choice             Choice
	Sessions           sessionsView
	STS                []stsRow
	STSErrors          []reasonRow
	Refusals           []reasonRow
	RefusedKnown       bool
	Pods               []podRow
	Budget             []budgetRow
}

type healthRow struct {
	finding.Finding
	Label string
}

type fact struct{ Name, Value, Note string }

type sessionsView struct {
	Rows                     []sessionRow
	First, Last, Shown, All  int
	LeftOut                  int
	Needing                  string // how many need attention
	Previous, Next           string
	HasPrevious, HasNext     bool
	Filtered, NobodyResponds bool
}

type sessionRow struct {
	State            finding.State
	Label            string
	Role, Name       string
	Namespaces       string
	Pods             int
	Left, Duration   string
	Percent          int
	Reason, Message  string
	Person           finding.Person
	Brokers          []string
	Keys             []string
	remaining, share float64
}

type stsRow struct {
	Action, Median, High string
	Recent, Failed       string
	Total, TotalFailed   string
}

type reasonRow struct {
	Reason                   string
	Action                   string // of STS
	Text                     []span
	Kind                     string
	Person                   finding.Person
	Recent, Total, Admission string
	Pods                     []refusedRow
	More                     int // pods
	recent, total            float64
}

// refusedRow has the pods with one message.
type refusedRow struct {
	Message string
	Pods    []string
}

type podRow struct {
	Name, Program, Version, Node, Zone string
	State                              finding.State
	Label                              string
	Restarts                           int
	Age                                string
	Sessions, Answers                  string
	Data                               string
	Err                                string
}

type budgetRow struct {
	Broker                string
	Demand, Share, Limit  string
	Percent               int
	State                 finding.State
	Label                 string
	Queued, InFlight      string
	Throttled             bool
	demand, share, atMost float64
}

// Of returns the page of a snapshot and those before it, at the time now and in its location.
func Of(s Snapshot, h History, c Choice, now time.Time) Page {
	v := Page{Cluster: cmp.Or(s.Cluster, "unknown"), Namespace: s.Namespace, Choice: c, RefusedKnown: s.RefusedKnown}
	if s.Time.IsZero() {
		v.Collecting, v.State, v.Summary = true, finding.Unknown, "Reading from the cluster"
		return v
	}
	age := now.Sub(s.Time)
	v.Read, v.ReadExact = s.Time.In(now.Location()).Format("15:04:05 MST"), s.Time.UTC().Format(time.RFC3339)
	v.Age, v.Stale = short(age), age > stale
	brokers := sum(s, h, func(p Pod) bool { return !p.Webhook })
	webhooks := sum(s, h, func(p Pod) bool { return p.Webhook })
	v.Over = "since this page began to read"
	if brokers.over > 0 {
		v.Over = "in the last " + short(brokers.over)
	}
	merged := merge(s.Sessions, now)
	report := finding.Report{Findings: health(s, merged, brokers, now)}
	v.State = report.Worst()
	v.Summary = summary(report.Findings, v.State)
	for _, f := range report.Findings {
		v.Findings = append(v.Findings, healthRow{f, labels[f.State]})
	}
	v.Sessions = sessionsOn(merged, c, s)
	v.STS, v.STSErrors = stsOf(brokers)
	v.Refusals = refusalsOf(s, brokers, webhooks, now)
	for _, p := range s.Pods {
		v.Pods = append(v.Pods, podOn(p, now))
		if !p.Webhook && p.Metrics != nil {
			v.Budget = append(v.Budget, budgetOf(p))
		}
	}
	v.Facts = facts(s, merged, brokers, v)
	return v
}

// labels name the states.
var labels = map[finding.State]string{finding.OK: "OK", finding.Unknown: "Unknown", finding.Warning: "Warning", finding.Failed: "Failed"}

func summary(findings []finding.Finding, worst finding.State) string {
	count := 0
	for _, f := range findings {
		if f.State == worst {
			count++
		}
	}
	switch worst {
	case finding.OK:
		return "All is well"
	case finding.Unknown:
		return counted(count, "thing is unknown", "things are unknown")
	case finding.Warning:
		return counted(count, "warning", "warnings")
	default:
		return counted(count, "failure", "failures")
	}
}

func facts(s Snapshot, merged []sessionRow, brokers numbers, v Page) []fact {
	valid, nearest := 0, math.Inf(1)
	for _, row := range merged {
		if row.remaining > 0 {
			valid++
			if row.Pods > 0 {
				nearest = min(nearest, row.remaining)
			}
		}
	}
	all := []fact{
		{"Webhooks ready", replicas(s.Webhook), ""}, {"Brokers ready", replicas(s.Broker), ""},
		{"Valid sessions", fmt.Sprintf("%d of %d", valid, len(merged)), v.Sessions.Needing},
	}
	if !math.IsInf(nearest, 1) {
		all = append(all, fact{"Shortest time left", shortSeconds(nearest), "of a session that pods use"})
	}
	value, over := "no call", v.Over
	if high, ok := brokers.recent.Quantile(0.99, stsTook, assume); ok {
		value = milliseconds(high)
	}
	all = append(all, fact{"STS, 99th percentile", value, over})
	refused := brokers.recent.Of(refusalsTotal)
	return append(all, fact{"Refusals", count(refused), over})
}

// merge joins the sessions of one grant, which two brokers keep, and computes the time left at now.
func merge(sessions []Session, now time.Time) []sessionRow {
	type key struct {
		grant                    string
		duration                 float64
		external, policy         bool
		policyARNs, tags, number int
	}
	rows, seen := map[key]*sessionRow{}, map[string]map[key]int{}
	for _, g := range sessions {
		k := key{g.Grant.Grant, g.Duration, g.ExternalID, g.SessionPolicy, g.PolicyARNs, g.Tags, 0}
		if seen[g.Broker] == nil {
			seen[g.Broker] = map[key]int{}
		}
		seen[g.Broker][k]++ // Grants may differ in what the page does not have, such as the values of tags.
		k.number = seen[g.Broker][k]
		next := rowOf(g, now)
		row := rows[k]
		switch {
		case row == nil:
			rows[k] = &next
			continue
		case next.Pods > 0 && row.Pods == 0 || (next.Pods > 0) == (row.Pods > 0) && next.worse(row):
			// An owner shows how the grant is. Others may have an old session.
			next.Brokers, next.Keys = append(row.Brokers, next.Brokers...), append(row.Keys, next.Keys...)
			rows[k], row = &next, &next
		default:
			row.Brokers, row.Keys = append(row.Brokers, next.Brokers...), append(row.Keys, next.Keys...)
		}
		row.Pods = max(row.Pods, next.Pods)
	}
	all := make([]sessionRow, 0, len(rows))
	for _, row := range rows {
		slices.Sort(row.Brokers)
		slices.Sort(row.Keys)
		all = append(all, *row)
	}
	slices.SortFunc(all, func(a, b sessionRow) int {
		return cmp.Or(cmp.Compare(rank(b.State), rank(a.State)), cmp.Compare(a.share, b.share), cmp.Compare(a.Role, b.Role), cmp.Compare(a.Name, b.Name), slices.Compare(a.Keys, b.Keys))
	})
	return all
}

// rank orders states from harmless to severe. A session in an unknown state is only on its way.
func rank(s finding.State) int {
	return slices.Index([]finding.State{finding.OK, finding.Unknown, finding.Warning, finding.Failed}, s)
}

func (r *sessionRow) worse(than *sessionRow) bool {
	return cmp.Or(cmp.Compare(rank(r.State), rank(than.State)), cmp.Compare(than.remaining, r.remaining)) > 0
}

// overdue is the part of a session's duration at which it should have been renewed, as in the metric sessions_late.
const overdue = 0.45

// Labels of sessions that need attention.
const (
	refusedLabel = "No session, the fetch failed"
	failedLabel  = "Valid, the renewal failed"
	missingLabel = "No session yet"
	overdueLabel = "Valid, the renewal is overdue"
)

func rowOf(g Session, now time.Time) sessionRow {
	r := sessionRow{
		Role: g.Role, Name: g.SessionName, Namespaces: namesOf(g.Namespaces), Pods: g.Pods,
		Duration: shortSeconds(g.Duration), Left: "none", Reason: g.Reason, Message: g.Message, Brokers: []string{g.Broker},
	}
	if g.Reason != "" {
		r.Person = personOf(credential.Reason(g.Reason))
	}
	if g.AccessKeyID != "" {
		r.Keys = []string{g.AccessKeyID}
	}
	// The broker's clock and ours may differ, so only the time since it was read counts.
	if r.remaining = max(g.RemainingSeconds-max(now.Sub(g.Read).Seconds(), 0), 0); g.Expiration == nil {
		r.remaining = 0
	}
	if r.remaining > 0 {
		r.Left = shortSeconds(r.remaining)
		if g.Duration > 0 {
			r.share = min(r.remaining/g.Duration, 1)
			r.Percent = max(int(r.share*100), 1)
		}
	}
	switch {
	case r.remaining == 0 && g.Reason != "":
		r.State, r.Label = finding.Failed, refusedLabel
	case r.remaining == 0 && (g.Fetching || g.Waiters > 0):
		r.State, r.Label = finding.Unknown, "First fetch"
	case r.remaining == 0 && g.Pods > 0:
		r.State, r.Label = finding.Warning, missingLabel
	case r.remaining == 0:
		r.State, r.Label = finding.OK, "Not in use"
	case g.Reason != "":
		r.State, r.Label = finding.Warning, failedLabel
	case g.Pods == 0:
		r.State, r.Label = finding.OK, "Not in use"
	case r.share < overdue:
		r.State, r.Label = finding.Warning, overdueLabel
	default:
		r.State, r.Label = finding.OK, "Valid"
	}
	return r
}

func sessionsOn(all []sessionRow, c Choice, s Snapshot) sessionsView {
	v := sessionsView{All: len(all), LeftOut: s.SessionsLeftOut, Filtered: c.Text != "" || c.Attention}
	text := strings.ToLower(c.Text)
	var matched []sessionRow
	needing := 0
	for _, row := range all {
		attention := rank(row.State) >= rank(finding.Warning)
		if attention {
			needing++
		}
		if (attention || !c.Attention) && (text == "" || strings.Contains(strings.ToLower(strings.Join([]string{row.Role, row.Name, row.Namespaces, row.Reason, row.Label}, " ")), text)) {
			matched = append(matched, row)
		}
	}
	v.Needing = counted(needing, "needs attention", "need attention")
	from := min(c.From, len(matched))
	v.Rows = matched[from:min(from+sessionsShown, len(matched))]
	v.Shown, v.First, v.Last = len(matched), from+1, from+len(v.Rows)
	v.HasPrevious, v.Previous = from > 0, c.link(max(from-sessionsShown, 0))
	v.HasNext, v.Next = v.Last < len(matched), c.link(from+sessionsShown)
	v.NobodyResponds = !slices.ContainsFunc(s.Pods, func(p Pod) bool { return !p.Webhook && p.Err == "" })
	return v
}

// Names of the metrics that several parts use.
const (
	stsCalls      = "credence_broker_sts_calls_total"
	stsTook       = "credence_broker_sts_call_duration_seconds"
	refusalsTotal = "credence_broker_refusals_total"
	assume        = `action="AssumeRole"`
	outcomeOK     = "ok"
)

func stsOf(n numbers) (rows []stsRow, errs []reasonRow) {
	for _, action := range slices.Sorted(maps.Keys(n.total.By(stsCalls, "action"))) {
		is := `action="` + action + `"`
		row := stsRow{Action: action, Median: "–", High: "–"}
		calls := n.recent
		if _, ok := calls.Quantile(0.5, stsTook, is); !ok {
			calls = n.total
		}
		if median, ok := calls.Quantile(0.5, stsTook, is); ok {
			high, _ := calls.Quantile(0.99, stsTook, is)
			row.Median, row.High = milliseconds(median), milliseconds(high)
		}
		recent, total := n.recent.By(stsCalls, "outcome", is), n.total.By(stsCalls, "outcome", is)
		good, goodTotal := recent[outcomeOK], total[outcomeOK]
		all, allTotal := n.recent.Of(stsCalls, is), n.total.Of(stsCalls, is)
		row.Recent, row.Failed, row.Total, row.TotalFailed = count(all), count(all-good), count(allTotal), count(allTotal-goodTotal)
		rows = append(rows, row)
		for outcome := range total {
			if outcome != outcomeOK && total[outcome] > 0 {
				e := reasonOn(outcome, recent[outcome], total[outcome])
				e.Action = action
				errs = append(errs, e)
			}
		}
	}
	slices.SortFunc(errs, func(a, b reasonRow) int {
		return cmp.Or(cmp.Compare(b.recent, a.recent), cmp.Compare(b.total, a.total), cmp.Compare(a.Reason, b.Reason), cmp.Compare(a.Action, b.Action))
	})
	return rows, errs
}

func reasonOn(reason string, recent, total float64) reasonRow {
	m, known := meanings[credential.Reason(reason)]
	if !known {
		m.text = "This command does not know the reason: it may be older than the brokers. See `docs/errors.md`."
	}
	return reasonRow{
		Reason: reason, Kind: m.kind, Text: spans(m.text), Person: personOf(credential.Reason(reason)),
		Recent: count(recent), Total: count(total), Admission: "0", recent: recent, total: total,
	}
}

// refusalsOf returns a row for each reason for which brokers or webhooks refused, the most recent ones first.
func refusalsOf(s Snapshot, brokers, webhooks numbers, now time.Time) []reasonRow {
	admissions := webhooks.total.By("credence_webhook_refusals_total", "reason")
	total, recent := brokers.total.By(refusalsTotal, "reason"), brokers.recent.By(refusalsTotal, "reason")
	pods := map[string][]Refused{}
	for _, r := range s.Refused {
		if r.Reason != "" {
			pods[r.Reason] = append(pods[r.Reason], r)
		}
	}
	var all []reasonRow
	reasons := map[string]bool{}
	for _, from := range []map[string]float64{admissions, total} {
		for reason, n := range from {
			reasons[reason] = reasons[reason] || n > 0
		}
	}
	for reason := range pods {
		reasons[reason] = true
	}
	for reason, refused := range reasons {
		if !refused {
			continue
		}
		row := reasonOn(reason, recent[reason], total[reason])
		row.Admission = count(admissions[reason])
		row.addPods(pods[reason], now)
		all = append(all, row)
	}
	slices.SortFunc(all, func(a, b reasonRow) int {
		return cmp.Or(cmp.Compare(b.recent, a.recent), cmp.Compare(len(b.Pods), len(a.Pods)), cmp.Compare(b.total, a.total), cmp.Compare(a.Reason, b.Reason))
	})
	return all
}

// addPods adds the first pods, by message.
func (r *reasonRow) addPods(refused []Refused, now time.Time) {
	seen, rows := map[string]bool{}, map[string]int{}
	for _, e := range refused {
		name := e.Namespace + "/" + e.Pod
		if seen[name] {
			continue
		}
		if seen[name] = true; len(seen) > podsShown {
			r.More++
			continue
		}
		at, known := rows[e.Message]
		if !known {
			at = len(r.Pods)
			rows[e.Message], r.Pods = at, append(r.Pods, refusedRow{Message: e.Message})
		}
		r.Pods[at].Pods = append(r.Pods[at].Pods, name+", "+short(now.Sub(e.Time))+" ago")
	}
}

func podOn(p Pod, now time.Time) podRow {
	r := podRow{
		Name: p.Name, Program: "broker", Version: versionOf(p), Node: cmp.Or(p.Node, "none"), Zone: p.Zone, Restarts: p.Restarts,
		Age: short(now.Sub(p.Started)), Sessions: "–", Answers: "–", Data: "none", Err: p.Err, State: finding.OK, Label: "Ready",
	}
	if p.Webhook {
		r.Program = "webhook"
	}
	switch {
	case !p.Ready:
		r.State, r.Label = finding.Failed, "Not ready"
		if p.State != "Running" {
			r.Label += ": " + p.State
		}
	case p.Err != "":
		r.State, r.Label = finding.Unknown, "No response"
	}
	if p.Metrics == nil {
		return r
	}
	if r.Data = short(now.Sub(p.Read)) + " old"; p.Webhook {
		r.Answers = count(p.Metrics.Of("credence_webhook_reviews_total"))
		return r
	}
	r.Sessions = fmt.Sprintf("%s of %s", count(p.Metrics["credence_broker_sessions_warm"]), count(p.Metrics["credence_broker_sessions_kept"]))
	r.Answers = count(p.Metrics.Of("credence_broker_answers_total"))
	return r
}

// versionOf returns the version that a program reports, or the tag or digest of its image.
func versionOf(p Pod) string {
	for series := range p.Metrics {
		if strings.HasSuffix(series, "}") && strings.Contains(series, "_build_info{") {
			return metrics.Label(series, "version")
		}
	}
	name := p.Image[strings.LastIndexByte(p.Image, '/')+1:]
	if _, version, found := strings.Cut(name, ":"); found {
		return version
	}
	return "unknown"
}

// nearFull is the part of the budget at which an alert fires.
const nearFull = 0.8

func budgetOf(p Pod) budgetRow {
	m := p.Metrics
	r := budgetRow{
		Broker: p.Name, demand: m["credence_broker_fetch_rate_demand"], share: m["credence_broker_fetch_rate_share"], atMost: m["credence_broker_fetch_rate_limit"],
		Queued: count(m.Of("credence_broker_fetches_queued")), InFlight: count(m["credence_broker_fetches_in_flight"]), State: finding.OK, Label: "Enough",
	}
	r.Demand, r.Share, r.Limit = rate(r.demand), rate(r.share), rate(r.atMost)
	if r.share > 0 {
		r.Percent = min(int(math.Ceil(100*r.demand/r.share)), 100)
	}
	switch {
	case r.demand > nearFull*r.share:
		r.State, r.Label = finding.Warning, "Short"
	case r.atMost < r.share:
		r.State, r.Label, r.Throttled = finding.Warning, "Slowed down", true
	}
	return r
}

// These functions write numbers as a reader expects them.

func count(n float64) string { return strconv.FormatFloat(math.Round(n), 'f', -1, 64) }

func counted(n int, one, many string) string {
	if n == 1 {
		return "1 " + one
	}
	return strconv.Itoa(n) + " " + many
}

func rate(n float64) string {
	if n > 0 && n < 0.1 {
		return strconv.FormatFloat(n*60, 'f', 1, 64) + "/min"
	}
	return strconv.FormatFloat(n, 'f', 1, 64) + "/s"
}

func milliseconds(s float64) string {
	if s >= 1 {
		return strconv.FormatFloat(s, 'f', 1, 64) + " s"
	}
	return strconv.FormatFloat(s*1000, 'f', 0, 64) + " ms"
}

func shortSeconds(s float64) string { return short(time.Duration(s * float64(time.Second))) }

// short returns a duration in its two largest units.
func short(d time.Duration) string {
	d = max(d, 0)
	switch {
	case d < time.Minute:
		return fmt.Sprintf("%d s", int(d.Seconds()))
	case d < time.Hour:
		return fmt.Sprintf("%d min", int(d.Minutes()))
	case d < 48*time.Hour:
		if m := int(d.Minutes()) % 60; m > 0 {
			return fmt.Sprintf("%d h %d min", int(d.Hours()), m)
		}
		return fmt.Sprintf("%d h", int(d.Hours()))
	default:
		return fmt.Sprintf("%d days", int(d.Hours())/24)
	}
}

func replicas(d *Deployment) string {
	if d == nil {
		return "unknown"
	}
	return fmt.Sprintf("%d of %d", d.Ready, d.Want)
}

// namesOf returns the first names and how many more there are.
func namesOf(names []string) string {
	const limit = 3
	if len(names) > limit {
		return strings.Join(names[:limit], ", ") + fmt.Sprintf(" and %d more", len(names)-limit)
	}
	return cmp.Or(strings.Join(names, ", "), "none")
}
