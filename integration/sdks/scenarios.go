//go:build unix

package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/credence-iam/credence/broker/assume/ststest"
	"github.com/credence-iam/credence/integration/stack"
)

const (
	// manySessions is how many sessions a client creates in a row; a slow one creates fewSessions.
	manySessions, fewSessions = 50, 5
	// margin is added to a session duration: expirations are whole seconds, and one clock compares them.
	margin = 2 * time.Second
	// recovery is how long a client may fail after the broker has returned: the sidecar retries within 5 s.
	recovery = 30 * time.Second
	// slowness is the time from a client's first request to its first credentials. It is well over a second, after
	// which many clients give up a request, and over 0.9 s, the longest wait of a request in a sidecar.
	slowness = 1500 * time.Millisecond
	// justBefore the expiration a client makes its last call without a broker.
	justBefore = 3 * time.Second
	// pause is the time between repeated calls, and longPause that for renewals, during which all clients run.
	pause, longPause = time.Second, 5 * time.Second
	// atOnce limits how many clients start at a time.
	atOnce = 4
)

// run runs all scenarios. Its error means that one could not be set up; rows hold the results.
func (l *lab) run(ctx context.Context) error {
	if err := l.stack.Namespace(ctx, namespace, map[string]string{"iam.amazonaws.com/permitted": ".*"}); err != nil {
		return err
	}
	var end time.Time // of the first sessions
	for _, step := range []struct {
		text string
		do   func(context.Context) error
	}{
		{"starting a pod and a script for each client and path", l.all(atOnce, l.startLife)},
		{"first credentials", l.all(-1, l.first)},
		{"many new sessions", func(ctx context.Context) error {
			end = time.Now().Add(sessionDuration + margin)
			return l.each(ctx, -1, l.sessions)
		}},
		{"renewal; meanwhile a refused role, a wrong token, the region, and a slow start", func(ctx context.Context) error {
			group, ctx := errgroup.WithContext(ctx)
			group.Go(func() error { return l.each(ctx, -1, l.renewal(end)) })
			group.Go(func() error { return l.others(ctx) })
			return group.Wait()
		}},
		{"the broker is stopped; calls until just before the sessions expire", func(ctx context.Context) error {
			if err := l.each(ctx, -1, l.restartExpired); err != nil {
				return err
			}
			l.stack.Broker.ShutDown()
			l.brokerStopped = time.Now()
			return l.each(ctx, -1, l.away)
		}},
		{"all sessions expire; a call each", func(ctx context.Context) error {
			if err := sleep(ctx, time.Until(l.brokerStopped.Add(sessionDuration+margin))); err != nil {
				return err
			}
			return l.each(ctx, -1, l.longer)
		}},
		{fmt.Sprintf("the broker is started; each client has %v to recover", recovery), func(ctx context.Context) error {
			if err := l.stack.StartBroker(ctx); err != nil {
				return err
			}
			l.brokerAbsence = time.Since(l.brokerStopped)
			return l.each(ctx, -1, l.back)
		}},
	} {
		l.report("%s", step.text)
		if err := step.do(ctx); err != nil {
			return err
		}
	}
	return nil
}

func (l *lab) all(limit int, do func(context.Context, *row) error) func(context.Context) error {
	return func(ctx context.Context) error { return l.each(ctx, limit, do) }
}

// result is how a call, or a scenario, ended.
type result struct {
	outcome    outcome
	text, code string // the error as the client shows it, or a reason for the outcome fails
	key        string
}

// classify classifies a call. It must succeed as role, or, if there is a refusal, fail.
func classify(a output, err error, role string, refused *refusal) result {
	got := result{text: a.Error, code: a.Code, key: a.Key}
	switch {
	case errors.Is(err, errTimeout):
		got.outcome, got.text = hangs, err.Error()
	case err != nil:
		got.outcome, got.text = fails, err.Error()
	case a.Error == "" && a.ARN != assumed(role):
		got.outcome, got.text = fails, "STS knows the caller as "+a.ARN
	case a.Error == "" && refused != nil:
		got.outcome, got.text = fails, "the call succeeded, despite "+refused.Code
	case a.Error == "":
		got.outcome = works
	case strings.Contains(a.Error+a.Code, "ExpiredToken"):
		got.outcome = expired
	case refused == nil:
		got.outcome = fails
	case strings.Contains(a.Error+"\n"+a.Code, refused.Code), strings.Contains(a.Error, refused.Message):
		got.outcome = reason
	default:
		got.outcome = noReason
	}
	return got
}

// classifyRegion classifies a look-up of the region.
func classifyRegion(a output, err error) result {
	got := result{text: a.Error, code: a.Code}
	switch {
	case errors.Is(err, errTimeout):
		got.outcome, got.text = hangs, err.Error()
	case err != nil:
		got.outcome, got.text = fails, err.Error()
	case a.Error == "unsupported":
		got.outcome = none
	case a.Error != "":
		got.outcome = notFound
	case a.Region != stack.Region:
		got.outcome, got.text = fails, "it found "+a.Region
	default:
		got.outcome = works
	}
	return got
}

// try makes a call that must succeed as role.
func (s *script) try(ctx context.Context, command, role string) result {
	a, err := s.call(ctx, command)
	return classify(a, err, role, nil)
}

func (l *lab) startLife(ctx context.Context, r *row) (err error) {
	if r.pod, err = l.newPod(ctx, r.name(), lifeRole, r.path, renewEvery); err != nil {
		return err
	}
	r.script, err = l.start(ctx, r, r.pod.on(r.path), r.name())
	return err
}

// restart replaces r's script by a new one.
func (l *lab) restart(ctx context.Context, r *row) (err error) {
	r.script.stop()
	r.script = nil
	r.script, err = l.start(ctx, r, r.pod.on(r.path), r.name())
	return err
}

func (l *lab) first(ctx context.Context, r *row) error {
	if r.sdk.unusable != "" {
		r.over = true
		return l.unusable(ctx, r)
	}
	got := r.script.try(ctx, "call", lifeRole)
	r.firstKey = got.key
	return r.set(first, got)
}

// unusable checks that a client cannot use a path: its call fails with the known error, and it opens no connection to
// the sidecar.
func (l *lab) unusable(ctx context.Context, r *row) error {
	d, err := newDoor(ctx, r.pod.on(r.path))
	if err != nil {
		return err
	}
	defer d.close()
	s, err := l.start(ctx, r, d.env, "unusable-"+r.name())
	if err != nil {
		return err
	}
	defer s.stop()
	got := s.try(ctx, "call", lifeRole)
	select {
	case <-d.first:
		got.text = "the client connected to the sidecar: " + got.text
	default:
		if got.outcome == fails && strings.Contains(got.text, r.sdk.unusable) {
			got.outcome = cannot
		}
	}
	return r.set(first, got)
}

func (l *lab) sessions(ctx context.Context, r *row) error {
	count := manySessions
	if r.sdk.slow {
		count = fewSessions
	}
	got := result{outcome: works}
	for range count {
		if got = r.script.try(ctx, "fresh", lifeRole); got.outcome != works {
			break
		}
	}
	return r.set(sessions, got)
}

// renewal makes calls until end, when the first session has expired.
func (l *lab) renewal(end time.Time) func(context.Context, *row) error {
	return func(ctx context.Context, r *row) error {
		for last := false; ; last = !time.Now().Before(end) {
			got := r.script.try(ctx, "call", lifeRole)
			if got.outcome == expired { // the client can sign a call in the last millisecond of a session, but only one
				got = r.script.try(ctx, "call", lifeRole)
			}
			if last && got.outcome == works && got.key != "" && got.key == r.firstKey {
				got.outcome, got.text = fails, "the key is still the first one"
			}
			if last || got.outcome != works {
				return r.set(renewal, got)
			}
			if err := sleep(ctx, min(longPause, time.Until(end))); err != nil {
				return err
			}
		}
	}
}

// restartExpired restarts a client that keeps expired credentials, so that the next scenarios do not show that again.
func (l *lab) restartExpired(ctx context.Context, r *row) error {
	if r.results[renewal].outcome != expired {
		return nil
	}
	if err := l.restart(ctx, r); err != nil {
		return err
	}
	r.script.try(ctx, "call", lifeRole)
	return nil
}

// away makes calls every few seconds, the last one just before the expiration that the sidecar states. A call during
// which the credentials expire does not count.
func (l *lab) away(ctx context.Context, r *row) error {
	refused, end, err := requestCredentials(ctx, r.pod.env)
	if err == nil && refused != nil {
		err = fmt.Errorf("right after the broker stopped, the sidecar refuses with %s", refused.Code)
	}
	if err != nil {
		return err
	}
	for count, last := 0, false; ; count++ {
		got := r.script.try(ctx, "call", lifeRole)
		if got.outcome == works {
			got = r.script.try(ctx, "fresh", lifeRole)
		}
		if got.outcome == fails || got.outcome == expired {
			if overtaken := r.script.err == nil && !time.Now().Before(end); overtaken && count > 0 {
				got = result{outcome: works}
				last = true
			} else if overtaken {
				got.outcome, got.text = fails, "the first calls took longer than the session: "+got.text
			}
		}
		if got.outcome != works || last {
			return r.set(away, got)
		}
		wait := longPause
		if left := time.Until(end.Add(-justBefore)); left <= wait {
			wait, last = left, true
		}
		if err := sleep(ctx, wait); err != nil {
			return err
		}
	}
}

func (l *lab) longer(ctx context.Context, r *row) error {
	refused, err := wantRefusal(ctx, r.pod.env, "BROKER_UNREACHABLE")
	if err != nil {
		return err
	}
	a, err := r.script.call(ctx, "call")
	return r.set(longer, classify(a, err, lifeRole, refused))
}

// back waits for the client to recover by itself, and otherwise tries a new session.
func (l *lab) back(ctx context.Context, r *row) error {
	for end := time.Now().Add(recovery); ; {
		got := r.script.try(ctx, "call", lifeRole)
		if got.outcome == hangs {
			if err := l.restart(ctx, r); err != nil {
				return err
			}
			break
		}
		if got.outcome == works || r.script.err != nil {
			return r.set(back, got)
		}
		if time.Now().After(end) {
			break
		}
		if err := sleep(ctx, pause); err != nil {
			return err
		}
	}
	got := r.script.try(ctx, "fresh", lifeRole)
	if got.outcome == works {
		got.outcome = newSession
	}
	return r.set(back, got)
}

// others runs the scenarios that need no renewal.
func (l *lab) others(ctx context.Context) error {
	if err := l.refusals(ctx); err != nil {
		return err
	}
	if err := l.each(ctx, atOnce, l.wrongToken); err != nil {
		return err
	}
	if err := l.each(ctx, atOnce, l.region); err != nil {
		return err
	}
	return l.each(ctx, 2, l.slowStart)
}

// once makes one call with a script of its own.
func (l *lab) once(ctx context.Context, r *row, scenario string, env []string, command string, classify func(output, error) result) error {
	s, err := l.start(ctx, r, env, strings.ReplaceAll(scenario, " ", "-")+"-"+r.name())
	if err != nil {
		return err
	}
	defer s.stop()
	return r.set(scenario, classify(s.call(ctx, command)))
}

// refusals gives each client a role that STS refuses. The clients share a pod for each version of instance metadata.
func (l *lab) refusals(ctx context.Context) error {
	l.stack.STS.SetRole(arn(refusedRole), ststest.Behavior{Deny: true})
	pods := make(map[string]*pod)
	for _, path := range []string{metadataV2, metadataV1} {
		p, err := l.newPod(ctx, "refused-"+path, refusedRole, path, refusedEvery)
		if err != nil {
			return err
		}
		defer l.stop(p)
		pods[path] = p
	}
	pods[container] = pods[metadataV2]
	return l.each(ctx, atOnce, func(ctx context.Context, r *row) error {
		p := pods[r.path]
		response, err := wantRefusal(ctx, p.env, "STS_ACCESS_DENIED")
		if err != nil {
			return err
		}
		return l.once(ctx, r, refused, p.on(r.path), "call", func(a output, err error) result {
			return classify(a, err, refusedRole, response)
		})
	})
}

// wrongToken gives a client a token that is not the pod's. The client can use instance metadata, as in a pod: it
// matters whether it does.
func (l *lab) wrongToken(ctx context.Context, r *row) error {
	if r.path != container {
		return nil
	}
	env := append(without(r.pod.env, authorizationVariable), authorizationVariable+"=not-the-token-of-this-pod")
	response, err := wantRefusal(ctx, env, "AUTHORIZATION_INVALID")
	if err != nil {
		return err
	}
	return l.once(ctx, r, token, env, "call", func(a output, err error) result {
		got := classify(a, err, lifeRole, response)
		if err == nil && a.Error == "" && a.ARN == assumed(lifeRole) {
			got = result{outcome: byMetadata}
		}
		return got
	})
}

func (l *lab) region(ctx context.Context, r *row) error {
	env := without(r.pod.on(r.path), "AWS_REGION", "AWS_DEFAULT_REGION", noMetadataVariable)
	return l.once(ctx, r, region, env, "region", classifyRegion)
}

// slowStart starts a client whose first credentials arrive slowness after its first request.
func (l *lab) slowStart(ctx context.Context, r *row) error {
	role := "slow-" + r.name()
	gate := make(chan struct{})
	open := sync.OnceFunc(func() { close(gate) })
	defer open()
	l.stack.STS.SetRole(arn(role), ststest.Behavior{Hold: gate})
	p, err := l.newPod(ctx, role, role, r.path, heldEvery)
	if err != nil {
		return err
	}
	defer l.stop(p)
	d, err := newDoor(ctx, p.on(r.path))
	if err != nil {
		return err
	}
	defer d.close()
	s, err := l.start(ctx, r, d.env, role)
	if err != nil {
		return err
	}
	defer s.stop()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() {
		defer open()
		select {
		case <-d.first:
			_ = sleep(ctx, slowness)
		case <-ctx.Done():
		}
	}()
	got := s.try(ctx, "call", role)
	for range 5 {
		if got.outcome == works || s.err != nil {
			return r.set(slow, got)
		}
		if err := sleep(ctx, pause); err != nil {
			return err
		}
		if s.try(ctx, "call", role).outcome == works {
			return r.set(slow, result{outcome: nextCall})
		}
	}
	if s.try(ctx, "fresh", role).outcome == works {
		got = result{outcome: newSession}
	}
	return r.set(slow, got)
}
