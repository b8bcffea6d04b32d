package trust

import (
	"cmp"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/credence-iam/credence/certs"
)

// retention is how long a root stays published after the last leaf under it was served. By then, no replica serves the old leaf
// any longer. Until then, an admin can return to the old leaf.
const retention = 24 * time.Hour

// root is a published certificate.
type root struct {
	cert      *x509.Certificate
	published time.Time // when every opted-in namespace had it; zero before
	retired   time.Time // since when neither the file nor the served leaf needs it; zero while one does
}

// record has the published roots by digest. It is immutable: next and stamped return new records.
type record map[string]root

// facts are the inputs of [record.next].
type facts struct {
	now     time.Time
	file    []*x509.Certificate // nil if it cannot be read; then no root is retired
	serving *tls.Certificate
	drop    map[string]bool
}

// change is a change of a root, for the log.
type change struct {
	what string
	id   string
	cert *x509.Certificate
}

// next returns the record for the present facts, and its changes.
func (r record) next(f facts) (record, []change) {
	var changes []change
	candidates := maps.Clone(r)
	if candidates == nil {
		candidates = make(record)
	}
	filed := make(map[string]bool)
	for _, cert := range f.file {
		id := digest(cert)
		filed[id] = true
		if _, known := candidates[id]; !known {
			candidates[id] = root{cert: cert}
		}
	}
	next := make(record)
	for id, c := range candidates {
		_, known := r[id]
		note := func(what string) { changes = append(changes, change{what, id, c.cert}) }
		serves := verifies(f.serving, f.now, c.cert)
		switch {
		case !f.now.Before(c.cert.NotAfter):
			if known {
				note("expired")
			}
			continue
		case f.drop[id] && !serves:
			if known {
				note("dropped")
			}
			continue
		case serves || filed[id]:
			if !known {
				note("new")
			} else if !c.retired.IsZero() {
				note("in use again")
			}
			c.retired = time.Time{}
		case c.retired.IsZero() && f.file != nil:
			c.retired = f.now
			note("retired")
		case !c.retired.IsZero() && f.now.Sub(c.retired) >= retention:
			note("retention ended")
			continue
		}
		next[id] = c
	}
	for len(encode(next.certs())) > maxBundle {
		id, found := next.oldestRetired()
		if !found {
			break // The file alone is within the limit, and the roots of one leaf add little.
		}
		changes = append(changes, change{"dropped, too many roots", id, next[id].cert})
		delete(next, id)
	}
	slices.SortFunc(changes, func(a, b change) int { return cmp.Compare(a.id, b.id) })
	return next, changes
}

func (r record) oldestRetired() (id string, found bool) {
	for _, candidate := range r.ids() {
		if at := r[candidate].retired; !at.IsZero() && (!found || at.Before(r[id].retired)) {
			id, found = candidate, true
		}
	}
	return id, found
}

// stamped returns r with now as the time of publication of its new roots.
func (r record) stamped(now time.Time) record {
	next := maps.Clone(r)
	for id, c := range next {
		if c.published.IsZero() {
			c.published = now
			next[id] = c
		}
	}
	return next
}

// complete reports whether every root has a time of publication.
func (r record) complete() bool {
	for _, c := range r {
		if c.published.IsZero() {
			return false
		}
	}
	return true
}

// ids returns the digests in order, so that equal records have equal texts.
func (r record) ids() []string { return slices.Sorted(maps.Keys(r)) }

func (r record) certs() []*x509.Certificate {
	var all []*x509.Certificate
	for _, id := range r.ids() {
		all = append(all, r[id].cert)
	}
	return all
}

// entry is a root in the JSON of a record. Subject and NotAfter are for users.
type entry struct {
	SHA256    string    `json:"sha256"`
	Subject   string    `json:"subject"`
	NotAfter  time.Time `json:"notAfter"`
	Published time.Time `json:"published,omitzero"`
	Retired   time.Time `json:"retired,omitzero"`
}

type document struct {
	Roots []entry `json:"roots"`
}

// data returns the data of the ConfigMap in the broker's own namespace.
func (r record) data() (map[string]string, error) {
	var d document
	for _, id := range r.ids() {
		c := r[id]
		d.Roots = append(d.Roots, entry{
			SHA256: id, Subject: c.cert.Subject.String(), NotAfter: c.cert.NotAfter.UTC(),
			Published: seconds(c.published), Retired: seconds(c.retired),
		})
	}
	text, err := json.MarshalIndent(d, "", "  ")
	if err != nil {
		return nil, fmt.Errorf("encoding the trust record: %w", err)
	}
	return map[string]string{RootsKey: string(encode(r.certs())), RecordKey: string(text) + "\n"}, nil
}

// seconds rounds up to whole seconds, so that a root never counts as published for longer than it is.
func seconds(t time.Time) time.Time {
	if t.IsZero() {
		return t
	}
	return t.Add(time.Second - 1).Truncate(time.Second).UTC()
}

// parseRecord is the inverse of data. It ignores a root that the record does not name, because another client added it.
func parseRecord(data map[string]string) (record, error) {
	var d document
	if err := json.Unmarshal([]byte(data[RecordKey]), &d); err != nil {
		return nil, fmt.Errorf("parsing %s: %w", RecordKey, err)
	}
	roots, err := certs.ParseRoots([]byte(data[RootsKey]))
	if err != nil {
		return nil, fmt.Errorf("parsing %s: %w", RootsKey, err)
	}
	known := make(map[string]entry)
	for _, e := range d.Roots {
		known[e.SHA256] = e
	}
	r := make(record)
	for _, cert := range roots {
		if e, ok := known[digest(cert)]; ok {
			r[e.SHA256] = root{cert: cert, published: e.Published, retired: e.Retired}
		}
	}
	return r, nil
}
