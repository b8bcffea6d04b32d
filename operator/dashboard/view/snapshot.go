// Package view makes the page of the dashboard from snapshots of a cluster. It is a pure function: it has no input or output,
// and no clock.
//
// It guarantees: the order of all rows depends on the snapshots only; a page has a limited number of rows, and says how many
// it leaves out; what it says of a reason is what docs/errors.md says. It does not make HTML, and does not remove
// characters that a text from the cluster may have.
package view

import (
	"slices"
	"strconv"
	"strings"
	"time"
	"unique"

	"github.com/credence-iam/credence/broker/debugapi"
	"github.com/credence-iam/credence/operator/finding"
)

// Limits of one snapshot. Beyond them, the page says how much it leaves out.
const (
	MaxSessions = 20_000 // of all brokers; about 1 kB each
	MaxRefused  = 2_000  // Events
	maxSeries   = 2_000  // of one program; brokers have about 250
)

// Snapshot is the state of Credence at one moment, as far as the user may see it. It has no secret.
type Snapshot struct {
	// Time is when it was complete. Zero: there is none.
	Time time.Time
	// Cluster is the name of the context in the kubeconfig, Namespace that of Credence.
	Cluster, Namespace string
	// Target has the flags that choose the cluster, for the commands of remedies.
	Target finding.Cluster
	// Problems say what could not be read, and which right is needed.
	Problems []string
	// Webhook and Broker are the Deployments. Nil: not known.
	Webhook, Broker *Deployment
	// Pods are those of webhooks and brokers, by name.
	Pods []Pod
	// Sessions are those of all brokers that responded, and SessionsLeftOut how many more there are.
	Sessions        []Session
	SessionsLeftOut int
	// Refused are the Events of the last hour on pods that brokers refused, newest first, and RefusedKnown whether they could be
	// read.
	Refused      []Refused
	RefusedKnown bool
}

// Deployment is the state of a Deployment.
type Deployment struct{ Want, Ready int }

// Pod is the pod of one program.
type Pod struct {
	Name, Node, Zone, Image string
	Webhook                 bool // otherwise it is a broker
	Ready                   bool
	// State is the phase, or why its container does not run.
	State    string
	Restarts int
	Started  time.Time
	// Metrics are its numbers at the time Read. Err is why they could not be read now.
	Metrics Metrics
	Read    time.Time
	Err     string
}

// Session is one grant in one broker at the time Read.
type Session struct {
	debugapi.Grant
	Broker string
	Read   time.Time
}

// Refused is an Event of a broker on a pod.
type Refused struct {
	Namespace, Pod string
	Event          string // reason of the Event
	Reason         string // reason in docs/errors.md; empty without one
	Message        string
	Time           time.Time
}

// Metrics are the values of series, by their name and labels as in the text format of Prometheus.
type Metrics map[string]float64

// metricsPrefix starts the names of our metrics.
const metricsPrefix = "credence_"

// ParseMetrics reads the text format as our programs write it: labels in a fixed order, no timestamps. It skips the metrics
// of libraries.
func ParseMetrics(text []byte) Metrics {
	m := Metrics{}
	for line := range strings.Lines(string(text)) {
		line = strings.TrimRight(line, "\n")
		at := strings.LastIndexByte(line, ' ')
		if at < 0 || !strings.HasPrefix(line, metricsPrefix) || len(m) >= maxSeries {
			continue
		}
		if value, err := strconv.ParseFloat(line[at+1:], 64); err == nil {
			m[unique.Make(line[:at]).Value()] = value // The names are the same in each snapshot.
		}
	}
	return m
}

// label returns the value of one label of a series, "" if it has none.
func label(series, name string) string {
	for _, before := range []string{"{", ","} {
		if _, rest, found := strings.Cut(series, before+name+`="`); found {
			value, _, _ := strings.Cut(rest, `"`)
			return value
		}
	}
	return ""
}

// After returns s with what it lacks from the snapshot before: the last numbers of pods that do not respond now, and all
// sessions if no broker responds. Each keeps the time at which it was read.
func (s Snapshot) After(before Snapshot) Snapshot {
	responded := false
	for n := range s.Pods {
		p := &s.Pods[n]
		responded = responded || p.Err == "" && !p.Webhook
		at := slices.IndexFunc(before.Pods, func(b Pod) bool { return b.Name == p.Name })
		if p.Err != "" && at >= 0 {
			p.Metrics, p.Read = before.Pods[at].Metrics, before.Pods[at].Read
		}
	}
	if !responded {
		s.Sessions, s.SessionsLeftOut = before.Sessions, before.SessionsLeftOut
	}
	return s
}

const (
	// window is the time that recent numbers are about, if the dashboard has run for so long.
	window = 15 * time.Minute
	// step is the time between two samples of a history.
	step = time.Minute
)

// sample has the metrics of all pods at one moment, by name.
type sample struct {
	at   time.Time
	pods map[string]Metrics
}

// History has the samples of the last [window], oldest first.
type History []sample

// With returns a history that also has s.
func (h History) With(s Snapshot) History {
	if len(h) > 0 && s.Time.Sub(h[len(h)-1].at) < step {
		return h
	}
	pods := map[string]Metrics{}
	for _, p := range s.Pods {
		if p.Err == "" && p.Metrics != nil {
			pods[p.Name] = p.Metrics
		}
	}
	h = slices.DeleteFunc(slices.Clone(h), func(old sample) bool { return s.Time.Sub(old.at) > window })
	return append(h, sample{s.Time, pods})
}

// numbers are the metrics of several pods, added up.
type numbers struct {
	total  Metrics       // since each program started
	recent Metrics       // of counters: since over
	over   time.Duration // zero: there is no earlier sample
}

// sum adds up the metrics of the pods that match.
func sum(s Snapshot, h History, match func(Pod) bool) numbers {
	n := numbers{total: Metrics{}, recent: Metrics{}}
	for _, p := range s.Pods {
		if !match(p) {
			continue
		}
		var base Metrics
		at := slices.IndexFunc(h, func(old sample) bool { return old.pods[p.Name] != nil && old.at.Before(p.Read) })
		if at >= 0 {
			base, n.over = h[at].pods[p.Name], max(n.over, p.Read.Sub(h[at].at))
		}
		for series, value := range p.Metrics {
			n.total[series] += value
			switch old, known := base[series]; {
			case base == nil:
			case value < old: // It has restarted.
				n.recent[series] += value
			case known:
				n.recent[series] += value - old
			default:
				n.recent[series] += value
			}
		}
	}
	return n
}

// of adds up the series of one metric that have all of these labels, as name="value".
func (m Metrics) of(metric string, labels ...string) (total float64) {
	for series, value := range m {
		name, rest, _ := strings.Cut(series, "{")
		if name == metric && !slices.ContainsFunc(labels, func(l string) bool { return !strings.Contains(rest, l) }) {
			total += value
		}
	}
	return total
}

// by adds up the series of one metric by the value of a label.
func (m Metrics) by(metric, name string, labels ...string) map[string]float64 {
	all := map[string]float64{}
	for series, value := range m {
		if found, rest, _ := strings.Cut(series, "{"); found == metric && !slices.ContainsFunc(labels, func(l string) bool { return !strings.Contains(rest, l) }) {
			all[label(series, name)] += value
		}
	}
	return all
}

// took returns a quantile of the durations of STS calls in seconds, as histogram_quantile of Prometheus does: within a
// bucket, values are assumed to be spread evenly. It returns false without calls.
func (m Metrics) took(q float64, action string) (float64, bool) {
	type bucket struct{ end, count float64 }
	var all []bucket
	for text, count := range m.by(stsTook+"_bucket", "le", action) {
		if end, err := strconv.ParseFloat(text, 64); err == nil {
			all = append(all, bucket{end, count})
		}
	}
	slices.SortFunc(all, func(a, b bucket) int {
		if a.end < b.end {
			return -1
		}
		return 1
	})
	if len(all) < 2 || all[len(all)-1].count == 0 {
		return 0, false
	}
	want, begin, below := q*all[len(all)-1].count, 0.0, 0.0
	for n, b := range all {
		if b.count >= want {
			if n == len(all)-1 { // Its end is infinite.
				return begin, true
			}
			return begin + (b.end-begin)*(want-below)/max(b.count-below, 1e-9), true
		}
		begin, below = b.end, b.count
	}
	return begin, true
}
