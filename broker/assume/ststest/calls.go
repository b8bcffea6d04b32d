package ststest

import (
	"context"
	"fmt"
	"maps"
	"net/url"
	"slices"
	"strconv"
	"sync"
	"time"
)

// maxCalls bounds the call log, for servers that run for days: at about 300
// bytes a call it is 30 MB.
const maxCalls = 100_000

// Call is the record of one call: what was asked, as it was sent, and what came
// of it. It holds no secret, token or signature.
type Call struct {
	Time           time.Time         `json:"time"` // of arrival
	Action         string            `json:"action"`
	RoleARN        string            `json:"role_arn,omitempty"`
	SessionName    string            `json:"session_name,omitempty"`
	ExternalID     string            `json:"external_id,omitempty"`
	SourceIdentity string            `json:"source_identity,omitempty"`
	Duration       time.Duration     `json:"duration_ns,omitempty"` // 0 when none was asked
	Policy         string            `json:"policy,omitempty"`
	PolicyARNs     []string          `json:"policy_arns,omitempty"`
	Tags           map[string]string `json:"tags,omitempty"`
	TransitiveTags []string          `json:"transitive_tags,omitempty"`

	// AccessKeyID is the caller's, as its Authorization header claims it.
	AccessKeyID string `json:"access_key_id,omitempty"`

	// Status is the HTTP status answered; 0 while the call is in progress, and
	// for one that was never answered.
	Status int `json:"status"`

	// Code is the error code answered, "" for success, "Garbled" for an answer that a
	// fault spoilt.
	Code string `json:"code,omitempty"`

	// IssuedAccessKeyID is the id of the keys answered.
	IssuedAccessKeyID string `json:"issued_access_key_id,omitempty"`
}

func newCall(form url.Values, accessKeyID string) Call {
	c := Call{
		Time:           time.Now(),
		Action:         form.Get("Action"),
		RoleARN:        form.Get("RoleArn"),
		SessionName:    form.Get("RoleSessionName"),
		ExternalID:     form.Get("ExternalId"),
		SourceIdentity: form.Get("SourceIdentity"),
		Policy:         form.Get("Policy"),
		PolicyARNs:     members(form, "PolicyArns", ".arn"),
		TransitiveTags: members(form, "TransitiveTagKeys", ""),
		AccessKeyID:    accessKeyID,
	}
	// 32 bits: any number of seconds that fits is also a Duration.
	if seconds, err := strconv.ParseInt(form.Get("DurationSeconds"), 10, 32); err == nil {
		c.Duration = time.Duration(seconds) * time.Second
	}
	if keys := members(form, "Tags", ".Key"); len(keys) > 0 {
		c.Tags = make(map[string]string, len(keys))
		for i, key := range keys {
			c.Tags[key] = form.Get("Tags.member." + strconv.Itoa(i+1) + ".Value")
		}
	}
	return c
}

// clone returns a Call whose collections are its own: whoever is given it may
// change it, and the log's must not change with it.
func (c Call) clone() Call {
	c.PolicyARNs = slices.Clone(c.PolicyARNs)
	c.TransitiveTags = slices.Clone(c.TransitiveTags)
	c.Tags = maps.Clone(c.Tags)
	return c
}

type callKey struct{ action, role string }

// callLog keeps the last calls and counts all of them.
type callLog struct {
	onCall  func(Call)
	telling sync.Mutex // held while onCall runs, so that it runs one at a time

	mu      sync.Mutex
	kept    []*Call
	counts  map[callKey]int
	codes   map[string]int // of answers: how many had this error code; "" is success
	changed chan struct{}  // closed, and replaced, when a call arrives
}

func (l *callLog) init(onCall func(Call)) {
	l.onCall = onCall
	l.counts = make(map[callKey]int)
	l.codes = make(map[string]int)
	l.changed = make(chan struct{})
}

func (l *callLog) begin(c Call) *Call {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.kept) == maxCalls {
		l.kept = slices.Delete(l.kept, 0, maxCalls/10)
	}
	l.kept = append(l.kept, &c)
	l.counts[callKey{c.Action, c.RoleARN}]++
	close(l.changed)
	l.changed = make(chan struct{})
	return &c
}

func (l *callLog) end(c *Call, status int, code, issued string) {
	l.mu.Lock()
	c.Status, c.Code, c.IssuedAccessKeyID = status, code, issued
	if status != 0 {
		l.codes[code]++
	}
	done := c.clone()
	l.mu.Unlock()
	if l.onCall != nil {
		l.telling.Lock()
		defer l.telling.Unlock()
		l.onCall(done)
	}
}

func (l *callLog) calls() []Call {
	l.mu.Lock()
	defer l.mu.Unlock()
	all := make([]Call, len(l.kept))
	for i, c := range l.kept {
		all[i] = c.clone()
	}
	return all
}

func (l *callLog) count(action, role string) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.countLocked(action, role)
}

func (l *callLog) answered(code string) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.codes[code]
}

func (l *callLog) countLocked(action, role string) int {
	var n int
	for key, count := range l.counts {
		if (action == "" || action == key.action) && (role == "" || role == key.role) {
			n += count
		}
	}
	return n
}

func (l *callLog) await(ctx context.Context, action, role string, n int) error {
	for {
		l.mu.Lock()
		have, changed := l.countLocked(action, role), l.changed
		l.mu.Unlock()
		if have >= n {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return fmt.Errorf("awaiting %d calls of %q for role %q, have %d: %w", n, action, role, have, context.Cause(ctx))
		}
	}
}
