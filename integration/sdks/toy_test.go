//go:build unix

package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/credence-iam/credence/broker/assume/ststest"
	"github.com/credence-iam/credence/integration/stack"
)

// toy is a world in memory: of sidecars, one broker and STS it has what scenarios rest on, and of clients doubles, which
// speak the protocol of drivers through pipes.
type toy struct {
	life    time.Duration
	doubles map[string]double // by the first word of a command
	deaf    bool              // the broker does not stop

	mu    sync.Mutex
	up    bool
	back  bool // it was away
	roles map[string]ststest.Behavior
	pods  map[string]*toyPod
	doors map[string]func() // by name, what is done when somebody comes
	sts   map[string]int
	last  time.Time // of a session of lifeRole
	keys  int
}

type toyPod struct {
	role     string
	calls    int // to the broker
	key      string
	got, end time.Time
}

// double is a client.
type double struct {
	hello string // its first line; empty: a good one
	// answer is what it answers to a command; nil: what a good client does.
	answer func(*toyDouble, string) any
}

// toyDouble is a double that runs.
type toyDouble struct {
	*toy
	env   []string
	calls int // so far, with the one that is answered
	key   string
	end   time.Time

	dead     bool // for doubles to remember
	recovers time.Time
}

func newToy(doubles map[string]double) *toy {
	return &toy{
		life: defaultLife, doubles: doubles, up: true, roles: make(map[string]ststest.Behavior), pods: make(map[string]*toyPod),
		doors: make(map[string]func()), sts: make(map[string]int),
	}
}

func (w *toy) behave(role string, b ststest.Behavior) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.roles[role] = b
}

func (w *toy) pod(_ context.Context, name, role string, _ Path) (*pod, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.pods[name] = &toyPod{role: role, calls: 1}
	if w.roles[role].Deny || w.roles[role].Hold != nil {
		w.sts[role]++
	} else {
		w.renew(w.pods[name])
		w.pods[name].calls = 1
	}
	return &pod{
		env: []string{
			fullURIVariable + "=http://" + name, authorizationVariable + "=right", metadataVariable + "=http://" + name,
			"POD=" + name, "AWS_REGION=" + stack.Region,
		},
		stop: func() {},
	}, nil
}

// renew gives a pod a new session.
func (w *toy) renew(p *toyPod) {
	now := time.Now()
	w.keys++
	p.calls++
	p.key, p.got, p.end = fmt.Sprintf("ASIA%d", w.keys), now, now.Add(w.life)
	if now.Sub(w.last) >= w.life*2/5 {
		w.sts[p.role]++
		w.last = now
	}
}

// get is what a sidecar does that is asked.
func (w *toy) get(env []string, authorization string) (key string, end time.Time, _ *refusal) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if come := w.doors[value(env, "DOOR")]; come != nil {
		come()
	}
	if value(env, fullURIVariable) != "" && authorization != "right" {
		return "", end, &refusal{http.StatusForbidden, "AUTHORIZATION_INVALID", "it is wrong"}
	}
	p := w.pods[value(env, "POD")]
	if w.roles[p.role].Deny {
		return "", end, &refusal{http.StatusForbidden, "STS_ACCESS_DENIED", "AWS refuses it"}
	}
	if gate := w.roles[p.role].Hold; gate != nil {
		w.mu.Unlock()
		timer := time.NewTimer(900 * time.Millisecond)
		select {
		case <-gate:
		case <-timer.C:
		}
		w.mu.Lock()
		select {
		case <-gate:
			return "ASIAX", time.Now().Add(w.life), nil
		default:
			return "", end, &refusal{http.StatusServiceUnavailable, "NOT_YET", "wait"}
		}
	}
	if w.up && time.Since(p.got) >= w.life/2 {
		w.renew(p)
	}
	if !time.Now().Before(p.end) {
		return "", end, &refusal{http.StatusServiceUnavailable, "BROKER_UNREACHABLE", "it is away"}
	}
	return p.key, p.end, nil
}

func (w *toy) ask(_ context.Context, env []string, _, wrong string) (*refusal, time.Time, error) {
	authorization := value(env, authorizationVariable)
	if wrong != "" {
		authorization = wrong
	}
	_, end, refusal := w.get(without(env, "DOOR"), authorization)
	return refusal, end, nil
}

func (w *toy) door(_ context.Context, env []string) (*door, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	name := fmt.Sprint(len(w.doors))
	d := &door{env: append(env, "DOOR="+name), first: make(chan struct{}), close: func() {}}
	w.doors[name] = sync.OnceFunc(func() { close(d.first) })
	return d, nil
}

func (w *toy) stopBroker(context.Context) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.deaf {
		return errors.New("somebody answers")
	}
	for _, p := range w.pods {
		if time.Since(p.got) >= w.life/2 && w.roles[p.role].Hold == nil && !w.roles[p.role].Deny {
			w.renew(p) // which it would have done before
		}
	}
	w.up = false
	return nil
}

func (w *toy) startBroker(context.Context) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.up, w.back = true, true
	return nil
}

func (w *toy) brokerCalls() (map[string]int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	calls := make(map[string]int)
	for name, p := range w.pods {
		calls[name] = p.calls
	}
	return calls, nil
}

func (w *toy) stsCalls(role string) int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.sts[role]
}

func (w *toy) driver(ctx context.Context, command, env []string, _ string) (*driver, error) {
	b, ok := w.doubles[command[0]]
	if !ok {
		return nil, errors.New("there is no such program")
	}
	in, stdin := io.Pipe()
	stdout, out := io.Pipe()
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		defer func() { _ = out.Close() }()
		if b.hello == "" {
			b.hello = `{"client":"double","version":"v1.2.3"}`
		}
		_, _ = fmt.Fprintln(out, b.hello)
		d := &toyDouble{toy: w, env: env}
		for lines := bufio.NewScanner(in); lines.Scan(); {
			d.calls++
			var a any
			if b.answer == nil {
				a = d.good(lines.Text())
			} else {
				a = b.answer(d, lines.Text())
			}
			if text, ok := a.(string); ok {
				_, _ = fmt.Fprintln(out, text)
				continue
			}
			content, _ := json.Marshal(a)
			_, _ = fmt.Fprintln(out, string(content))
		}
	}()
	return greet(ctx, stdin, stdout, func() { _, _ = in.Close(), out.Close() }, func() { <-ended })
}

// good is what a good client answers.
func (d *toyDouble) good(command string) answer {
	switch command {
	case "call":
		if !time.Now().Before(d.end) {
			key, end, refused := d.fetch(3)
			if refused != nil {
				return failing(refused)
			}
			d.key, d.end = key, end
		}
		return d.sign(d.key, d.end)
	case "fresh":
		key, end, refused := d.fetch(3)
		if refused != nil {
			return failing(refused)
		}
		return d.sign(key, end)
	default:
		return answer{Region: stack.Region}
	}
}

// fetch asks for credentials, so many times while there are none yet.
func (d *toyDouble) fetch(times int) (key string, end time.Time, refused *refusal) {
	for i := range times {
		if i > 0 {
			time.Sleep(time.Second)
		}
		if key, end, refused = d.get(d.env, value(d.env, authorizationVariable)); refused == nil || refused.Status != http.StatusServiceUnavailable {
			break
		}
	}
	return key, end, refused
}

func failing(r *refusal) answer { return answer{Error: "it answers " + r.Code, Code: "Refused"} }

// sign is what STS answers.
func (d *toyDouble) sign(key string, end time.Time) answer {
	if !time.Now().Before(end) {
		return answer{Error: "ExpiredToken: it is over", Code: "ExpiredToken", Key: key}
	}
	return answer{ARN: assumed(d.role()), Key: key}
}

// role is that of its pod.
func (d *toyDouble) role() string {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.pods[value(d.env, "POD")].role
}

// away says whether the broker is.
func (d *toyDouble) away() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return !d.up
}

// asked lets its sidecar ask the broker once more.
func (d *toyDouble) asked() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.pods[value(d.env, "POD")].calls++
}

// but is outcomes with others in place of some.
func but(outcomes, others map[string]Outcome) map[string]Outcome {
	all := maps.Clone(outcomes)
	maps.Copy(all, others)
	return all
}

// during is the scenario that a command belongs to, as far as a double can know.
func (d *toyDouble) during(command string) string {
	d.mu.Lock()
	defer d.mu.Unlock()
	role := d.pods[value(d.env, "POD")].role
	switch {
	case command == "region":
		return region
	case role == refusedRole:
		return refused
	case strings.HasPrefix(role, slow):
		return slow
	case !d.up:
		return away
	case d.back:
		return back
	case command == "fresh":
		return sessions
	case d.calls > 1:
		return renewal
	default:
		return first
	}
}
