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
			t.Errorf("asked at (-want +got):\n%s", diff)
		}
	})
}

// A broker whose answers leave no time must not be asked in a busy loop, and is asked before the end.
func TestRenewsLeasesThatAreShorterThanTheirRefresh(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := start(t, yields(t, 40*time.Second, time.Minute))
		for range 100 {
			time.Sleep(1300 * time.Millisecond)
			w.credentials().want(t, http.StatusOK, "")
		}
		if n := len(w.broker.calls()); n < 4 || n > 5 {
			t.Errorf("asked %d times in 130 s for sessions of 40 s", n)
		}

		w.broker.set(yields(t, time.Millisecond, 0))
		time.Sleep(time.Minute)
		w.broker.calls()
		time.Sleep(time.Minute)
		if n := len(w.broker.calls()); n > 61 {
			t.Errorf("asked %d times in a minute for sessions that end at once", n)
		}
	})
}

// One hour without broker: no error until the credential really ends, then a clear one, and
// credentials with the next attempt once the broker is back.
func TestOutage(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		began := time.Now()
		const life = time.Hour
		w := start(t, yields(t, life, 27*time.Minute))
		synctest.Wait()
		w.broker.set(fails(errAway))
		w.broker.calls()

		for time.Since(began) < life-time.Second {
			a := w.credentials()
			a.want(t, http.StatusOK, "")
			time.Sleep(10 * time.Second)
		}
		time.Sleep(time.Until(began.Add(life)))
		a := w.credentials()
		a.want(t, http.StatusServiceUnavailable, string(credential.ReasonInternal))

		// From 27 to 60 minutes, first quickly, then every 15.5 s in the mean.
		if n := len(w.broker.calls()); n < 70 || n > 260 {
			t.Errorf("asked %d times in 33 minutes", n)
		}
		time.Sleep(10 * time.Minute)
		w.broker.set(yields(t, life, 27*time.Minute))
		time.Sleep(5 * time.Second) // the longest wait of a pod that holds nothing
		w.credentials().want(t, http.StatusOK, "")

		want := []string{
			"listening", "got credentials",
			"cannot renew credentials: serving those held",
			"cannot renew credentials: those held have expired",
			"got credentials",
		}
		if diff := cmp.Diff(want, w.messages()); diff != "" {
			t.Errorf("logged (-want +got):\n%s", diff)
		}
	})
}

// Attempts are spread at random and grow rarer.
func TestPace(t *testing.T) {
	tests := map[string]struct {
		err         error
		holding     bool
		first, most time.Duration // bounds of one wait: at least first, below most
	}{
		"nothing held": {err: errAway, first: 200 * time.Millisecond, most: 5 * time.Second},
		"held":         {err: errAway, holding: true, first: time.Second, most: 30 * time.Second},
		"refused":      {err: errDenied, first: 5 * time.Second, most: time.Minute},
		"refused now":  {err: errDenied, holding: true, first: 5 * time.Second, most: time.Minute},
		"told to wait": {
			err: &credential.Error{
				Kind: credential.ErrUnavailable, Reason: credential.ReasonSTSThrottled,
				Message: "slow down", RetryAfter: 2 * time.Minute,
			},
			first: 2*time.Minute + 200*time.Millisecond, most: 2*time.Minute + 5*time.Second,
		},
		"told to wait for hours": {
			err: &credential.Error{
				Kind: credential.ErrUnavailable, Reason: credential.ReasonSTSThrottled,
				Message: "slow down", RetryAfter: 24 * time.Hour,
			},
			first: 5*time.Minute + 200*time.Millisecond, most: 5*time.Minute + 5*time.Second,
		},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				answer := fails(test.err)
				if test.holding {
					answer = yields(t, 12*time.Hour, time.Minute)
				}
				w := start(t, answer)
				synctest.Wait()
				if test.holding {
					w.broker.set(fails(test.err))
					w.broker.calls()
				}
				time.Sleep(6 * time.Hour)
				calls := w.broker.calls()
				var longest time.Duration
				equal := 0
				for i := range len(calls) - 1 {
					wait := calls[i+1].Sub(calls[i])
					if wait < test.first || wait >= test.most {
						t.Fatalf("wait %d is %v, want [%v, %v)", i, wait, test.first, test.most)
					}
					if i > 0 && wait == calls[i].Sub(calls[i-1]) {
						equal++
					}
					longest = max(longest, wait)
				}
				// The first wait is below twice the base, beside what was asked for.
				base := test.first % time.Minute
				if wait := calls[1].Sub(calls[0]); wait >= test.first+base {
					t.Errorf("the first wait is %v, want below %v", wait, test.first+base)
				}
				if longest < test.most-(test.most-test.first)/4 {
					t.Errorf("the longest of %d waits is %v, never near %v", len(calls), longest, test.most)
				}
				if equal > len(calls)/10 {
					t.Errorf("%d of %d waits are equal: no jitter", equal, len(calls))
				}
			})
		})
	}
}

// What a user mends takes effect within a minute.
func TestRefusalHeals(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := start(t, fails(errDenied))
		time.Sleep(time.Hour)
		w.credentials().want(t, http.StatusForbidden, string(credential.ReasonRoleNotPermitted))
		w.broker.set(yields(t, time.Hour, 27*time.Minute))
		time.Sleep(time.Minute)
		w.credentials().want(t, http.StatusOK, "")
		if diff := cmp.Diff([]string{"listening", "cannot get credentials", "got credentials"}, w.messages()); diff != "" {
			t.Errorf("logged (-want +got):\n%s", diff)
		}
	})
}

// An answer that is no use is a failure like any other, and does not replace what is held.
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

// Timers stand still while a machine sleeps; the first request afterwards makes up for it.
func TestSuspend(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := start(t, yields(t, time.Hour, 27*time.Minute))
		synctest.Wait()
		w.broker.calls()

		w.SuspendFor(30 * time.Minute)
		w.credentials().want(t, http.StatusOK, "")
		synctest.Wait()
		if n := len(w.broker.calls()); n != 1 {
			t.Errorf("asked %d times after a sleep that outlasted the time to renew, want 1", n)
		}

		w.SuspendFor(2 * time.Hour)
		a := w.credentials()
		a.want(t, http.StatusOK, "")
		if a.took != 0 {
			t.Errorf("the answer took %v", a.took)
		}
		if n := len(w.broker.calls()); n != 1 {
			t.Errorf("asked %d times after a sleep that outlasted the credential, want 1", n)
		}

		// While the broker is away, requests do not drive the attempts.
		w.broker.set(fails(errAway))
		w.SuspendFor(2 * time.Hour)
		w.credentials()
		w.broker.calls()
		for range 1000 {
			w.credentials()
		}
		if n := len(w.broker.calls()); n > 600 {
			t.Errorf("1000 requests in 15 minutes caused %d attempts", n)
		}
	})
}

// At the end of what is held the broker is asked, however long the last wait is: it may be well again.
func TestAsksAtTheEndOfWhatIsHeld(t *testing.T) {
	for name, failure := range map[string]error{
		"away": errAway,
		"told to wait": &credential.Error{
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

// A machine that sleeps while the broker is away wakes without credentials, and the next request has them fetched.
func TestSuspendWhileTheBrokerIsAway(t *testing.T) {
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
			t.Errorf("answered %d after %v", a.status, a.took)
		}
	})
}

// A clock that is set back makes no session last longer than AWS accepts it, and does not put off its renewal.
func TestClockSetBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := start(t, yields(t, time.Hour, 27*time.Minute))
		synctest.Wait()
		w.SetClockBack(3 * time.Hour)
		w.broker.calls()
		w.broker.set(fails(errAway))
		time.Sleep(time.Hour - time.Second)
		w.credentials().want(t, http.StatusOK, "")
		if n := len(w.broker.calls()); n == 0 {
			t.Error("the session was not renewed when it was time to")
		}
		time.Sleep(time.Second)
		w.credentials().want(t, http.StatusServiceUnavailable, string(credential.ReasonInternal))
	})
}

// Where the node's clock is hours ahead no session looks valid, and who reads the error is told to look at the clock.
func TestClockAhead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := start(t, yields(t, -time.Hour, 27*time.Minute))
		synctest.Wait()
		a := w.credentials()
		a.want(t, http.StatusServiceUnavailable, string(credential.ReasonInternal))
		if !strings.Contains(a.body, "ended at 1999-12-31T23:00:00Z, and it is 2000-01-01T00:00:00Z by this node's clock") {
			t.Errorf("the error does not name the times: %s", a.body)
		}
	})
}

// A pod that has an hour to end in is renewed until then: its token is good for as long, and after it what is held.
func TestTermination(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const token = 2 * time.Hour / 5 // what is left of the least life when the kubelet stops renewing it, at worst
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

func TestTheSameSessionAgainIsNoNews(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		same, err := yields(t, time.Hour, time.Minute)(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		w := start(t, func(context.Context) (credential.Lease, error) { return same, nil })
		time.Sleep(30 * time.Minute)
		if diff := cmp.Diff([]string{"listening", "got credentials"}, w.messages()); diff != "" {
			t.Errorf("logged (-want +got):\n%s", diff)
		}
	})
}

// The text of network errors holds port numbers that differ each time.
func TestChangingTextIsLoggedOnceAMinute(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := 0
		w := start(t, func(context.Context) (credential.Lease, error) {
			n++
			return credential.Lease{}, credential.Errorf(credential.ErrUnavailable, credential.ReasonInternal, "port %d", n)
		})
		time.Sleep(time.Hour)
		if got := len(w.messages()); got < 30 || got > 62 {
			t.Errorf("%d lines in an hour for %d attempts", got, n)
		}
	})
}

// Troubles that take turns are logged once a minute, too.
func TestTroublesThatTakeTurns(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := 0
		w := start(t, func(context.Context) (credential.Lease, error) {
			n++
			if n%2 == 0 {
				return credential.Lease{}, errAway
			}
			return credential.Lease{}, credential.Errorf(credential.ErrUnavailable, credential.ReasonSTSThrottled, "slow down")
		})
		time.Sleep(time.Hour)
		if got := len(w.messages()); got < 30 || got > 62 {
			t.Errorf("%d lines in an hour for %d attempts", got, n)
		}
	})
}

func TestStops(t *testing.T) {
	for name, answer := range map[string]sourceFunc{"broker hangs": hangs, "renewed": yields(t, time.Hour, time.Minute)} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := start(t, answer)
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
					t.Errorf("the request that waited got %d", status)
				}
				_ = w.stop()
				if took := time.Since(began); took > 100*time.Millisecond {
					t.Errorf("stopping took %v: the request that waits must be let go", took)
				}
			})
		})
	}
}

// tracedError stands for the failure of a call that the broker has a trace of.
type tracedError struct{ error }

func (tracedError) TraceID() string { return "0af7651916cd43dd8448eb211c80319c" }
func (e tracedError) Unwrap() error { return e.error }

// The broker's operator finds a call by the id in the sidecar's log.
func TestFailureNamesItsTrace(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := start(t, fails(tracedError{errDenied}))
		synctest.Wait()
		if text := w.log.String(); !strings.Contains(text, `"trace_id":"0af7651916cd43dd8448eb211c80319c"`) {
			t.Errorf("logged %s", text)
		}
		w.credentials().want(t, http.StatusForbidden, string(credential.ReasonRoleNotPermitted))
	})
}
