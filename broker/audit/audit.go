// Package audit writes one JSON line for each decision of the broker, whatever its outcome: who
// asked, what was decided, and the id of the access key that joins the line to AWS CloudTrail.
//
// Its promise: a line is written, or the loss is counted, or (when audit is required) the decision
// is refused; nothing is lost silently. An [Entry] has no field that could hold a secret.
package audit

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"sync/atomic"
	"time"

	"github.com/credence-iam/credence/broker/credential"
)

// Decision is the outcome that an entry records.
type Decision string

// The decisions.
const (
	Allow Decision = "allow"
	Deny  Decision = "deny"
)

// Entry is one decision. Empty fields are left out of its line.
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
}

// buffered is how many entries wait for a slow writer: at 10,000 decisions a second, over which no
// broker has been driven, it bridges 0.8 s, and it takes about 4 MB when full.
const buffered = 8 << 10

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
	entries chan Entry
	lost    atomic.Uint64
	broken  atomic.Bool // the last write failed
}

// New checks cfg and returns a log that writes nothing until Run is called.
func New(cfg Config) (*Log, error) {
	if cfg.Writer == nil || cfg.Logger == nil {
		return nil, errors.New("an audit log needs a Writer and a Logger")
	}
	return &Log{cfg: cfg, entries: make(chan Entry, buffered)}, nil
}

// Record queues an entry, without waiting. Where audit is required it returns an error of kind
// credential.ErrUnavailable when the entry could not be queued or the writer is failing; the
// decision must then not take effect.
func (l *Log) Record(e Entry) error {
	if e.Time.IsZero() {
		e.Time = time.Now()
	}
	if !l.cfg.Required || !l.broken.Load() {
		select {
		case l.entries <- e:
			return nil
		default:
		}
	}
	l.lost.Add(1)
	if !l.cfg.Required {
		return nil
	}
	return credential.Errorf(credential.ErrUnavailable, credential.ReasonAuditUnavailable,
		"the broker cannot write its audit log, and it is required to")
}

// Lost counts the entries that were not written.
func (l *Log) Lost() uint64 { return l.lost.Load() }

// Run writes lines until ctx ends, and then those that are still queued.
func (l *Log) Run(ctx context.Context) error {
	w := bufio.NewWriter(l.cfg.Writer)
	reported := uint64(0)
	write := func(e Entry) {
		l.write(ctx, w, e)
		if lost := l.Lost(); lost != reported {
			l.cfg.Logger.ErrorContext(ctx, "Audit lines were lost", "lost", lost)
			reported = lost
		}
	}
	for {
		select {
		case e := <-l.entries:
			write(e)
		case <-ctx.Done():
			for {
				select {
				case e := <-l.entries:
					write(e)
				default:
					return nil
				}
			}
		}
	}
}

// write writes one line, and flushes once nothing else waits. A required line is tried until it is
// written or ctx ends; meanwhile Record refuses.
func (l *Log) write(ctx context.Context, w *bufio.Writer, e Entry) {
	for {
		err := l.tryWrite(w, e)
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
		l.lost.Add(1)
		return
	}
}

func (l *Log) tryWrite(w *bufio.Writer, e Entry) error {
	line, err := json.Marshal(e)
	if err == nil {
		_, err = w.Write(append(line, '\n'))
	}
	if err == nil && len(l.entries) == 0 {
		err = w.Flush()
	}
	if err != nil {
		// A bufio.Writer keeps its first error for ever; the file behind it may be well again.
		w.Reset(l.cfg.Writer)
		return fmt.Errorf("writing audit line: %w", err)
	}
	return nil
}
