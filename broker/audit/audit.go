// Package audit writes one JSON line for each decision of the broker: the pod, the decision, and the access key ID that
// joins the line to AWS CloudTrail.
//
// It guarantees: a line is written, or its loss is counted, or (if audit is required) the decision is refused. While the
// process runs, no line is lost silently; if it is killed, the queued lines are lost. An entry is one line of at most
// 4,096 bytes, whatever its fields contain. An [Entry] has no field for a secret.
//
// Any client that reaches the broker can cause denials as fast as it can call. So repeated denials share one line per
// 10 s, and all other lines are written first.
package audit

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/bits"
	"sync/atomic"
	"time"

	"github.com/credence-iam/credence/broker/credential"
)

// Decision is the result that an entry records.
type Decision string

// The decisions: two about a pod's request, and two of a cluster admin about all sessions of a role.
const (
	Allow Decision = "allow"
	Deny  Decision = "deny"
	Renew Decision = "renew"
	Drop  Decision = "drop"
)

// Entry is one decision. Its line omits empty fields. docs/audit.md describes each field.
type Entry struct {
	Time           time.Time         `json:"time"`
	Decision       Decision          `json:"decision"`
	Reason         credential.Reason `json:"reason,omitempty"`
	Message        string            `json:"message,omitempty"`
	Namespace      string            `json:"namespace,omitempty"`
	Pod            string            `json:"pod,omitempty"`
	PodUID         string            `json:"pod_uid,omitempty"`
	ServiceAccount string            `json:"service_account,omitempty"`
	Role           string            `json:"role,omitempty"`
	SessionName    string            `json:"session_name,omitempty"`
	AccessKeyID    string            `json:"access_key_id,omitempty"`
	Expiration     time.Time         `json:"expiration,omitzero"`
	Peer           string            `json:"peer,omitempty"`
	// Count is how many denials the line stands for. Since is the time of the first of them. Record sets both.
	Count int       `json:"count,omitempty"`
	Since time.Time `json:"since,omitzero"`
}

// buffered is how many entries wait for a slow writer. At 10,000 decisions per second, more than any broker was measured
// at, it bridges 0.8 s. It takes about 4 MB when full, and never more than maxLine for each entry.
const buffered = 8 << 10

// bufferedDenials is how many denials wait. Further ones are counted, and written when the window ends.
const bufferedDenials = 1 << 10

// retryWait is the pause before a failed write of required lines is repeated.
const retryWait = time.Second

// Config configures [New].
type Config struct {
	// Writer receives the lines. Required.
	Writer io.Writer
	// Required makes Record fail if a line would be lost. Default: the loss is counted and logged.
	Required bool
	// Logger receives losses and write errors. Required.
	Logger *slog.Logger
}

// Log records decisions. It writes nothing until Run is called. Its methods are safe for concurrent use.
type Log struct {
	cfg     Config
	entries chan Entry // all but denials
	denied  chan Entry // written when entries is empty
	denials *denials
	lost    atomic.Uint64
	broken  atomic.Bool // the last write failed
}

// New checks cfg and returns a Log.
func New(cfg Config) (*Log, error) {
	if cfg.Writer == nil || cfg.Logger == nil {
		return nil, errors.New("an audit log needs a Writer and a Logger")
	}
	return &Log{cfg: cfg, entries: make(chan Entry, buffered), denied: make(chan Entry, bufferedDenials), denials: newDenials()}, nil
}

// Record queues an entry. It does not block. If audit is required, and the queue is full or the last write failed, it
// returns an error of kind credential.ErrUnavailable, and the decision must not take effect. It returns nil for every
// denial: a denial takes effect anyway. Lines of denials take no space from others.
func (l *Log) Record(e Entry) error {
	if e.Time.IsZero() {
		e.Time = time.Now()
	}
	e.Count, e.Since = 0, time.Time{}
	e.bound()
	if e.Decision == Deny {
		if !l.denials.record(e, l.queueDenial) {
			l.lose(1)
		}
		return nil
	}
	if !l.cfg.Required || !l.broken.Load() {
		select {
		case l.entries <- e:
			return nil
		default:
		}
	}
	l.lose(1)
	if !l.cfg.Required {
		return nil
	}
	return credential.Errorf(credential.ErrUnavailable, credential.ReasonAuditUnavailable,
		"the broker cannot write its audit log, which is required; try again, and report it to a cluster admin if it lasts")
}

// queueDenial queues a denial, and reports whether there was space.
func (l *Log) queueDenial(e Entry) bool {
	select {
	case l.denied <- e:
		return true
	default:
		return false
	}
}

// lose counts lines that will not be written. It logs the number each time that it has doubled: a writer that hangs must
// neither hide its losses nor fill the log with them.
func (l *Log) lose(n int) {
	lost := l.lost.Add(uint64(n))                                           //nolint:gosec // It is never negative.
	if before := lost - uint64(n); bits.Len64(lost) != bits.Len64(before) { //nolint:gosec // It is never negative.
		l.cfg.Logger.Error("Lost audit lines", "lost", lost)
	}
}

// Lost returns how many entries were not written.
func (l *Log) Lost() uint64 { return l.lost.Load() }

// Queued returns how many entries wait to be written, and the maximum. It does not count denials, which lose nothing if
// there are many.
func (l *Log) Queued() (n, capacity int) { return len(l.entries), cap(l.entries) }

// Run writes lines until ctx ends, and then those that are queued or counted. If audit is required, a failed write is
// repeated until it succeeds or ctx ends, and Record refuses meanwhile.
func (l *Log) Run(ctx context.Context) error {
	var (
		b       batch
		repeats []Entry // lines of the last window, written after all others
	)
	window := time.NewTicker(denialWindow)
	defer window.Stop()
	for ctx.Err() == nil {
		select {
		case <-window.C:
			if len(repeats) == 0 { // otherwise the writer is slow, and this window continues
				repeats = l.denials.end()
			}
		default:
		}
		e, ok := l.next(&repeats)
		if ok {
			b.add(e)
		}
		if len(b.text) >= maxBatch || !ok && len(b.text) > 0 {
			l.write(ctx, &b)
			continue
		}
		if ok {
			continue
		}
		select {
		case e := <-l.entries:
			b.add(e)
		case e := <-l.denied:
			b.add(e)
		case <-window.C:
			repeats = l.denials.end()
		case <-ctx.Done():
		}
	}
	for {
		e, ok := l.next(&repeats)
		if !ok {
			if repeats = l.denials.end(); len(repeats) == 0 {
				break
			}
			continue
		}
		b.add(e)
	}
	l.write(ctx, &b)
	return nil
}

// next removes the entry to write next: a denial only if nothing else is queued. ok is false if there is none.
func (l *Log) next(repeats *[]Entry) (e Entry, ok bool) {
	select {
	case e = <-l.entries:
		return e, true
	default:
	}
	select {
	case e = <-l.denied:
		return e, true
	default:
	}
	if len(*repeats) == 0 {
		return Entry{}, false
	}
	e, *repeats = (*repeats)[0], (*repeats)[1:]
	return e, true
}

// write writes the batch, which is empty afterwards.
func (l *Log) write(ctx context.Context, b *batch) {
	for {
		err := b.writeTo(l.cfg.Writer)
		l.broken.Store(err != nil)
		if err == nil {
			return
		}
		l.cfg.Logger.ErrorContext(ctx, "Could not write the audit log", "error", err)
		if l.cfg.Required {
			select {
			case <-time.After(retryWait): //nolint:forbidigo // At most once per second, while nothing else can happen.
				continue
			case <-ctx.Done():
			}
		}
		l.lose(b.drop())
		return
	}
}

// maxBatch is how many bytes are written at a time while more entries are queued: a page of the page cache.
const maxBatch = 4 << 10

// batch holds the lines to write next.
type batch struct {
	text []byte
	open bool // the beginning of a line was written, and text begins with its rest
}

// add appends the entry's line.
func (b *batch) add(e Entry) {
	line, _ := json.Marshal(e) // It cannot fail: strings, and times that bound has checked.
	b.text = append(append(b.text, line...), '\n')
}

// writeTo writes the text and keeps the unwritten rest.
func (b *batch) writeTo(w io.Writer) error {
	if len(b.text) == 0 {
		return nil
	}
	n, err := w.Write(b.text)
	if n == len(b.text) {
		err = nil
	} else if err == nil {
		err = io.ErrShortWrite
	}
	if n > 0 {
		b.open = b.text[n-1] != '\n'
	}
	b.text = b.text[n:]
	if err != nil {
		return fmt.Errorf("writing audit lines: %w", err)
	}
	return nil
}

// drop removes the unwritten text and returns its number of lines.
func (b *batch) drop() int {
	lines := bytes.Count(b.text, []byte{'\n'})
	b.text = nil
	if b.open { // The next line must not continue half a line.
		b.text, b.open = []byte{'\n'}, false
	}
	return lines
}
