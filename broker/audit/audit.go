// Package audit writes one JSON line for each decision of the broker, whatever its outcome: who
// asked, what was decided, and the id of the access key that joins the line to AWS CloudTrail.
//
// Its promise: a line is written, or the loss is counted, or (when audit is required) the decision
// is refused; while the process lives nothing is lost silently. What is queued when it is killed is
// lost. An entry is one line of at most [MaxLine] bytes, whatever is
// in its fields. An [Entry] has no field that could hold a secret.
//
// A client that reaches the broker can cause denials as fast as it can call. So denials that repeat share a line for
// each [Window], and all other lines are written first.
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

// Decision is the outcome that an entry records.
type Decision string

// The decisions: two on a pod that asked, and two by an operator on all sessions of a role.
const (
	Allow Decision = "allow"
	Deny  Decision = "deny"
	Renew Decision = "renew"
	Drop  Decision = "drop"
)

// Entry is one decision. Empty fields are left out of its line. docs/audit.md describes each.
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
	// Count is how many denials the line stands for, and Since the time of the first of them. Record sets both.
	Count int       `json:"count,omitempty"`
	Since time.Time `json:"since,omitzero"`
}

// buffered is how many entries wait for a slow writer: at 10,000 decisions a second, over which no
// broker has been driven, it bridges 0.8 s, and it takes about 4 MB when full, and never more than
// MaxLine for each.
const buffered = 8 << 10

// bufferedDenials is how many denials wait. Those that find no room are counted, and written when the [Window] ends.
const bufferedDenials = 1 << 10

// retryWait is the pause before a required line that could not be written is tried again.
const retryWait = time.Second

// Config configures [New].
type Config struct {
	// Writer receives the lines. Required.
	Writer io.Writer
	// Required makes Record fail when a line would be lost. Default: the loss is counted and logged.
	Required bool
	// Logger is told of losses and of write errors. Required.
	Logger *slog.Logger
}

// Log records decisions. Run must be running for lines to be written.
type Log struct {
	cfg     Config
	entries chan Entry // all but denials
	denied  chan Entry // written when entries is empty
	denials *denials
	lost    atomic.Uint64
	broken  atomic.Bool // the last write failed
}

// New checks cfg and returns a log that writes nothing until Run is called.
func New(cfg Config) (*Log, error) {
	if cfg.Writer == nil || cfg.Logger == nil {
		return nil, errors.New("an audit log needs a Writer and a Logger")
	}
	return &Log{cfg: cfg, entries: make(chan Entry, buffered), denied: make(chan Entry, bufferedDenials), denials: newDenials()}, nil
}

// Record queues an entry, without waiting. Where audit is required it returns an error of kind
// credential.ErrUnavailable when the entry could not be queued or the writer is failing; the
// decision must then not take effect. A denial takes effect anyway, so it returns nil for each, and lines of denials take
// no room from others.
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
		"the broker cannot write its audit log, and it is required to")
}

// queueDenial queues a denial, and reports whether there was room.
func (l *Log) queueDenial(e Entry) bool {
	select {
	case l.denied <- e:
		return true
	default:
		return false
	}
}

// lose counts lines that will not be written, and says so each time their number has doubled: a writer
// that hangs must not hide its losses, nor fill the log with them.
func (l *Log) lose(n int) {
	lost := l.lost.Add(uint64(n))                                           //nolint:gosec // Never negative.
	if before := lost - uint64(n); bits.Len64(lost) != bits.Len64(before) { //nolint:gosec // Likewise.
		l.cfg.Logger.Error("Audit lines were lost", "lost", lost)
	}
}

// Lost counts the entries that were not written.
func (l *Log) Lost() uint64 { return l.lost.Load() }

// Queued returns how many entries wait to be written, and how many may; denials, which lose nothing when they are many,
// are not among them.
func (l *Log) Queued() (n, capacity int) { return len(l.entries), cap(l.entries) }

// Run writes lines until ctx ends, and then those that are still queued or counted. A required line is tried
// until it is written or ctx ends; meanwhile Record refuses.
func (l *Log) Run(ctx context.Context) error {
	var (
		b       batch
		repeats []Entry // lines of the last window, which wait for all others
	)
	window := time.NewTicker(Window)
	defer window.Stop()
	for ctx.Err() == nil {
		select {
		case <-window.C:
			if len(repeats) == 0 { // otherwise the writer is behind, and the broker keeps counting in this window
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

// next takes the entry that is to be written next: no denial while anything else is queued. ok is false when none is there.
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

// write writes the batch, and leaves it empty.
func (l *Log) write(ctx context.Context, b *batch) {
	for {
		err := b.writeTo(l.cfg.Writer)
		l.broken.Store(err != nil)
		if err == nil {
			return
		}
		l.cfg.Logger.ErrorContext(ctx, "Writing the audit log failed", "error", err)
		if l.cfg.Required {
			select {
			case <-time.After(retryWait): //nolint:forbidigo // Once a second at most, while nothing else can go on.
				continue
			case <-ctx.Done():
			}
		}
		l.lose(b.drop())
		return
	}
}

// maxBatch is how much is written at once while more is queued: a page of the page cache.
const maxBatch = 4 << 10

// batch is the lines that are to be written next.
type batch struct {
	text []byte
	open bool // the writer has the beginning of a line, and text begins with its rest
}

// add appends the entry's line.
func (b *batch) add(e Entry) {
	line, _ := json.Marshal(e) // Nothing of it can fail: strings, and times that bound has seen to.
	b.text = append(append(b.text, line...), '\n')
}

// writeTo writes the text and keeps what was not written.
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

// drop gives up what was not written, and returns how many lines that were.
func (b *batch) drop() int {
	lines := bytes.Count(b.text, []byte{'\n'})
	b.text = nil
	if b.open { // What comes next must not be glued to half a line.
		b.text, b.open = []byte{'\n'}, false
	}
	return lines
}
