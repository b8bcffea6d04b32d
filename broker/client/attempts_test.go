package client_test

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"

	"github.com/credence-iam/credence/broker/brokerpb"
	"github.com/credence-iam/credence/broker/client"
	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/broker/placement"
	"github.com/credence-iam/credence/broker/policy"
	"github.com/credence-iam/credence/certs/certstest"
)

const (
	host = "credence-broker.credence.svc"
	key  = "00112233445566778899aabbccddeeff"
)

// network is a DNS with one host, and the brokers at its addresses, in memory.
type network struct {
	t         *testing.T
	ca        *certstest.CA
	tokenFile string

	mu      sync.Mutex
	dns     func() ([]netip.Addr, error)
	lookups int
	nodes   map[netip.Addr]func(context.Context) (net.Conn, error)
	dialed  []dialed
	began   time.Time
}

// dialed is one connection: the address, and the time since the call began.
type dialed struct {
	Addr  netip.Addr
	After time.Duration
}

func newNetwork(t *testing.T) *network {
	n := &network{
		t: t, ca: certstest.NewCA(t), tokenFile: filepath.Join(t.TempDir(), "token"),
		nodes: make(map[netip.Addr]func(context.Context) (net.Conn, error)), began: time.Now(),
	}
	writeToken(t, n.tokenFile, token)
	return n
}

// brokers makes DNS answer with n addresses, and returns them in the order in which they are to be asked.
func (n *network) brokers(count byte) []netip.Addr {
	var all []netip.Addr
	for i := range count {
		all = append(all, netip.AddrFrom4([4]byte{10, 0, 0, i + 1}))
	}
	n.resolve(all...)
	return placement.Rank(key, all)
}

func (n *network) resolve(all ...netip.Addr) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.dns = func() ([]netip.Addr, error) { return all, nil }
}

func (n *network) unresolve() {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.dns = func() ([]netip.Addr, error) {
		return nil, &net.DNSError{Err: "server misbehaving", Name: host}
	}
}

// lookup counts those of A records: each look-up begins with one.
func (n *network) lookup(_ context.Context, family, name string) ([]netip.Addr, error) {
	if name != host {
		n.t.Errorf("%q was looked up", name)
	}
	n.mu.Lock()
	if family == "ip4" {
		n.lookups++
	}
	dns := n.dns
	n.mu.Unlock()
	all, err := dns()
	return ofFamily(all, family), err
}

// ofFamily returns the addresses of network ip4 or ip6, as a resolver does.
func ofFamily(all []netip.Addr, family string) []netip.Addr {
	return slices.DeleteFunc(slices.Clone(all), func(a netip.Addr) bool { return a.Unmap().Is4() != (family == "ip4") })
}

func (n *network) dial(ctx context.Context, address string) (net.Conn, error) {
	at, err := netip.ParseAddrPort(address)
	if err != nil || at.Port() != 9443 {
		n.t.Errorf("%q was dialed", address)
		return nil, errors.New("not an address")
	}
	n.mu.Lock()
	n.dialed = append(n.dialed, dialed{at.Addr(), time.Since(n.began)})
	node := n.nodes[at.Addr()]
	n.mu.Unlock()
	if node == nil {
		return nil, errors.New("refused")
	}
	return node(ctx)
}

// serve lets a broker answer at an address. It checks the token, and that calls of it are ended with the call.
func (n *network) serve(at netip.Addr, answer func(context.Context) (*brokerpb.GetCredentialsResponse, error)) *server {
	s := &server{answer: func(ctx context.Context) (*brokerpb.GetCredentialsResponse, error) {
		if got := metadata.ValueFromIncomingContext(ctx, "authorization"); !slices.Equal(got, []string{"Bearer " + token}) {
			n.t.Errorf("the broker at %s got the authorization %q", at, got)
		}
		return answer(ctx)
	}}
	listener := bufconn.Listen(1 << 16)
	s.serve(n.t, listener, serverTLS(n.ca.Leaf(host)))
	n.mu.Lock()
	defer n.mu.Unlock()
	n.nodes[at] = listener.DialContext
	return s
}

func serverTLS(leaf *certstest.Leaf) credentials.TransportCredentials {
	return credentials.NewTLS(&tls.Config{MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{leaf.TLS()}})
}

// mute lets whoever is at an address accept connections, and say nothing.
func (n *network) mute(all ...netip.Addr) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, at := range all {
		n.nodes[at] = func(context.Context) (net.Conn, error) {
			far, near := net.Pipe()
			n.t.Cleanup(func() { far.Close() })
			return near, nil
		}
	}
}

func (n *network) client(change ...func(*client.Config)) *client.Client {
	n.t.Helper()
	cfg := client.Config{
		Target: host + ":9443", RoutingKey: key, TokenFile: n.tokenFile, Lookup: n.lookup, Dial: n.dial,
		TLS: &tls.Config{MinVersion: tls.VersionTLS13, RootCAs: n.ca.Pool()},
	}
	for _, f := range change {
		f(&cfg)
	}
	c, err := client.New(cfg)
	if err != nil {
		n.t.Fatal(err)
	}
	return c
}

// call calls, and returns what was dialed meanwhile.
func (n *network) call(c *client.Client) ([]dialed, error) {
	n.mu.Lock()
	n.dialed, n.began = nil, time.Now()
	n.mu.Unlock()
	lease, err := c.Credentials(n.t.Context())
	if (err == nil) != (lease.AccessKeyID != "") {
		n.t.Errorf("the lease %q came with the error %v", lease.AccessKeyID, err)
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.dialed, err
}

func (n *network) took() time.Duration { return time.Since(n.began) }

func refuse(kind error, reason credential.Reason) func(context.Context) (*brokerpb.GetCredentialsResponse, error) {
	return func(context.Context) (*brokerpb.GetCredentialsResponse, error) {
		return nil, brokerpb.ToStatus(credential.Errorf(kind, reason, "the broker says %s", reason)).Err()
	}
}

// slow answers after a time, if the call is still there.
func slow(after time.Duration) func(context.Context) (*brokerpb.GetCredentialsResponse, error) {
	return func(ctx context.Context) (*brokerpb.GetCredentialsResponse, error) {
		select {
		case <-time.After(after):
			return good(), nil
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

func want(t *testing.T, got []dialed, want ...dialed) {
	t.Helper()
	if diff := cmp.Diff(want, got, cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); diff != "" {
		t.Errorf("dialed (-want +got):\n%s", diff)
	}
}

func succeeded(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Error(err)
	}
}

// unavailable checks an error and each text that it must have.
func unavailable(t *testing.T, err error, reason credential.Reason, texts ...string) {
	t.Helper()
	if !errors.Is(err, credential.ErrUnavailable) || credential.ReasonOf(err) != reason {
		t.Fatalf("the call ended with %v (%s), want %s of kind unavailable", err, credential.ReasonOf(err), reason)
	}
	for _, text := range texts {
		if !strings.Contains(err.Error(), text) {
			t.Errorf("the error %q does not say %q", err, text)
		}
	}
}

// in runs a test on a network of its own, in virtual time.
func in(t *testing.T, test func(t *testing.T, n *network)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) { test(t, newNetwork(t)) })
}

func TestOwnerIsAsked(t *testing.T) {
	in(t, func(t *testing.T, n *network) {
		ranked := n.brokers(5)
		for _, at := range ranked {
			n.serve(at, answering(good()))
		}
		c := n.client()
		for range 3 {
			got, err := n.call(c)
			succeeded(t, err)
			want(t, got, dialed{ranked[0], 0})
		}
		if n.lookups != 3 {
			t.Errorf("%d look-ups in 3 calls", n.lookups)
		}
	})
}

// Without a key nobody is first.
func TestNoRoutingKey(t *testing.T) {
	in(t, func(t *testing.T, n *network) {
		for _, at := range n.brokers(3) {
			n.serve(at, answering(good()))
		}
		c := n.client(func(cfg *client.Config) { cfg.RoutingKey = "" })
		asked := map[netip.Addr]bool{}
		for range 60 { // after which one of three is missing once in 10^10 times
			got, err := n.call(c)
			succeeded(t, err)
			if len(got) != 1 {
				t.Fatalf("dialed %v", got)
			}
			asked[got[0].Addr] = true
		}
		if len(asked) != 3 {
			t.Errorf("only %v were asked", asked)
		}
	})
}

// What says nothing about the pod, and has a cause of the one broker's own, is answered by the next at once.
func TestNextAtOnce(t *testing.T) {
	useless := good()
	useless.SecretAccessKey = ""
	for name, first := range map[string]func(context.Context) (*brokerpb.GetCredentialsResponse, error){
		"refused":       nil,
		"shutting down": refuse(credential.ErrUnavailable, credential.ReasonShuttingDown),
		"audit away":    refuse(credential.ErrUnavailable, credential.ReasonAuditUnavailable),
		"internal":      refuse(nil, credential.ReasonInternal),
		"useless":       answering(useless),
	} {
		t.Run(name, func(t *testing.T) {
			in(t, func(t *testing.T, n *network) {
				ranked := n.brokers(5)
				if first != nil {
					n.serve(ranked[0], first)
					n.serve(ranked[1], first)
				}
				n.serve(ranked[2], answering(good()))
				got, err := n.call(n.client())
				succeeded(t, err)
				want(t, got, dialed{ranked[0], 0}, dialed{ranked[1], 0}, dialed{ranked[2], 0})
			})
		})
	}
}

// A refusal is the same from every broker.
func TestRefusalEndsTheCall(t *testing.T) {
	for _, kind := range []error{credential.ErrDenied, credential.ErrInvalid, credential.ErrNotFound, credential.ErrUnauthenticated} {
		in(t, func(t *testing.T, n *network) {
			ranked := n.brokers(3)
			n.serve(ranked[0], refuse(kind, credential.ReasonRoleNotPermitted))
			n.serve(ranked[1], answering(good()))
			got, err := n.call(n.client())
			if !errors.Is(err, kind) || credential.ReasonOf(err) != credential.ReasonRoleNotPermitted {
				t.Errorf("the call ended with %v, want %v", err, kind)
			}
			want(t, got, dialed{ranked[0], 0})
		})
	}
}

// It ends the call also while others are asked.
func TestRefusalBesideSilence(t *testing.T) {
	in(t, func(t *testing.T, n *network) {
		ranked := n.brokers(3)
		n.mute(ranked[0])
		n.serve(ranked[1], refuse(credential.ErrDenied, credential.ReasonRoleNotPermitted))
		got, err := n.call(n.client())
		if !errors.Is(err, credential.ErrDenied) || n.took() != 250*time.Millisecond {
			t.Errorf("after %v the call ended with %v", n.took(), err)
		}
		want(t, got, dialed{ranked[0], 0}, dialed{ranked[1], 250 * time.Millisecond})
	})
}

// What is away for one broker is away for all, as a rule: who may have the session is asked, and while the budget lasts
// one more, for it may be their own node.
func TestSharedOutage(t *testing.T) {
	for reason, more := range map[credential.Reason]int{
		credential.ReasonSTSThrottled: 0, credential.ReasonSTSUnavailable: 1, credential.ReasonBaseCredential: 1, credential.ReasonAPIServerAway: 1,
	} {
		in(t, func(t *testing.T, n *network) {
			ranked := n.brokers(5)
			for _, at := range ranked {
				n.serve(at, refuse(credential.ErrUnavailable, reason))
			}
			c := n.client()
			for range more {
				got, err := n.call(c)
				unavailable(t, err, reason, "3 asked, 2 not")
				want(t, got, dialed{ranked[0], 0}, dialed{ranked[1], 0}, dialed{ranked[2], 0})
			}
			got, err := n.call(c)
			unavailable(t, err, reason, "2 asked, 3 not")
			want(t, got, dialed{ranked[0], 0}, dialed{ranked[1], 0})

			n.serve(ranked[1], answering(good()))
			_, err = n.call(c)
			succeeded(t, err)
		})
		in(t, func(t *testing.T, n *network) {
			ranked := n.brokers(5)
			n.serve(ranked[0], refuse(credential.ErrUnavailable, reason))
			n.serve(ranked[1], refuse(credential.ErrUnavailable, reason))
			n.serve(ranked[2], answering(good()))
			_, err := n.call(n.client())
			if more > 0 {
				succeeded(t, err)
			} else {
				unavailable(t, err, reason)
			}
		})
	}
}

// Nor is the outage a reason to look for other brokers, or to ask them because one is silent; so no hedge is spent on it.
func TestSharedOutageAmongFew(t *testing.T) {
	throttled := refuse(credential.ErrUnavailable, credential.ReasonSTSThrottled)
	in(t, func(t *testing.T, n *network) {
		n.serve(n.brokers(1)[0], throttled)
		_, err := n.call(n.client())
		unavailable(t, err, credential.ReasonSTSThrottled)
		if n.lookups != 1 {
			t.Errorf("%d look-ups", n.lookups)
		}
	})
	in(t, func(t *testing.T, n *network) {
		ranked := n.brokers(3)
		n.mute(ranked[0])
		n.serve(ranked[1], throttled)
		n.serve(ranked[2], answering(good()))
		c := n.client()
		for _, after := range []time.Duration{250 * time.Millisecond, 2500 * time.Millisecond} {
			got, err := n.call(c)
			unavailable(t, err, credential.ReasonSTSThrottled)
			want(t, got, dialed{ranked[0], 0}, dialed{ranked[1], after})
		}
	})
}

// The second is asked while the first is silent, and whoever answers first is believed.
func TestHedge(t *testing.T) {
	in(t, func(t *testing.T, n *network) {
		ranked := n.brokers(5)
		n.mute(ranked[0])
		n.serve(ranked[1], answering(good()))
		got, err := n.call(n.client())
		succeeded(t, err)
		want(t, got, dialed{ranked[0], 0}, dialed{ranked[1], 250 * time.Millisecond})
	})
	in(t, func(t *testing.T, n *network) {
		ranked := n.brokers(5)
		n.serve(ranked[0], slow(400*time.Millisecond))
		second := n.serve(ranked[1], slow(400*time.Millisecond))
		_, err := n.call(n.client())
		succeeded(t, err)
		if n.took() != 400*time.Millisecond {
			t.Errorf("the call took %v", n.took())
		}
		synctest.Wait()
		if second.asked.Load() != 1 || second.open.Load() != 0 {
			t.Errorf("the second was asked %d times, and %d connections to it are open", second.asked.Load(), second.open.Load())
		}
	})
}

// More than two are asked with more patience, and all within the time of one call. No budget is spent on them: those
// that nobody reaches are not slow.
func TestSilenceOfAll(t *testing.T) {
	in(t, func(t *testing.T, n *network) {
		ranked := n.brokers(20)
		n.mute(ranked...)
		c := n.client()
		for _, second := range []time.Duration{250 * time.Millisecond, 2500 * time.Millisecond} {
			got, err := n.call(c)
			unavailable(t, err, credential.ReasonBrokerUnreachable, "no answer: context deadline exceeded", ranked[0].String())
			if n.took() != client.CallTimeout {
				t.Errorf("the call took %v, want %v", n.took(), client.CallTimeout)
			}
			all := []dialed{{ranked[0], 0}}
			for after := second; after < client.CallTimeout; after += time.Second {
				all = append(all, dialed{ranked[len(all)], after})
			}
			want(t, got, all...)
		}
	})
}

// Brokers that have taken the call wait for something that others would wait for as well, and have STS fetch again.
func TestSlownessOfAll(t *testing.T) {
	in(t, func(t *testing.T, n *network) {
		ranked := n.brokers(5)
		for _, at := range ranked {
			n.serve(at, slow(9*time.Second))
		}
		got, err := n.call(n.client())
		succeeded(t, err)
		want(t, got, dialed{ranked[0], 0}, dialed{ranked[1], 250 * time.Millisecond})
	})
	in(t, func(t *testing.T, n *network) { // until it fails
		ranked := n.brokers(5)
		n.serve(ranked[0], func(context.Context) (*brokerpb.GetCredentialsResponse, error) {
			time.Sleep(5 * time.Second)
			return nil, status.Error(codes.Unavailable, "the broker has gone")
		})
		n.mute(ranked[1])
		n.serve(ranked[2], answering(good()))
		got, err := n.call(n.client())
		succeeded(t, err)
		want(t, got, dialed{ranked[0], 0}, dialed{ranked[1], 250 * time.Millisecond}, dialed{ranked[2], 5 * time.Second})
	})
}

// Brokers that are slow for everybody are not asked twice by everybody; one that is silent still does not cost the call.
func TestBudget(t *testing.T) {
	in(t, func(t *testing.T, n *network) {
		ranked := n.brokers(5)
		n.serve(ranked[1], answering(good()))
		c := n.client()
		first := func() time.Duration {
			n.mute(ranked[0])
			got, err := n.call(c)
			succeeded(t, err)
			if len(got) != 2 {
				t.Fatalf("dialed %v", got)
			}
			return got[1].After
		}
		hedges := func() (count int) {
			for first() == 250*time.Millisecond {
				count++
			}
			return count
		}
		answered := func(calls int) {
			n.serve(ranked[0], answering(good()))
			for range calls {
				_, err := n.call(c)
				succeeded(t, err)
			}
		}
		if got := hedges(); got != 1 {
			t.Errorf("%d hedges in a row, want 1", got)
		}
		if after := first(); after != 2500*time.Millisecond {
			t.Errorf("without budget, the second is asked after %v", after)
		}
		answered(3)
		if got := hedges(); got != 0 {
			t.Errorf("%d hedges after three answers", got)
		}
		answered(1)
		if got := hedges(); got != 1 {
			t.Errorf("%d hedges after four answers, want 1", got)
		}
		answered(100)
		if got := hedges(); got != 1 {
			t.Errorf("%d hedges after a long time, want 1", got)
		}
	})
}

// The error is the one that helps most, whoever said it.
func TestErrorThatTellsMost(t *testing.T) {
	throttled := refuse(credential.ErrUnavailable, credential.ReasonSTSThrottled)
	leaving := refuse(credential.ErrUnavailable, credential.ReasonShuttingDown)
	audit := refuse(credential.ErrUnavailable, credential.ReasonAuditUnavailable)
	broken := refuse(nil, credential.ReasonInternal)
	for name, tt := range map[string]struct {
		answers [2]func(context.Context) (*brokerpb.GetCredentialsResponse, error)
		reason  credential.Reason
		told    int
	}{
		"no connection, reason":  {[2]func(context.Context) (*brokerpb.GetCredentialsResponse, error){nil, throttled}, credential.ReasonSTSThrottled, 1},
		"reason, no connection":  {[2]func(context.Context) (*brokerpb.GetCredentialsResponse, error){throttled, nil}, credential.ReasonSTSThrottled, 0},
		"two reasons":            {[2]func(context.Context) (*brokerpb.GetCredentialsResponse, error){audit, throttled}, credential.ReasonAuditUnavailable, 0},
		"leaving, reason":        {[2]func(context.Context) (*brokerpb.GetCredentialsResponse, error){leaving, throttled}, credential.ReasonSTSThrottled, 1},
		"no connection, leaving": {[2]func(context.Context) (*brokerpb.GetCredentialsResponse, error){nil, leaving}, credential.ReasonShuttingDown, 1},
		"no connection, broken":  {[2]func(context.Context) (*brokerpb.GetCredentialsResponse, error){nil, broken}, credential.ReasonInternal, 1},
		"no connection":          {[2]func(context.Context) (*brokerpb.GetCredentialsResponse, error){nil, nil}, credential.ReasonBrokerUnreachable, 0},
	} {
		t.Run(name, func(t *testing.T) {
			in(t, func(t *testing.T, n *network) {
				ranked := n.brokers(2)
				for i, answer := range tt.answers {
					if answer != nil {
						n.serve(ranked[i], answer)
					}
				}
				_, err := n.call(n.client())
				unavailable(t, err, tt.reason, "2 asked, 0 not", ranked[tt.told].String(), host)
			})
		})
	}
}

// All attempts are in one trace, whose id the error has.
func TestOneTraceOfAllAttempts(t *testing.T) {
	in(t, func(t *testing.T, n *network) {
		var seen []string
		for _, at := range n.brokers(3) {
			n.serve(at, func(ctx context.Context) (*brokerpb.GetCredentialsResponse, error) {
				seen = append(seen, metadata.ValueFromIncomingContext(ctx, "traceparent")...)
				return nil, brokerpb.ToStatus(errors.New("broken")).Err()
			})
		}
		_, err := n.call(n.client())
		traced, ok := errors.AsType[interface {
			error
			TraceID() string
		}](err)
		if len(seen) != 3 || len(slices.Compact(seen)) != 1 || !ok || !strings.Contains(seen[0], traced.TraceID()) {
			t.Errorf("traces %q, error %v", seen, err)
		}
	})
}

// A broker that has the call, and waits for something, was reached.
func TestTakenAndNotAnswered(t *testing.T) {
	in(t, func(t *testing.T, n *network) {
		for _, addr := range n.brokers(2) {
			n.serve(addr, slow(time.Minute))
		}
		_, err := n.call(n.client())
		unavailable(t, err, credential.ReasonInternal, "has not answered in time", "no answer: ")
		if n.took() != client.CallTimeout {
			t.Errorf("the call took %v", n.took())
		}
	})
}

// The caller's context ends all of it.
func TestCallerLeaves(t *testing.T) {
	in(t, func(t *testing.T, n *network) {
		n.mute(n.brokers(5)...)
		ctx, cancel := context.WithTimeout(t.Context(), 700*time.Millisecond)
		defer cancel()
		_, err := n.client().Credentials(ctx)
		unavailable(t, err, credential.ReasonBrokerUnreachable, "2 asked, 3 not")
		if n.took() != 700*time.Millisecond {
			t.Errorf("the call took %v", n.took())
		}
	})
}

// TestOrder: whatever addresses DNS gives, in whatever order, as often as it likes, each broker is asked once and in
// the order of its rank in what is left of them.
func TestOrder(t *testing.T) {
	for seed := range uint64(20) {
		in(t, func(t *testing.T, n *network) {
			random := rand.New(rand.NewPCG(seed, 1))
			one := map[netip.Addr]bool{}
			var said []netip.Addr
			family := 0
			for range 1 + random.IntN(250) {
				v4 := netip.AddrFrom4([4]byte{10, 0, 0, byte(random.IntN(250))})
				v6 := netip.AddrFrom16([16]byte{0: 0xfd, 15: byte(random.IntN(250))})
				switch a := random.IntN(3); {
				case seed%2 == 0 || a == 0:
					said = append(said, v6)
				case a == 1:
					said, family = append(said, v4), 4
				default:
					said, family = append(said, netip.AddrFrom16(v4.As16())), 4
				}
			}
			for _, a := range said {
				if a = a.Unmap(); a.Is4() == (family == 4) {
					one[a] = true
				}
			}
			var set []netip.Addr
			for a := range one {
				set = append(set, a)
			}
			slices.SortFunc(set, netip.Addr.Compare)
			ranked := placement.Rank(key, set[:min(len(set), 64)])
			n.resolve(said...)
			got, err := n.call(n.client())
			unavailable(t, err, credential.ReasonBrokerUnreachable, fmt.Sprintf("%d asked, 0 not", len(ranked)))
			var order []netip.Addr
			for _, d := range got {
				order = append(order, d.Addr)
			}
			if !slices.Equal(order, ranked) {
				t.Errorf("seed %d: of %v\nasked %v\nwant  %v", seed, said, order, ranked)
			}
		})
	}
}

func TestLookupFails(t *testing.T) {
	in(t, func(t *testing.T, n *network) {
		n.unresolve()
		c := n.client()
		got, err := n.call(c)
		unavailable(t, err, credential.ReasonBrokerUnreachable, host, "DNS", "server misbehaving")
		want(t, got)

		n.resolve()
		_, err = n.call(c)
		unavailable(t, err, credential.ReasonBrokerUnreachable, host, "DNS", "there is none")

		// What was found once is good for the time of an outage.
		ranked := n.brokers(4)
		n.serve(ranked[0], answering(good()))
		for _, fail := range []func(){func() {}, n.unresolve, func() { n.resolve() }} {
			fail()
			got, err = n.call(c)
			succeeded(t, err)
			want(t, got, dialed{ranked[0], 0})
		}
	})
}

// A DNS that is silent is given up.
func TestLookupHangs(t *testing.T) {
	in(t, func(t *testing.T, n *network) {
		ranked := n.brokers(4)
		n.serve(ranked[0], answering(good()))
		var hangs bool
		c := n.client(func(cfg *client.Config) {
			cfg.Lookup = func(ctx context.Context, family, name string) ([]netip.Addr, error) {
				if hangs {
					<-ctx.Done()
					return nil, ctx.Err()
				}
				return n.lookup(ctx, family, name)
			}
		})
		_, err := n.call(c)
		succeeded(t, err)
		hangs = true
		got, err := n.call(c)
		succeeded(t, err)
		want(t, got, dialed{ranked[0], 3 * time.Second})
		time.Sleep(lookupEnds)
	})
}

// When all brokers that were known have gone, they are looked up once more.
func TestNewBrokersAreFound(t *testing.T) {
	before, after := netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("10.0.0.2")
	for name, tt := range map[string]struct {
		mute bool
		at   time.Duration
	}{"failed": {}, "silent": {true, 2500 * time.Millisecond}} {
		t.Run(name, func(t *testing.T) {
			in(t, func(t *testing.T, n *network) {
				if tt.mute {
					n.mute(before)
				}
				n.serve(after, answering(good()))
				n.dns = func() ([]netip.Addr, error) {
					if n.lookups == 1 {
						return []netip.Addr{before}, nil
					}
					return []netip.Addr{before, after}, nil
				}
				got, err := n.call(n.client())
				succeeded(t, err)
				want(t, got, dialed{before, 0}, dialed{after, tt.at})
			})
		})
	}
	t.Run("from before", func(t *testing.T) {
		in(t, func(t *testing.T, n *network) {
			ranked := n.brokers(10)
			n.serve(ranked[0], answering(good()))
			c := n.client()
			_, err := n.call(c)
			succeeded(t, err)

			delete(n.nodes, ranked[0])
			found := netip.MustParseAddr("10.9.9.9")
			n.serve(found, answering(good()))
			n.dns = func() ([]netip.Addr, error) {
				if n.lookups == 2 {
					return nil, errors.New("away")
				}
				return []netip.Addr{found}, nil
			}
			got, err := n.call(c)
			succeeded(t, err)
			if len(got) != 11 || got[10].Addr != found {
				t.Errorf("dialed %v", got)
			}
		})
	})
}

// lookupEnds is longer than any look-up runs.
const lookupEnds = 31 * time.Second

// TestNothingGoesOn: a call that has its answer ends at once. A look-up that it began continues, and ends by itself.
func TestNothingGoesOn(t *testing.T) {
	in(t, func(t *testing.T, n *network) {
		n.serve(n.brokers(1)[0], slow(3*time.Second))
		var running atomic.Int32
		_, err := n.call(n.client(func(cfg *client.Config) {
			cfg.Lookup = func(ctx context.Context, family, name string) ([]netip.Addr, error) {
				if n.lookups == 0 {
					return n.lookup(ctx, family, name)
				}
				running.Add(1)
				defer running.Add(-1)
				<-ctx.Done()
				time.Sleep(time.Millisecond)
				return nil, ctx.Err()
			}
		}))
		succeeded(t, err)
		if n.took() != 3*time.Second || running.Load() == 0 {
			t.Errorf("the call took %v, and %d look-ups continue", n.took(), running.Load())
		}
		time.Sleep(lookupEnds)
		if running.Load() != 0 {
			t.Errorf("%d look-ups continue after %v", running.Load(), n.took())
		}
	})
}

// They are not looked up for ever, nor at all where there are many.
func TestOneMoreLookup(t *testing.T) {
	for count, lookups := range map[byte]int{1: 2, 3: 2, 4: 1} {
		in(t, func(t *testing.T, n *network) {
			n.brokers(count)
			got, err := n.call(n.client())
			unavailable(t, err, credential.ReasonBrokerUnreachable)
			if len(got) != int(count) || n.lookups != lookups {
				t.Errorf("of %d brokers %v were dialed after %d look-ups, want %d", count, got, n.lookups, lookups)
			}
		})
	}
}

// An address needs no look-up.
func TestLiteralTarget(t *testing.T) {
	for target, addr := range map[string]string{"10.0.0.1:9443": "10.0.0.1", "[fd00::1]:9443": "fd00::1"} {
		in(t, func(t *testing.T, n *network) {
			at := netip.MustParseAddr(addr)
			n.serve(at, answering(good()))
			c := n.client(func(cfg *client.Config) {
				cfg.Target, cfg.Lookup = target, nil
				cfg.TLS.ServerName = host
			})
			got, err := n.call(c)
			succeeded(t, err)
			want(t, got, dialed{at, 0})
		})
	}
}

// machines are brokers behind real sockets, at 127.0.0.2 and up, on one port.
func machines(t *testing.T, leaves ...*certstest.Leaf) (servers []*server, port string, lookup func(_ context.Context, family, name string) ([]netip.Addr, error)) {
	t.Helper()
	port = "0"
	var all []netip.Addr
	for i, leaf := range leaves {
		at := netip.AddrFrom4([4]byte{127, 0, 0, byte(2 + i)})
		all = append(all, at)
		var listener net.Listener
		var err error
		if leaf != nil {
			listener, err = net.Listen("tcp", net.JoinHostPort(at.String(), port))
			switch {
			case err != nil && i == 0:
				t.Skipf("not run: this system has one loopback address, and this needs several: %v", err)
			case err != nil:
				t.Fatal(err)
			}
			_, port, _ = net.SplitHostPort(listener.Addr().String())
		}
		s := &server{answer: answering(good())}
		servers = append(servers, s)
		if leaf != nil {
			s.serve(t, listener, serverTLS(leaf))
		}
	}
	return servers, port, func(_ context.Context, family, _ string) ([]netip.Addr, error) { return ofFamily(all, family), nil }
}

// TestEachBrokerIsVerified: a server that cannot prove the broker's name gets no token, whichever it is; and one that is
// there no longer is passed over.
func TestEachBrokerIsVerified(t *testing.T) {
	ca := certstest.NewCA(t)
	other, stranger := ca.Leaf("other.credence.svc"), certstest.NewCA(t).Leaf(host)
	servers, port, lookup := machines(t, other, stranger, nil, ca.Leaf("127.0.0.5"), ca.Leaf(host))
	for _, s := range servers[:4] {
		s.answer = func(context.Context) (*brokerpb.GetCredentialsResponse, error) {
			t.Error("the token was shown to a server that was not verified")
			return good(), nil
		}
	}
	tokenFile := filepath.Join(t.TempDir(), "token")
	writeToken(t, tokenFile, token)
	for k := range 8 {
		c, err := client.New(client.Config{
			Target: host + ":" + port, TokenFile: tokenFile, Lookup: lookup,
			TLS: &tls.Config{MinVersion: tls.VersionTLS13, RootCAs: ca.Pool()}, RoutingKey: policy.RoutingKey(fmt.Sprint(k)),
		})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := c.Credentials(t.Context()); err != nil {
			t.Error(err)
		}
	}
	// No connection outlives its call; a server notices the end of one a little later.
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
		var open int32
		for _, s := range servers {
			open += s.open.Load()
		}
		if open == 0 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("%d connections are still open", open)
		}
	}
	if servers[4].asked.Load() != 8 {
		t.Errorf("the broker was asked %d times, want 8", servers[4].asked.Load())
	}
}

// The name of the certificate is in the error when no server has proved it.
func TestNobodyIsVerified(t *testing.T) {
	ca := certstest.NewCA(t)
	other := ca.Leaf("other.credence.svc")
	_, port, lookup := machines(t, other, other)
	tokenFile := filepath.Join(t.TempDir(), "token")
	writeToken(t, tokenFile, token)
	c, err := client.New(client.Config{
		Target: host + ":" + port, TokenFile: tokenFile, Lookup: lookup, RoutingKey: key,
		TLS: &tls.Config{MinVersion: tls.VersionTLS13, RootCAs: ca.Pool()},
	})
	if err != nil {
		t.Fatal(err)
	}
	_, err = c.Credentials(t.Context())
	unavailable(t, err, credential.ReasonBrokerUnreachable, "other.credence.svc", "2 asked")
	if !regexp.MustCompile(`at 127\.0\.0\.[23] `).MatchString(err.Error()) {
		t.Errorf("the error %q does not say which broker it is of", err)
	}
}

// One wrong clock does not decide about a pod: a broker that says that the token has expired, or is not valid yet, is
// not believed before another one.
func TestWrongClockOfOneBroker(t *testing.T) {
	type answers []func(context.Context) (*brokerpb.GetCredentialsResponse, error)
	expired := refuse(credential.ErrUnauthenticated, credential.ReasonTokenExpired)
	early := refuse(credential.ErrUnavailable, credential.ReasonTokenEarly)
	away := refuse(credential.ErrUnavailable, credential.ReasonSTSUnavailable)
	lease := answering(good())
	for name, tt := range map[string]struct {
		answers answers // nil: nobody is there
		dialed  int
		kind    error // nil: a lease
		reason  credential.Reason
	}{
		"the first is ahead":                  {answers{expired, lease, lease}, 2, nil, ""},
		"the first is behind":                 {answers{early, lease, lease}, 2, nil, ""},
		"two are behind":                      {answers{early, early, lease}, 3, nil, ""},
		"one is ahead and one behind":         {answers{expired, early, lease}, 3, nil, ""},
		"two agree that it has expired":       {answers{expired, expired, lease}, 2, credential.ErrUnauthenticated, credential.ReasonTokenExpired},
		"two agree, past one that is gone":    {answers{expired, nil, expired}, 3, credential.ErrUnauthenticated, credential.ReasonTokenExpired},
		"one refuses after one that is ahead": {answers{expired, refuse(credential.ErrDenied, credential.ReasonRoleNotPermitted), lease}, 2, credential.ErrDenied, credential.ReasonRoleNotPermitted},
		"there is one only":                   {answers{expired}, 1, credential.ErrUnauthenticated, credential.ReasonTokenExpired},
		"the other one is gone":               {answers{expired, nil}, 2, credential.ErrUnavailable, credential.ReasonTokenExpired},
		"the other one cannot say":            {answers{expired, away}, 2, credential.ErrUnavailable, credential.ReasonTokenExpired},
		"all are behind":                      {answers{early, early}, 2, credential.ErrUnavailable, credential.ReasonTokenEarly},
	} {
		t.Run(name, func(t *testing.T) {
			in(t, func(t *testing.T, n *network) {
				for i, at := range n.brokers(byte(len(tt.answers))) {
					if tt.answers[i] != nil {
						n.serve(at, tt.answers[i])
					}
				}
				got, err := n.call(n.client())
				if len(got) != tt.dialed {
					t.Errorf("%d brokers were called, want %d", len(got), tt.dialed)
				}
				if (err == nil) != (tt.kind == nil) || tt.kind != nil && !errors.Is(err, tt.kind) || credential.ReasonOf(err) != tt.reason {
					t.Errorf("the call ended with %v (%s), want %v, %q", err, credential.ReasonOf(err), tt.kind, tt.reason)
				}
				if errors.Is(err, credential.ErrUnavailable) && errors.Is(err, credential.ErrUnauthenticated) {
					t.Errorf("the error %v is of two kinds", err)
				}
			})
		})
	}
}
