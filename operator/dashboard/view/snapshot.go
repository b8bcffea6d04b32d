// Package view makes the page of the dashboard from snapshots of a cluster. It is a pure function: it has no input or output,
// and no clock.
//
// It guarantees: the order of all rows depends on the snapshots only; a page has a limited number of rows, and says how many
// it leaves out; what it says of a reason is what docs/errors.md says. It does not make HTML, and does not remove
// characters that a text from the cluster may have.
package view

import (
	"slices"
	"time"

	"github.com/credence-iam/credence/broker/debugapi"
	"github.com/credence-iam/credence/operator/finding"
	"github.com/credence-iam/credence/operator/metrics"
)

// Limits of one snapshot. Beyond them, the page says how much it leaves out.
const (
	MaxSessions = 20_000 // of all brokers; about 1 kB each
	MaxRefused  = 2_000  // Events
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
	Metrics metrics.Values
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
	pods map[string]metrics.Values
}

// History has the samples of the last [window], oldest first.
type History []sample

// With returns a history that also has s.
func (h History) With(s Snapshot) History {
	if len(h) > 0 && s.Time.Sub(h[len(h)-1].at) < step {
		return h
	}
	pods := map[string]metrics.Values{}
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
	total  metrics.Values // since each program started
	recent metrics.Values // of counters: since over
	over   time.Duration  // zero: there is no earlier sample
}

// sum adds up the metrics of the pods that match.
func sum(s Snapshot, h History, match func(Pod) bool) numbers {
	n := numbers{total: metrics.Values{}, recent: metrics.Values{}}
	for _, p := range s.Pods {
		if !match(p) {
			continue
		}
		var base metrics.Values
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
