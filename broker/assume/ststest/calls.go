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

// maxCalls bounds the call log of servers that run for days. With about 300 bytes per call, it has at most 30 MB.
const maxCalls = 100_000

// Call records one call: the request and its outcome. It has no secret, token or signature.
type Call struct {
	Time           time.Time         `json:"time"` // of arrival
	Action         string            `json:"action"`
	RoleARN        string            `json:"role_arn,omitempty"`
	SessionName    string            `json:"session_name,omitempty"`
	ExternalID     string            `json:"external_id,omitempty"`
	SourceIdentity string            `json:"source_identity,omitempty"`
	Duration       time.Duration     `json:"duration_ns,omitempty"` // 0 if not in the request
	Policy         string            `json:"policy,omitempty"`
	PolicyARNs     []string          `json:"policy_arns,omitempty"`
	Tags           map[string]string `json:"tags,omitempty"`
	TransitiveTags []string          `json:"transitive_tags,omitempty"`

	// AccessKeyID is the caller's, as its Authorization header claims it.
	AccessKeyID string `json:"access_key_id,omitempty"`

	// Status is the HTTP status of the response. It is 0 while the call is in progress, and for a call without a response.
	Status int `json:"status"`

	// Code is the error code of the response: "" for success, "Garbled" for a response that a fault changed.
	Code string `json:"code,omitempty"`

	// IssuedAccessKeyID is the ID of the keys in the response.
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
	// Any number of seconds with 32 bits fits a Duration.
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

// clone returns a Call with collections of its own, so that its receiver cannot change the log.
func (c Call) clone() Call {
	c.PolicyARNs = slices.Clone(c.PolicyARNs)
	c.TransitiveTags = slices.Clone(c.TransitiveTags)
	c.Tags = maps.Clone(c.Tags)
	return c
}

type callKey struct{ action, role string }

// callLog stores the last calls and counts all calls.
type callLog struct {
	onCall func(Call)
	callMu sync.Mutex // serializes onCall

	mu      sync.Mutex
	kept    []*Call
	counts  map[callKey]int
	codes   map[string]int // number of responses by error code; "" is success
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
		l.callMu.Lock()
		defer l.callMu.Unlock()
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
