package sidecar_test

import (
	"context"
	"net/http"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/credence-iam/credence/broker/credential"
)

func TestRenewsWhenTheBrokerSays(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		began := time.Now()
		w := start(t, yields(t, time.Hour, 27*time.Minute))
		time.Sleep(2 * time.Hour)
		var at []time.Duration
		for _, call := range w.broker.calls() {
			at = append(at, call.Sub(began))
		}
		want := []time.Duration{0, 27 * time.Minute, 54 * time.Minute, 81 * time.Minute, 108 * time.Minute}
		if diff := cmp.Diff(want, at); diff != "" {
			t.Errorf("source was called at (-want +got):\n%s", diff)
		}
	})
}

// If a session ends before its refresh time, the source is called before the expiration, but not in a busy loop.
func TestRenewsLeasesThatAreShorterThanTheirRefresh(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := start(t, yields(t, 40*time.Second, time.Minute))
		for range 100 {
			time.Sleep(1300 * time.Millisecond)
			w.credentials().want(t, http.StatusOK, "")
		}
		if n := len(w.broker.calls()); n < 4 || n > 5 {
			t.Errorf("source was called %d times in 130 s for sessions of 40 s, want 4 or 5", n)
		}

		w.broker.set(yields(t, time.Millisecond, 0))
		time.Sleep(time.Minute)
		w.broker.calls()
		time.Sleep(time.Minute)
		if n := len(w.broker.calls()); n > 61 {
			t.Errorf("source was called %d times in a minute for sessions that expire immediately, want at most 61", n)
		}
	})
}

// During an outage of the broker, the session is served until it expires. Then there is a clear error, and credentials
// again soon after the outage.
func TestOutage(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		began := time.Now()
		const life = time.Hour
		w := start(t, yields(t, life, 27*time.Minute))
		synctest.Wait()
		w.broker.set(fails(errUnavailable))
		w.broker.calls()

		for time.Since(began) < life-time.Second {
			a := w.credentials()
			a.want(t, http.StatusOK, "")
			time.Sleep(10 * time.Second)
		}
		time.Sleep(time.Until(began.Add(life)))
		a := w.credentials()
		a.want(t, http.StatusServiceUnavailable, string(credential.ReasonInternal))

		// From minute 27 to 60, first quickly, then every 15.5 s on average.
		if n := len(w.broker.calls()); n < 70 || n > 260 {
			t.Errorf("source was called %d times in 33 minutes, want 70 to 260", n)
		}
		time.Sleep(10 * time.Minute)
		w.broker.set(yields(t, life, 27*time.Minute))
		time.Sleep(5 * time.Second) // the longest wait without a session
		w.credentials().want(t, http.StatusOK, "")

		want := []string{
			"Listening", "Received credentials",
			"Could not renew credentials, serving the current ones",
			"Could not renew credentials, the current ones have expired",
			"Received credentials",
		}
		if diff := cmp.Diff(want, w.messages()); diff != "" {
			t.Errorf("logged (-want +got):\n%s", diff)
		}
	})
}

// Waits between attempts are random and grow.
func TestBackoff(t *testing.T) {
	tests := map[string]struct {
		err          error
		valid        bool          // a valid session is cached
		lower, upper time.Duration // each wait is in [lower, upper)
	}{
		"no session":      {err: errUnavailable, lower: 200 * time.Millisecond, upper: 5 * time.Second},
		"valid session":   {err: errUnavailable, valid: true, lower: time.Second, upper: 30 * time.Second},
		"refused":         {err: errDenied, lower: 5 * time.Second, upper: time.Minute},
		"refused renewal": {err: errDenied, valid: true, lower: 5 * time.Second, upper: time.Minute},
		"retry after": {
			err: &credential.Error{
				Kind: credential.ErrUnavailable, Reason: credential.ReasonSTSThrottled,
				Message: "slow down", RetryAfter: 2 * time.Minute,
			},
			lower: 2*time.Minute + 200*time.Millisecond, upper: 2*time.Minute + 5*time.Second,
		},
		"retry after hours": {
			err: &credential.Error{
				Kind: credential.ErrUnavailable, Reason: credential.ReasonSTSThrottled,
				Message: "slow down", RetryAfter: 24 * time.Hour,
			},
			lower: 5*time.Minute + 200*time.Millisecond, upper: 5*time.Minute + 5*time.Second,
		},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				source := fails(test.err)
				if test.valid {
					source = yields(t, 12*time.Hour, time.Minute)
				}
				w := start(t, source)
				synctest.Wait()
				if test.valid {
					w.broker.set(fails(test.err))
					w.broker.calls()
				}
				time.Sleep(6 * time.Hour)
				calls := w.broker.calls()
				var longest time.Duration
				equal := 0
				for i := range len(calls) - 1 {
					wait := calls[i+1].Sub(calls[i])
					if wait < test.lower || wait >= test.upper {
						t.Fatalf("wait %d is %v, want [%v, %v)", i, wait, test.lower, test.upper)
					}
					if i > 0 && wait == calls[i].Sub(calls[i-1]) {
						equal++
					}
					longest = max(longest, wait)
				}
				// The first wait is less than twice the base, apart from RetryAfter.
				base := test.lower % time.Minute
				if wait := calls[1].Sub(calls[0]); wait >= test.lower+base {
					t.Errorf("the first wait is %v, want less than %v", wait, test.lower+base)
				}
				if longest < test.upper-(test.upper-test.lower)/4 {
					t.Errorf("the longest of %d waits is %v, want nearly %v", len(calls), longest, test.upper)
				}
				if equal > len(calls)/10 {
					t.Errorf("%d of %d waits are equal, want random ones", equal, len(calls))
				}
			})
		})
	}
}

// The user's fix of a refusal takes effect within a minute.
func TestRefusalIsFixed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := start(t, fails(errDenied))
		time.Sleep(time.Hour)
		w.credentials().want(t, http.StatusForbidden, string(credential.ReasonRoleNotPermitted))
		w.broker.set(yields(t, time.Hour, 27*time.Minute))
		time.Sleep(time.Minute)
		w.credentials().want(t, http.StatusOK, "")
		if diff := cmp.Diff([]string{"Listening", "Could not get credentials", "Received credentials"}, w.messages()); diff != "" {
			t.Errorf("logged (-want +got):\n%s", diff)
		}
	})
}

// An invalid lease is a failure, and does not replace a valid one.
func TestUselessLease(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := start(t, yields(t, time.Hour, 27*time.Minute))
		synctest.Wait()
		w.broker.set(yields(t, -time.Second, 27*time.Minute))
		time.Sleep(59 * time.Minute)
		w.credentials().want(t, http.StatusOK, "")
		time.Sleep(2 * time.Minute)
		w.credentials().want(t, http.StatusServiceUnavailable, string(credential.ReasonInternal))
	})
}

// Timers stop while a machine is suspended. The first request after that triggers the missed renewal.
func TestSuspend(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := start(t, yields(t, time.Hour, 27*time.Minute))
		synctest.Wait()
		w.broker.calls()

		w.SuspendFor(30 * time.Minute)
		w.credentials().want(t, http.StatusOK, "")
		synctest.Wait()
		if n := len(w.broker.calls()); n != 1 {
			t.Errorf("source was called %d times after a suspension longer than the time to renewal, want 1", n)
		}

		w.SuspendFor(2 * time.Hour)
		a := w.credentials()
		a.want(t, http.StatusOK, "")
		if a.took != 0 {
			t.Errorf("the response took %v, want 0", a.took)
		}
		if n := len(w.broker.calls()); n != 1 {
			t.Errorf("source was called %d times after a suspension longer than the session, want 1", n)
		}

		// During an outage, requests do not trigger attempts.
		w.broker.set(fails(errUnavailable))
		w.SuspendFor(2 * time.Hour)
		w.credentials()
		w.broker.calls()
		for range 1000 {
			w.credentials()
		}
		if n := len(w.broker.calls()); n > 600 {
			t.Errorf("1000 requests in 15 minutes triggered %d attempts, want at most 600", n)
		}
	})
}

// When the session expires, the broker is called, however long the current wait is: it may be available again.
func TestCallsAtExpiration(t *testing.T) {
	for name, failure := range map[string]error{
		"unavailable": errUnavailable,
		"retry after": &credential.Error{
			Kind: credential.ErrUnavailable, Reason: credential.ReasonSTSThrottled, Message: "slow down", RetryAfter: 5 * time.Minute,
		},
		"refused": errDenied,
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				const life = 15 * time.Minute
				w := start(t, yields(t, life, 7*time.Minute))
				synctest.Wait()
				w.broker.set(fails(failure))
				time.Sleep(life - 100*time.Millisecond)
				w.broker.set(yields(t, life, 7*time.Minute))
				time.Sleep(300 * time.Millisecond)
				w.credentials().want(t, http.StatusOK, "")
			})
		})
	}
}

// If a machine is suspended during an outage, the first request after that triggers an attempt.
func TestSuspendDuringAnOutage(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := start(t, yields(t, time.Hour, 27*time.Minute))
		synctest.Wait()
		w.broker.set(fails(&credential.Error{
			Kind: credential.ErrUnavailable, Reason: credential.ReasonSTSThrottled, Message: "slow down", RetryAfter: 5 * time.Minute,
		}))
		time.Sleep(28 * time.Minute)
		w.SuspendFor(2 * time.Hour)
		w.broker.set(yields(t, time.Hour, 27*time.Minute))
		if a := w.credentials(); a.status != http.StatusOK || a.took != 0 {
			t.Errorf("status %d after %v, want 200 immediately", a.status, a.took)
		}
	})
}

// After the clock is set back, a session is neither served longer than AWS accepts it, nor renewed later.
func TestClockSetBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := start(t, yields(t, time.Hour, 27*time.Minute))
		synctest.Wait()
		w.SetClockBack(3 * time.Hour)
		w.broker.calls()
		w.broker.set(fails(errUnavailable))
		time.Sleep(time.Hour - time.Second)
		w.credentials().want(t, http.StatusOK, "")
		if n := len(w.broker.calls()); n == 0 {
			t.Error("the session was not renewed in time")
		}
		time.Sleep(time.Second)
		w.credentials().want(t, http.StatusServiceUnavailable, string(credential.ReasonInternal))
	})
}

// If the node's clock is hours ahead, no session seems valid. The error says to check the clock.
func TestClockAhead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := start(t, yields(t, -time.Hour, 27*time.Minute))
		synctest.Wait()
		a := w.credentials()
		a.want(t, http.StatusServiceUnavailable, string(credential.ReasonInternal))
		if !strings.Contains(a.body, "expired at 1999-12-31T23:00:00Z, but it is 2000-01-01T00:00:00Z by this node's clock") {
			t.Errorf("the error does not contain the times: %s", a.body)
		}
	})
}

// A pod that takes an hour to terminate has credentials for that hour: first its token is valid, then its session.
func TestTermination(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const token = 2 * time.Hour / 5 // the shortest remaining time of a token when the kubelet stops renewing it
		began := time.Now()
		session := yields(t, time.Hour, 27*time.Minute)
		w := start(t, func(ctx context.Context) (credential.Lease, error) {
			if time.Since(began) > token {
				return credential.Lease{}, credential.Errorf(credential.ErrUnauthenticated, credential.ReasonTokenExpired, "token expired")
			}
			return session(ctx)
		})
		for time.Since(began) < time.Hour-time.Second {
			w.credentials().want(t, http.StatusOK, "")
			time.Sleep(10 * time.Second)
		}
	})
}

func TestTheSameSessionIsLoggedOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		same, err := yields(t, time.Hour, time.Minute)(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		w := start(t, func(context.Context) (credential.Lease, error) { return same, nil })
		time.Sleep(30 * time.Minute)
		if diff := cmp.Diff([]string{"Listening", "Received credentials"}, w.messages()); diff != "" {
			t.Errorf("logged (-want +got):\n%s", diff)
		}
	})
}

// Network errors contain port numbers, so their text changes at each attempt.
func TestChangingTextIsLoggedOnceAMinute(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := 0
		w := start(t, func(context.Context) (credential.Lease, error) {
			n++
			return credential.Lease{}, credential.Errorf(credential.ErrUnavailable, credential.ReasonInternal, "port %d", n)
		})
		time.Sleep(time.Hour)
		if got := len(w.messages()); got < 30 || got > 62 {
			t.Errorf("%d log lines in an hour for %d attempts, want 30 to 62", got, n)
		}
	})
}

// Alternating failures are also logged once a minute.
func TestAlternatingFailures(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := 0
		w := start(t, func(context.Context) (credential.Lease, error) {
			n++
			if n%2 == 0 {
				return credential.Lease{}, errUnavailable
			}
			return credential.Lease{}, credential.Errorf(credential.ErrUnavailable, credential.ReasonSTSThrottled, "slow down")
		})
		time.Sleep(time.Hour)
		if got := len(w.messages()); got < 30 || got > 62 {
			t.Errorf("%d log lines in an hour for %d attempts, want 30 to 62", got, n)
		}
	})
}

func TestStops(t *testing.T) {
	for name, source := range map[string]sourceFunc{"broker hangs": hangs, "renewed": yields(t, time.Hour, time.Minute)} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := start(t, source)
				time.Sleep(time.Second)
				statuses := make(chan int)
				go func() { statuses <- w.credentials().status }()
				time.Sleep(100 * time.Millisecond)
				began := time.Now()
				go func() {
					if err := w.stop(); err != nil {
						t.Errorf("Run = %v, want nil", err)
					}
				}()
				if status := <-statuses; name == "broker hangs" && status != http.StatusServiceUnavailable {
					t.Errorf("the waiting request got status %d, want 503", status)
				}
				_ = w.stop()
				if took := time.Since(began); took > 100*time.Millisecond {
					t.Errorf("stopping took %v: waiting requests must return immediately", took)
				}
			})
		})
	}
}

// tracedError is the error of a call with a trace.
type tracedError struct{ error }

func (tracedError) TraceID() string { return "0af7651916cd43dd8448eb211c80319c" }
func (e tracedError) Unwrap() error { return e.error }

// The trace ID in the sidecar's log finds the call in the broker's traces.
func TestFailureNamesItsTrace(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := start(t, fails(tracedError{errDenied}))
		synctest.Wait()
		if text := w.log.String(); !strings.Contains(text, `"trace_id":"0af7651916cd43dd8448eb211c80319c"`) {
			t.Errorf("the log does not contain the trace ID: %s", text)
		}
		w.credentials().want(t, http.StatusForbidden, string(credential.ReasonRoleNotPermitted))
	})
}
