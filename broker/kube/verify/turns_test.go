package verify_test

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	"k8s.io/client-go/rest"

	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/broker/identity"
	"github.com/credence-iam/credence/broker/kube/verify"
)

// reviewTakes is the time that the API server of these tests needs for a review. It makes 32 at once.
const reviewTakes = 100 * time.Millisecond

// soon bounds the wait of a caller whose turn is among the next reviews that begin.
const soon = 2 * reviewTakes

// tokenOf returns a token of a pod. genuineOnly accepts it if the signature is "genuine".
func tokenOf(id identity.Pod, serial int, signature string) identity.UnverifiedToken {
	part := func(v any) string {
		text, err := json.Marshal(v)
		if err != nil {
			panic(err) // maps of strings and numbers
		}
		return base64.RawURLEncoding.EncodeToString(text)
	}
	now := time.Now()
	return identity.NewUnverifiedToken(strings.Join([]string{
		part(map[string]string{"alg": "RS256", "kid": "a"}),
		part(map[string]any{
			"iss": issuer, "aud": audience, "sub": "system:serviceaccount:" + id.Namespace + ":" + id.ServiceAccount, "jti": fmt.Sprint(serial),
			"iat": now.Unix(), "nbf": now.Unix(), "exp": now.Add(time.Hour).Unix(),
			"kubernetes.io": map[string]any{
				"namespace": id.Namespace, "pod": map[string]string{"name": id.Name, "uid": id.UID},
				"serviceaccount": map[string]string{"name": id.ServiceAccount, "uid": id.ServiceAccountUID},
			},
		}),
		base64.RawURLEncoding.EncodeToString([]byte(signature)),
	}, "."))
}

// genuineOnly makes reviews as an API server does that signs with the word "genuine".
func genuineOnly(review *authenticationv1.TokenReview) {
	parts := strings.Split(review.Spec.Token, ".")
	review.Status = authenticationv1.TokenReviewStatus{Error: "invalid bearer token"}
	if parts[2] != base64.RawURLEncoding.EncodeToString([]byte("genuine")) {
		return
	}
	var c struct {
		Kubernetes struct {
			Namespace           string
			Pod, ServiceAccount struct{ Name, UID string }
		} `json:"kubernetes.io"`
	}
	text, _ := base64.RawURLEncoding.DecodeString(parts[1])
	_ = json.Unmarshal(text, &c)
	review.Status = authenticationv1.TokenReviewStatus{
		Authenticated: true, Audiences: review.Spec.Audiences,
		User: authenticationv1.UserInfo{
			Username: "system:serviceaccount:" + c.Kubernetes.Namespace + ":" + c.Kubernetes.ServiceAccount.Name, UID: c.Kubernetes.ServiceAccount.UID,
			Extra: map[string]authenticationv1.ExtraValue{
				"authentication.kubernetes.io/pod-name": {c.Kubernetes.Pod.Name}, "authentication.kubernetes.io/pod-uid": {c.Kubernetes.Pod.UID},
			},
		},
	}
}

// flood is a number of calls under way.
type flood struct {
	t       *testing.T
	v       identity.Verifier
	ctx     context.Context
	calls   sync.WaitGroup
	mu      sync.Mutex
	reasons map[credential.Reason]int
}

func (f *flood) call(address string, token identity.UnverifiedToken) {
	f.calls.Go(func() {
		_, err := f.v.Verify(identity.WithPeer(f.ctx, address), token)
		f.mu.Lock()
		defer f.mu.Unlock()
		f.reasons[credential.ReasonOf(err)]++
	})
}

// took makes a call with a genuine token and returns its duration.
func (f *flood) took(address string, token identity.UnverifiedToken) time.Duration {
	f.t.Helper()
	began := time.Now()
	if _, err := f.v.Verify(identity.WithPeer(f.t.Context(), address), token); err != nil {
		f.t.Errorf("the pod at %s gets error %v", address, err)
	}
	return time.Since(began)
}

// underFlood runs test in virtual time, with a verifier whose API server needs reviewTakes for a review.
func underFlood(t *testing.T, expected func(identity.Pod) bool, test func(t *testing.T, f *flood, server *reviewer)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		server, config := startReviewer(t)
		server.set(func(s *reviewer) { s.takes, s.change = reviewTakes, genuineOnly })
		ctx, stop := withCancel(t)
		f := &flood{t: t, v: newReviewExpecting(t, config, expected), ctx: ctx, reasons: make(map[credential.Reason]int)}
		test(t, f, server)
		stop()
		f.calls.Wait()
		time.Sleep(time.Minute) // until the reviews under way have ended
	})
}

func newReviewExpecting(t *testing.T, config *rest.Config, expected func(identity.Pod) bool) *verify.TokenReview {
	t.Helper()
	v, err := verify.NewTokenReview(verify.Config{REST: config, Audience: audience, Logger: slog.New(slog.DiscardHandler), Expected: expected})
	if err != nil {
		t.Fatal(err)
	}
	return v
}

func podIn(namespace string, i int) identity.Pod {
	return identity.Pod{Namespace: namespace, Name: fmt.Sprint("p-", i), UID: fmt.Sprint(namespace, "-u-", i), ServiceAccount: "cart", ServiceAccountUID: "s-1"}
}

// garbage sends forged tokens, which claim many namespaces, and the pod shop/p-1 itself.
func (f *flood) garbage(calls int, addresses ...string) {
	for i := range calls {
		id := podIn("shop", 1)
		if i%3 != 0 {
			id = podIn(fmt.Sprint("ns-", i), i)
		}
		f.call(addresses[i%len(addresses)], tokenOf(id, i, "forged"))
	}
	synctest.Wait()
}

var fourAddresses = []string{"10.0.0.1", "10.0.0.2", "10.0.0.3", "10.0.0.4"}

func TestFloodOfGarbageLeavesTurnsToOthers(t *testing.T) {
	for _, calls := range []int{1000, 4096} {
		t.Run(fmt.Sprint(calls), func(t *testing.T) {
			underFlood(t, nil, func(t *testing.T, f *flood, _ *reviewer) {
				f.garbage(calls, fourAddresses...)
				if d := f.took("10.0.0.5", tokenOf(podIn("shop", 1), 0, "genuine")); d > soon {
					t.Errorf("a pod at a fifth address waited %s for its review", d)
				}
				// Once more, while the flood continues.
				f.garbage(calls, fourAddresses...)
				if d := f.took("10.0.0.5", tokenOf(podIn("shop", 1), 1, "genuine")); d > soon {
					t.Errorf("the second time it waited %s", d)
				}
			})
		})
	}
}

// TestFloodFromOneIPv6NetworkLeavesTurnsToOthers: one machine has all IPv6 addresses with the same first 64 bits, so it gets
// no more turns with many of them.
func TestFloodFromOneIPv6NetworkLeavesTurnsToOthers(t *testing.T) {
	underFlood(t, nil, func(t *testing.T, f *flood, _ *reviewer) {
		for i := range 1000 {
			f.call(fmt.Sprintf("2001:db8::1:%x", i), tokenOf(podIn(fmt.Sprint("ns-", i), i), i, "forged"))
		}
		synctest.Wait()
		if d := f.took("2001:db8:0:1::1", tokenOf(podIn("shop", 1), 0, "genuine")); d > soon {
			t.Errorf("a pod in another network waited %s for its review", d)
		}
	})
}

func TestManyPodsOfOneNamespaceLeaveTurnsToOthers(t *testing.T) {
	underFlood(t, nil, func(t *testing.T, f *flood, _ *reviewer) {
		for i := range 1500 {
			f.call(fmt.Sprintf("10.1.%d.%d", i/250, i%250), tokenOf(podIn("batch", i), i, "genuine"))
		}
		synctest.Wait()
		if d := f.took("10.2.0.1", tokenOf(podIn("shop", 1), 0, "genuine")); d > soon {
			t.Errorf("a pod of another namespace waited %s for its review", d)
		}
	})
}

// TestVerifiedTokensHaveTurnsFirst: a running pod's token was verified before, so it gets a turn even if its address sends
// the flood. Some networks give all pods of a node one address.
func TestVerifiedTokensHaveTurnsFirst(t *testing.T) {
	underFlood(t, nil, func(t *testing.T, f *flood, server *reviewer) {
		running := tokenOf(podIn("shop", 1), 0, "genuine")
		f.took("10.0.0.1", running)
		time.Sleep(30 * time.Minute) // The cached review has expired; the token still counts as recent.
		for i := range 1000 {
			f.call("10.0.0.1", tokenOf(podIn("shop", 1), i, "forged"))
		}
		synctest.Wait()
		before := server.reviews.Load()
		if d := f.took("10.0.0.1", running); d > soon || d < reviewTakes || server.reviews.Load() == before {
			t.Errorf("a token that was verified before took %s", d)
		}
		// A refused token loses its earlier turn, so the second time it waits as long as the others.
		time.Sleep(11 * time.Second)
		server.set(func(s *reviewer) {
			s.change = func(r *authenticationv1.TokenReview) {
				r.Status = authenticationv1.TokenReviewStatus{Error: "invalid bearer token"}
			}
		})
		wantReason(t, f.v, running, credential.ReasonTokenInvalid)
		f.garbage(1000, "10.0.0.1")
		began := time.Now()
		_, err := f.v.Verify(identity.WithPeer(t.Context(), "10.0.0.1"), running)
		if d := time.Since(began); d <= 5*soon || credential.ReasonOf(err) != credential.ReasonTokenInvalid {
			t.Errorf("a token that was refused before gets error %v after %s", err, d)
		}
	})
}

// TestVerifiedTokensHaveSlotsOfTheirOwn: worthless tokens can take long if the API server asks a webhook about unknown tokens.
// A running pod does not wait for them.
func TestVerifiedTokensHaveSlotsOfTheirOwn(t *testing.T) {
	underFlood(t, nil, func(t *testing.T, f *flood, server *reviewer) {
		var running []identity.UnverifiedToken
		for i := range 8 {
			running = append(running, tokenOf(podIn("shop", i), i, "genuine"))
			f.took("10.0.0.5", running[i])
		}
		time.Sleep(11 * time.Second)
		server.set(func(s *reviewer) { s.takes = 8 * time.Second })
		f.garbage(200, fourAddresses...)
		time.Sleep(time.Second)
		server.set(func(s *reviewer) { s.takes = reviewTakes }) // for later reviews
		live := &flood{t: t, v: f.v, ctx: t.Context(), reasons: make(map[credential.Reason]int)}
		began := time.Now()
		for i, token := range running {
			live.call(fmt.Sprint("10.3.0.", i), token)
		}
		live.calls.Wait()
		// Eight reviews, four at once.
		if d := time.Since(began); d != 2*reviewTakes || live.reasons[""] != 8 {
			t.Errorf("running pods waited %s for their reviews, with results %v", d, live.reasons)
		}
		if n := server.highest.Load(); n != 36 {
			t.Errorf("%d reviews were under way at once, want 36", n)
		}
	})
}

// TestVerifiedTokensLeaveTurnsToNewOnes: a user who may create tokens can have many verified. New tokens still get turns.
func TestVerifiedTokensLeaveTurnsToNewOnes(t *testing.T) {
	underFlood(t, nil, func(t *testing.T, f *flood, _ *reviewer) {
		made := make([]identity.UnverifiedToken, 800)
		for i := range made {
			made[i] = tokenOf(podIn("shop", 1), i, "genuine")
			f.call("10.0.0.1", made[i])
		}
		f.calls.Wait()
		time.Sleep(11 * time.Second)
		for i := range made {
			f.call("10.0.0.1", made[i])
		}
		synctest.Wait()
		if d := f.took("10.0.0.5", tokenOf(podIn("bank", 1), 0, "genuine")); d > soon {
			t.Errorf("a new pod waited %s behind tokens that were verified before", d)
		}
	})
}

// TestTokensOfExpectedPodsHaveTurns: a token that claims an existing pod gets a turn before claims of other pods.
func TestTokensOfExpectedPodsHaveTurns(t *testing.T) {
	expected := func(id identity.Pod) bool { return id == podIn("shop", 1) || id.Namespace == "own" }
	underFlood(t, expected, func(t *testing.T, f *flood, _ *reviewer) {
		for i := range 500 {
			f.call("10.0.0.1", tokenOf(podIn(fmt.Sprint("ns-", i), i), i, "forged"))
			f.call("10.0.0.1", tokenOf(podIn("own", i), i, "forged"))
		}
		synctest.Wait()
		if d := f.took("10.0.0.1", tokenOf(podIn("shop", 1), 0, "genuine")); d > soon {
			t.Errorf("an expected pod waited %s for its review", d)
		}
	})
}

func TestFullQueueDropsTheLargestShare(t *testing.T) {
	underFlood(t, nil, func(t *testing.T, f *flood, server *reviewer) {
		// A few callers wait before the flood.
		server.set(func(s *reviewer) { s.takes = 5 * time.Second })
		f.garbage(32, fourAddresses...)
		few := &flood{t: t, v: f.v, ctx: t.Context(), reasons: make(map[credential.Reason]int)}
		for i := range 100 {
			few.call(fmt.Sprint("10.3.0.", i), tokenOf(podIn("shop", i), i, "genuine"))
		}
		synctest.Wait()
		f.garbage(3000, fourAddresses...)
		f.mu.Lock()
		if n := f.reasons[credential.ReasonBrokerBusy]; n != 3000+100-32-2048 { // the first 32 calls have tokens that are among those of the 3,000 calls
			t.Errorf("%d calls were dropped, want all above 2,048 waiting ones", n)
		}
		f.mu.Unlock()
		// A caller that arrives last is not dropped either.
		few.call("10.3.1.1", tokenOf(podIn("bank", 1), 1, "genuine"))
		few.calls.Wait()
		if n := few.reasons[""]; n != 101 {
			t.Errorf("of 101 calls with small shares %d succeeded: %v", n, few.reasons)
		}
	})
}

// TestFullQueueDropsFewAddressesFirst: many pods of one namespace wait, each at its own address, and few addresses send a flood.
// No pod is dropped, although its namespace has the most waiting tokens.
func TestFullQueueDropsFewAddressesFirst(t *testing.T) {
	underFlood(t, nil, func(t *testing.T, f *flood, _ *reviewer) {
		pods := &flood{t: t, v: f.v, ctx: t.Context(), reasons: make(map[credential.Reason]int)}
		for i := range 1000 {
			pods.call(fmt.Sprintf("10.1.%d.%d", i/250, i%250), tokenOf(podIn("batch", i), i, "genuine"))
		}
		synctest.Wait()
		for i := range 3000 {
			f.call(fourAddresses[i%4], tokenOf(podIn(fmt.Sprint("ns-", i%10), i), i, "forged"))
		}
		pods.calls.Wait()
		if n := pods.reasons[""]; n != 1000 {
			t.Errorf("of 1,000 pods %d were verified: %v", n, pods.reasons)
		}
	})
}

func TestCallersThatGiveUpLeaveTheQueue(t *testing.T) {
	underFlood(t, nil, func(t *testing.T, f *flood, server *reviewer) {
		server.set(func(s *reviewer) { s.takes = time.Second })
		gone, leave := withCancel(t)
		leaving := &flood{t: t, v: f.v, ctx: gone, reasons: make(map[credential.Reason]int)}
		shared := tokenOf(podIn("shop", 1), 5, "genuine")
		for i := range 1000 {
			leaving.call("10.0.0.1", tokenOf(podIn("shop", i), i, "forged"))
		}
		synctest.Wait()
		// Of two callers with one token the first gives up and the second stays.
		leaving.call("10.0.0.2", shared)
		synctest.Wait()
		stays := make(chan time.Duration)
		go func() { stays <- f.took("10.0.0.3", shared) }()
		synctest.Wait()
		if n := f.v.(*verify.TokenReview).Waiting(); n != 1000-32+1 {
			t.Errorf("%d tokens wait, want 969", n)
		}
		leave()
		leaving.calls.Wait()
		if synctest.Wait(); f.v.(*verify.TokenReview).Waiting() != 1 {
			t.Errorf("%d tokens wait after their callers gave up, want 1", f.v.(*verify.TokenReview).Waiting())
		}
		if d := <-stays; d != 2*time.Second {
			t.Errorf("the caller that stays waited %s, want 2s", d)
		}
		if n := server.reviews.Load(); n != 33 {
			t.Errorf("%d reviews were made, want the 32 under way and the one with a waiting caller", n)
		}
		// No caller is left, so the next one does not wait.
		if d := f.took("10.0.0.3", tokenOf(podIn("shop", 1), 6, "genuine")); d != time.Second {
			t.Errorf("after that a call took %s, want 1s", d)
		}
	})
}

// TestErrorsOfCallersThatGiveUp: a caller that gives up before its turn gets "broker busy", because the API server received no
// request. A caller that gives up during its review gets "API server unavailable".
func TestErrorsOfCallersThatGiveUp(t *testing.T) {
	underFlood(t, nil, func(t *testing.T, f *flood, server *reviewer) {
		server.set(func(s *reviewer) { s.takes = 9 * time.Second })
		leaves, leave := context.WithTimeout(t.Context(), time.Second)
		defer leave()
		var calls sync.WaitGroup
		call := func(i int, want credential.Reason) {
			calls.Go(func() {
				_, err := f.v.Verify(leaves, tokenOf(podIn("shop", i), i, "genuine"))
				if credential.ReasonOf(err) != want || !errors.Is(err, credential.ErrUnavailable) {
					t.Errorf("the caller that gives up gets error %v, want %s", err, want)
				}
			})
			synctest.Wait()
		}
		for i := range 32 {
			call(i, credential.ReasonAPIServerUnavailable)
		}
		call(32, credential.ReasonBrokerBusy)
		calls.Wait()
	})
}

// TestFirstToLeaveDoesNotEndTheReview: a review that has begun continues when its first caller gives up. Callers that wait,
// and callers that arrive later, get its result.
func TestFirstToLeaveDoesNotEndTheReview(t *testing.T) {
	underFlood(t, nil, func(t *testing.T, f *flood, server *reviewer) {
		token := tokenOf(podIn("shop", 1), 0, "genuine")
		first, leave := context.WithTimeout(t.Context(), reviewTakes/2)
		defer leave()
		go func() {
			if _, err := f.v.Verify(first, token); !errors.Is(err, credential.ErrUnavailable) {
				t.Errorf("the caller that gives up gets error %v", err)
			}
		}()
		synctest.Wait()
		var others sync.WaitGroup
		others.Go(func() { f.took("10.0.0.1", token) })
		time.Sleep(reviewTakes * 3 / 4)
		others.Go(func() { f.took("10.0.0.1", token) })
		others.Wait()
		if n := server.reviews.Load(); n != 1 {
			t.Errorf("%d reviews were made of one token, want 1", n)
		}
	})
}

// TestTokenForAnotherAudience: a genuine token for another audience is refused, and the error has its pod: webhook and broker
// disagree. For a worthless token, or one with a second fault, the error has no pod.
func TestTokenForAnotherAudience(t *testing.T) {
	elsewhere := func(c map[string]any) { c["aud"] = []string{"other", "more"} }
	pod := identity.Pod{Namespace: "shop", Name: "cart-1", UID: "u-1", ServiceAccount: "cart", ServiceAccountUID: "s-1"}
	check := func(t *testing.T, v identity.Verifier, token identity.UnverifiedToken, withPod bool) {
		t.Helper()
		id, err := v.Verify(t.Context(), token)
		if id != (identity.Pod{}) || credential.ReasonOf(err) != credential.ReasonTokenAudience {
			t.Errorf("got pod %+v and error %v", id, err)
		}
		for _, text := range []string{`"other, more"`, `"` + audience + `"`, "--audience of the webhook and of the broker", "chart value audience"} {
			if !strings.Contains(fmt.Sprint(err), text) {
				t.Errorf("the error %q does not contain %s", err, text)
			}
		}
		other, ok := errors.AsType[*identity.OtherAudienceError](err)
		if ok != withPod || withPod && other.Pod != pod {
			t.Errorf("the error has pod %+v: %t, want %t", other, ok, withPod)
		}
	}
	key := newSigner(t, "a")
	t.Run("jwks", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			_, config := startAPIServer(t, key)
			v := newVerifier(t, config)
			check(t, v, key.token(t, elsewhere), true)
			check(t, v, key.token(t, func(c map[string]any) { elsewhere(c); c["exp"] = time.Now().Unix() }), false)
			check(t, v, key.token(t, func(c map[string]any) { elsewhere(c); delete(c, "kubernetes.io") }), false)
			wantReason(t, v, newSigner(t, "a").token(t, elsewhere), credential.ReasonTokenInvalid)
		})
	})
	t.Run("tokenreview", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			server, config := startReviewer(t)
			v := newReviewExpecting(t, config, func(id identity.Pod) bool { return id == pod })
			check(t, v, key.token(t, elsewhere), true)
			check(t, v, key.token(t, elsewhere), true) // no review of another audience is cached
			made := server.reviews.Load()
			check(t, v, key.token(t, func(c map[string]any) { elsewhere(c); c["exp"] = time.Now().Unix() }), false)
			check(t, newReviewExpecting(t, config, nil), key.token(t, elsewhere), false)
			check(t, newReviewExpecting(t, config, func(identity.Pod) bool { return false }), key.token(t, elsewhere), false)
			if n := server.reviews.Load(); made != 2 || n != made {
				t.Errorf("%d reviews were made, want 2, and %d of tokens without an expected pod, want 0", made, n-made)
			}
			server.set(func(s *reviewer) {
				s.change = func(r *authenticationv1.TokenReview) {
					r.Status = authenticationv1.TokenReviewStatus{Error: "invalid bearer token"}
				}
			})
			check(t, v, key.token(t, elsewhere), false)
			server.set(func(s *reviewer) {
				s.change = func(r *authenticationv1.TokenReview) { r.Status.Audiences = nil }
			})
			check(t, v, key.token(t, elsewhere), false)
		})
	})
}

// TestSignaturesAreVerifiedByTurns: a flood of worthless signatures costs processor time, so signatures wait for turns too.
func TestSignaturesAreVerifiedByTurns(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		key := newSigner(t, "a")
		_, config := startAPIServer(t, key)
		v := newVerifier(t, config)
		wantReason(t, v, key.token(t, nil), "")
		release := v.Occupy(t.Context())
		forged, genuine := newSigner(t, "a").token(t, nil), key.token(t, nil)
		var done atomic.Int64
		var calls sync.WaitGroup
		for i := range 1000 {
			calls.Go(func() {
				_, err := v.Verify(identity.WithPeer(t.Context(), fourAddresses[i%4]), forged)
				if credential.ReasonOf(err) != credential.ReasonTokenInvalid {
					t.Errorf("a forged token gets error %v", err)
				}
				done.Add(1)
			})
		}
		synctest.Wait()
		if n := v.Waiting(); n != 1000 {
			t.Errorf("%d tokens wait, want 1000", n)
		}
		leaving, leave := withCancel(t)
		calls.Go(func() {
			if _, err := v.Verify(leaving, genuine); credential.ReasonOf(err) != credential.ReasonBrokerBusy {
				t.Errorf("the caller that gives up gets error %v", err)
			}
		})
		synctest.Wait()
		leave()
		calls.Go(func() {
			if _, err := v.Verify(identity.WithPeer(t.Context(), "10.0.0.5"), genuine); err != nil {
				t.Errorf("a pod at a fifth address gets error %v", err)
			}
			if n := done.Load(); n > 100 {
				t.Errorf("it had to wait for %d of 1,000 forged tokens", n)
			}
		})
		synctest.Wait()
		release()
		calls.Wait()
		if n := v.Waiting(); n != 0 {
			t.Errorf("at the end %d tokens wait", n)
		}
	})
}
