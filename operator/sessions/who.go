package sessions

import (
	"cmp"
	"net"
	"slices"
	"strings"
	"time"

	"github.com/credence-iam/credence/broker/audit"
)

// Key is one access key ID and what is known of it.
type Key struct {
	AccessKeyID string    `json:"access_key_id"`
	Role        string    `json:"role,omitempty"`
	SessionName string    `json:"session_name,omitempty"`
	Expiration  time.Time `json:"expiration,omitzero"`
	// Pods had the key, by the time at which they got it first.
	Pods []Holder `json:"pods"`
	// Events were signed with the key, or issued it, by time.
	Events []Event `json:"events,omitempty"`
}

// Holder is a pod that had a key.
type Holder struct {
	Namespace string `json:"namespace"`
	Pod       string `json:"pod"`
	PodUID    string `json:"pod_uid,omitempty"`
	// First and Last are when brokers gave the key to the pod; zero if only a grant shows that the pod uses it.
	First time.Time `json:"first,omitzero"`
	Last  time.Time `json:"last,omitzero"`
	Times int       `json:"times,omitempty"`
	// Peers are the addresses that the pod called from.
	Peers []string `json:"peers,omitempty"`
	// Sources are where this is from, such as a broker or a file.
	Sources []string `json:"sources"`
}

// Event is one event of CloudTrail.
type Event struct {
	Time      time.Time `json:"time"`
	Name      string    `json:"name"`
	Source    string    `json:"source"`
	Region    string    `json:"region,omitempty"`
	Address   string    `json:"source_address,omitempty"`
	UserAgent string    `json:"user_agent,omitempty"`
	ErrorCode string    `json:"error_code,omitempty"`
	ID        string    `json:"event_id,omitempty"`
	// Issued is set if the event issued the key. Otherwise it was signed with the key.
	Issued bool `json:"issued,omitempty"`
	// Pods had the key at that time, as namespace/name. If one of them called the broker from the event's address, it is
	// the only one.
	Pods []string `json:"pods,omitempty"`

	key string // access key ID
}

// Line is a line of an audit log and its source.
type Line struct {
	audit.Entry
	Source string
}

// Sources are what is known of access keys.
type Sources struct {
	Lines  []Line
	Events []Event
	// Brokers show which pods use a key now.
	Brokers Snapshot
	// Problems are why a source could not be read to its end.
	Problems []Problem
}

// Problem is why a source could not be read to its end.
type Problem struct {
	Source string `json:"source"`
	Error  string `json:"error"`
	// Right is what the user lacks, if that is why.
	Right string `json:"missing_right,omitempty"`
}

// clockSkew is how much the clocks of a broker and AWS can differ. AWS refuses a broker whose clock differs by more.
const clockSkew = 5 * time.Minute

// Keys joins the sources: it returns the key with that ID or, if id is empty, all keys of the events. Events are limited
// to those keys.
func (s Sources) Keys(id string) []Key {
	keys := map[string]*Key{}
	if id != "" {
		keys[id] = &Key{AccessKeyID: id}
	}
	for _, e := range s.Events {
		if id == "" && e.key != "" && keys[e.key] == nil {
			keys[e.key] = &Key{AccessKeyID: e.key}
		}
	}
	for _, line := range s.Lines {
		if k := keys[line.AccessKeyID]; k != nil && line.Decision == audit.Allow {
			k.add(line)
		}
	}
	for _, b := range s.Brokers.Brokers {
		for _, g := range b.Page.Grants {
			k := keys[g.AccessKeyID]
			if k == nil || g.AccessKeyID == "" {
				continue
			}
			k.Role, k.SessionName = cmp.Or(k.Role, g.Role), cmp.Or(k.SessionName, g.SessionName)
			if g.Expiration != nil && k.Expiration.IsZero() {
				k.Expiration = *g.Expiration
			}
			for _, name := range g.PodNames {
				namespace, pod, _ := strings.Cut(name, "/")
				k.holder(Holder{Namespace: namespace, Pod: pod}, "broker "+b.Name+" now")
			}
		}
	}
	for _, e := range s.Events {
		if k := keys[e.key]; k != nil {
			k.Events = append(k.Events, e)
		}
	}
	all := make([]Key, 0, len(keys))
	for _, k := range keys {
		k.finish()
		all = append(all, *k)
	}
	slices.SortFunc(all, func(a, b Key) int {
		return cmp.Or(a.firstEvent().Compare(b.firstEvent()), cmp.Compare(a.AccessKeyID, b.AccessKeyID))
	})
	return all
}

// add adds a line that gave the key to a pod.
func (k *Key) add(line Line) {
	k.Role, k.SessionName = cmp.Or(k.Role, line.Role), cmp.Or(k.SessionName, line.SessionName)
	if line.Expiration.After(k.Expiration) {
		k.Expiration = line.Expiration
	}
	h := k.holder(Holder{Namespace: line.Namespace, Pod: line.Pod, PodUID: line.PodUID}, line.Source)
	h.Times++
	if h.First.IsZero() || line.Time.Before(h.First) {
		h.First = line.Time
	}
	if line.Time.After(h.Last) {
		h.Last = line.Time
	}
	if host := hostOf(line.Peer); host != "" && !slices.Contains(h.Peers, host) {
		h.Peers = append(h.Peers, host)
	}
}

// holder returns the holder of that pod, and adds it and the source as needed. A pod without a UID is the newest of its
// name.
func (k *Key) holder(pod Holder, source string) *Holder {
	at := -1
	for n, h := range k.Pods {
		if h.Namespace == pod.Namespace && h.Pod == pod.Pod && (h.PodUID == pod.PodUID || pod.PodUID == "") {
			at = n
		}
	}
	if at < 0 {
		at = len(k.Pods)
		k.Pods = append(k.Pods, pod)
	}
	h := &k.Pods[at]
	if !slices.Contains(h.Sources, source) {
		h.Sources = append(h.Sources, source)
	}
	return h
}

// finish sorts the key's parts and joins the events with the pods.
func (k *Key) finish() {
	if k.Pods == nil {
		k.Pods = []Holder{}
	}
	slices.SortFunc(k.Pods, func(a, b Holder) int {
		return cmp.Or(a.First.Compare(b.First), cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Pod, b.Pod), cmp.Compare(a.PodUID, b.PodUID))
	})
	for n := range k.Pods {
		slices.Sort(k.Pods[n].Peers)
		slices.Sort(k.Pods[n].Sources)
	}
	slices.SortStableFunc(k.Events, func(a, b Event) int { return cmp.Or(a.Time.Compare(b.Time), cmp.Compare(a.ID, b.ID)) })
	for n := range k.Events {
		if e := &k.Events[n]; !e.Issued {
			e.Pods = k.holdersAt(*e)
		}
	}
}

// holdersAt returns the pods that had the key at the time of the event.
func (k *Key) holdersAt(e Event) []string {
	var all, near []string
	for _, h := range k.Pods {
		if !h.First.IsZero() && e.Time.Before(h.First.Add(-clockSkew)) || !k.Expiration.IsZero() && e.Time.After(k.Expiration.Add(clockSkew)) {
			continue
		}
		name := h.Namespace + "/" + h.Pod
		if slices.Contains(all, name) {
			continue
		}
		all = append(all, name)
		if e.Address != "" && slices.Contains(h.Peers, e.Address) {
			near = append(near, name)
		}
	}
	if len(near) == 1 {
		return near
	}
	return all
}

func (k *Key) firstEvent() time.Time {
	if len(k.Events) == 0 {
		return time.Time{}
	}
	return k.Events[0].Time
}

// hostOf returns the address without its port.
func hostOf(peer string) string {
	if host, _, err := net.SplitHostPort(peer); err == nil {
		return host
	}
	return peer
}
