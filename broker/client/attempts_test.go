package client_test

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"maps"
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

// network is an in-memory DNS with one host, and the brokers at its addresses.
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

// dialed is one dialed connection: the address, and the time since the call began.
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

// brokers makes DNS return n addresses, and returns them in the order in which the client should call them.
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

// lookup counts A queries, because each look-up begins with one.
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

// serve runs a broker at an address. It checks the token of each call.
func (n *network) serve(at netip.Addr, respond func(context.Context) (*brokerpb.GetCredentialsResponse, error)) *server {
	s := &server{respond: func(ctx context.Context) (*brokerpb.GetCredentialsResponse, error) {
		if got := metadata.ValueFromIncomingContext(ctx, "authorization"); !slices.Equal(got, []string{"Bearer " + token}) {
			n.t.Errorf("the broker at %s got the authorization %q", at, got)
		}
		return respond(ctx)
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

// mute makes addresses accept connections but never respond.
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

// call calls Credentials, and returns what was dialed meanwhile.
func (n *network) call(c *client.Client) ([]dialed, error) {
	n.mu.Lock()
	n.dialed, n.began = nil, time.Now()
	n.mu.Unlock()
	lease, err := c.Credentials(n.t.Context())
	if (err == nil) != (lease.AccessKeyID != "") {
		n.t.Errorf("lease %q was returned with error %v", lease.AccessKeyID, err)
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.dialed, err
}

func (n *network) took() time.Duration { return time.Since(n.began) }

func refuse(kind error, reason credential.Reason) func(context.Context) (*brokerpb.GetCredentialsResponse, error) {
	return func(context.Context) (*brokerpb.GetCredentialsResponse, error) {
		return nil, brokerpb.ToStatus(credential.Errorf(kind, reason, "the broker refuses with %s", reason)).Err()
	}
}

// slow responds after a time, unless the call ends first.
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

// unavailable checks the reason of an error, and that it contains the texts.
func unavailable(t *testing.T, err error, reason credential.Reason, texts ...string) {
	t.Helper()
	if !errors.Is(err, credential.ErrUnavailable) || credential.ReasonOf(err) != reason {
		t.Fatalf("error %v (%s), want reason %s of kind unavailable", err, credential.ReasonOf(err), reason)
	}
	for _, text := range texts {
		if !strings.Contains(err.Error(), text) {
			t.Errorf("error %q does not contain %q", err, text)
		}
	}
}

// in runs a test on a new network, in virtual time.
func in(t *testing.T, test func(t *testing.T, n *network)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) { test(t, newNetwork(t)) })
}

func TestFirstOwnerIsCalled(t *testing.T) {
	in(t, func(t *testing.T, n *network) {
		ranked := n.brokers(5)
		for _, at := range ranked {
			n.serve(at, responding(good()))
		}
		c := n.client()
		for range 3 {
			got, err := n.call(c)
			succeeded(t, err)
			want(t, got, dialed{ranked[0], 0})
		}
		if n.lookups != 3 {
			t.Errorf("%d look-ups in 3 calls, want 3", n.lookups)
		}
	})
}

// Without a routing key the order is random.
func TestNoRoutingKey(t *testing.T) {
	in(t, func(t *testing.T, n *network) {
		for _, at := range n.brokers(3) {
			n.serve(at, responding(good()))
		}
		c := n.client(func(cfg *client.Config) { cfg.RoutingKey = "" })
		called := map[netip.Addr]bool{}
		for range 60 { // the chance that one of three brokers is never first is 1 in 10^10
			got, err := n.call(c)
			succeeded(t, err)
			if len(got) != 1 {
				t.Fatalf("dialed %v", got)
			}
			called[got[0].Addr] = true
		}
		if len(called) != 3 {
			t.Errorf("only %v were called, want all 3", called)
		}
	})
}

// If a broker fails for a reason of its own and says nothing about the pod, the next one is called immediately.
func TestNextAtOnce(t *testing.T) {
	useless := good()
	useless.SecretAccessKey = ""
	for name, first := range map[string]func(context.Context) (*brokerpb.GetCredentialsResponse, error){
		"refused":       nil,
		"shutting down": refuse(credential.ErrUnavailable, credential.ReasonShuttingDown),
		"audit fails":   refuse(credential.ErrUnavailable, credential.ReasonAuditUnavailable),
		"internal":      refuse(nil, credential.ReasonInternal),
		"useless":       responding(useless),
	} {
		t.Run(name, func(t *testing.T) {
			in(t, func(t *testing.T, n *network) {
				ranked := n.brokers(5)
				if first != nil {
					n.serve(ranked[0], first)
					n.serve(ranked[1], first)
				}
				n.serve(ranked[2], responding(good()))
				got, err := n.call(n.client())
				succeeded(t, err)
				want(t, got, dialed{ranked[0], 0}, dialed{ranked[1], 0}, dialed{ranked[2], 0})
			})
		})
	}
}

// A refusal ends the call, because every broker would give the same one.
func TestRefusalEndsTheCall(t *testing.T) {
	for _, kind := range []error{credential.ErrDenied, credential.ErrInvalid, credential.ErrNotFound, credential.ErrUnauthenticated} {
		in(t, func(t *testing.T, n *network) {
			ranked := n.brokers(3)
			n.serve(ranked[0], refuse(kind, credential.ReasonRoleNotPermitted))
			n.serve(ranked[1], responding(good()))
			got, err := n.call(n.client())
			if !errors.Is(err, kind) || credential.ReasonOf(err) != credential.ReasonRoleNotPermitted {
				t.Errorf("error %v, want %v", err, kind)
			}
			want(t, got, dialed{ranked[0], 0})
		})
	}
}

// A refusal ends the call even if another broker has not responded.
func TestRefusalWhileAnotherHangs(t *testing.T) {
	in(t, func(t *testing.T, n *network) {
		ranked := n.brokers(3)
		n.mute(ranked[0])
		n.serve(ranked[1], refuse(credential.ErrDenied, credential.ReasonRoleNotPermitted))
		got, err := n.call(n.client())
		if !errors.Is(err, credential.ErrDenied) || n.took() != 250*time.Millisecond {
			t.Errorf("after %v the call returned %v", n.took(), err)
		}
		want(t, got, dialed{ranked[0], 0}, dialed{ranked[1], 250 * time.Millisecond})
	})
}

// If a dependency of all brokers is unavailable, only the owners are called, because they may have the session cached. One
// more is called while the hedge budget lasts, because perhaps only the owners' node fails.
func TestSharedOutage(t *testing.T) {
	for reason, more := range map[credential.Reason]int{
		credential.ReasonSTSThrottled: 0, credential.ReasonSTSUnavailable: 1, credential.ReasonBrokerCredentials: 1, credential.ReasonAPIServerUnavailable: 1,
	} {
		in(t, func(t *testing.T, n *network) {
			ranked := n.brokers(5)
			for _, at := range ranked {
				n.serve(at, refuse(credential.ErrUnavailable, reason))
			}
			c := n.client()
			for range more {
				got, err := n.call(c)
				unavailable(t, err, reason, "3 called, 2 not")
				want(t, got, dialed{ranked[0], 0}, dialed{ranked[1], 0}, dialed{ranked[2], 0})
			}
			got, err := n.call(c)
			unavailable(t, err, reason, "2 called, 3 not")
			want(t, got, dialed{ranked[0], 0}, dialed{ranked[1], 0})

			n.serve(ranked[1], responding(good()))
			_, err = n.call(c)
			succeeded(t, err)
		})
		in(t, func(t *testing.T, n *network) {
			ranked := n.brokers(5)
			n.serve(ranked[0], refuse(credential.ErrUnavailable, reason))
			n.serve(ranked[1], refuse(credential.ErrUnavailable, reason))
			n.serve(ranked[2], responding(good()))
			_, err := n.call(n.client())
			if more > 0 {
				succeeded(t, err)
			} else {
				unavailable(t, err, reason)
			}
		})
	}
}

// Throttling is no reason to look up more brokers, or to call more of them if one does not respond. No hedge is spent on
// it.
func TestSharedOutageAmongFew(t *testing.T) {
	throttled := refuse(credential.ErrUnavailable, credential.ReasonSTSThrottled)
	in(t, func(t *testing.T, n *network) {
		n.serve(n.brokers(1)[0], throttled)
		_, err := n.call(n.client())
		unavailable(t, err, credential.ReasonSTSThrottled)
		if n.lookups != 1 {
			t.Errorf("%d look-ups, want 1", n.lookups)
		}
	})
	in(t, func(t *testing.T, n *network) {
		ranked := n.brokers(3)
		n.mute(ranked[0])
		n.serve(ranked[1], throttled)
		n.serve(ranked[2], responding(good()))
		c := n.client()
		for _, after := range []time.Duration{250 * time.Millisecond, 2500 * time.Millisecond} {
			got, err := n.call(c)
			unavailable(t, err, credential.ReasonSTSThrottled)
			want(t, got, dialed{ranked[0], 0}, dialed{ranked[1], after})
		}
	})
}

// The second broker is called if the first does not respond, and the first response counts.
func TestHedge(t *testing.T) {
	in(t, func(t *testing.T, n *network) {
		ranked := n.brokers(5)
		n.mute(ranked[0])
		n.serve(ranked[1], responding(good()))
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
		if second.calls.Load() != 1 || second.open.Load() != 0 {
			t.Errorf("the second broker was called %d times and has %d open connections, want 1 and 0", second.calls.Load(), second.open.Load())
		}
	})
}

// If no broker responds, the third and later ones are called after longer pauses, all within one call. They use no budget:
// brokers that are down are not slow.
func TestAllHang(t *testing.T) {
	in(t, func(t *testing.T, n *network) {
		ranked := n.brokers(20)
		n.mute(ranked...)
		c := n.client()
		for _, second := range []time.Duration{250 * time.Millisecond, 2500 * time.Millisecond} {
			got, err := n.call(c)
			unavailable(t, err, credential.ReasonBrokerUnreachable, "no response: context deadline exceeded", ranked[0].String())
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

// Brokers that have accepted the call wait for something. Other brokers would wait too, and fetch once more from STS.
func TestAllSlow(t *testing.T) {
	in(t, func(t *testing.T, n *network) {
		ranked := n.brokers(5)
		for _, at := range ranked {
			n.serve(at, slow(9*time.Second))
		}
		got, err := n.call(n.client())
		succeeded(t, err)
		want(t, got, dialed{ranked[0], 0}, dialed{ranked[1], 250 * time.Millisecond})
	})
	in(t, func(t *testing.T, n *network) { // until one of them fails
		ranked := n.brokers(5)
		n.serve(ranked[0], func(context.Context) (*brokerpb.GetCredentialsResponse, error) {
			time.Sleep(5 * time.Second)
			return nil, status.Error(codes.Unavailable, "the broker has crashed")
		})
		n.mute(ranked[1])
		n.serve(ranked[2], responding(good()))
		got, err := n.call(n.client())
		succeeded(t, err)
		want(t, got, dialed{ranked[0], 0}, dialed{ranked[1], 250 * time.Millisecond}, dialed{ranked[2], 5 * time.Second})
	})
}

// If brokers are slow for all sidecars, not every call is hedged. A broker that hangs still does not use up the call.
func TestBudget(t *testing.T) {
	in(t, func(t *testing.T, n *network) {
		ranked := n.brokers(5)
		n.serve(ranked[1], responding(good()))
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
		unhedged := func(calls int) {
			n.serve(ranked[0], responding(good()))
			for range calls {
				_, err := n.call(c)
				succeeded(t, err)
			}
		}
		if got := hedges(); got != 1 {
			t.Errorf("%d hedges in a row, want 1", got)
		}
		if after := first(); after != 2500*time.Millisecond {
			t.Errorf("without budget, the second broker was called after %v, want 2.5s", after)
		}
		unhedged(3)
		if got := hedges(); got != 0 {
			t.Errorf("%d hedges after three calls without one, want 0", got)
		}
		unhedged(1)
		if got := hedges(); got != 1 {
			t.Errorf("%d hedges after four calls without one, want 1", got)
		}
		unhedged(100)
		if got := hedges(); got != 1 {
			t.Errorf("%d hedges after many calls without one, want 1", got)
		}
	})
}

// The error is the one with the most detail.
func TestErrorWithMostDetail(t *testing.T) {
	throttled := refuse(credential.ErrUnavailable, credential.ReasonSTSThrottled)
	leaving := refuse(credential.ErrUnavailable, credential.ReasonShuttingDown)
	audit := refuse(credential.ErrUnavailable, credential.ReasonAuditUnavailable)
	broken := refuse(nil, credential.ReasonInternal)
	for name, tt := range map[string]struct {
		responses [2]func(context.Context) (*brokerpb.GetCredentialsResponse, error)
		reason    credential.Reason
		from      int // index of the broker in the error
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
				for i, respond := range tt.responses {
					if respond != nil {
						n.serve(ranked[i], respond)
					}
				}
				_, err := n.call(n.client())
				unavailable(t, err, tt.reason, "2 called, 0 not", ranked[tt.from].String(), host)
			})
		})
	}
}

// All attempts are in one trace, and the error has its ID.
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

// A broker that has accepted the call was reachable.
func TestAcceptedWithoutResponse(t *testing.T) {
	in(t, func(t *testing.T, n *network) {
		for _, addr := range n.brokers(2) {
			n.serve(addr, slow(time.Minute))
		}
		_, err := n.call(n.client())
		unavailable(t, err, credential.ReasonInternal, "did not respond in time", "no response: ")
		if n.took() != client.CallTimeout {
			t.Errorf("the call took %v", n.took())
		}
	})
}

// The caller's context ends the call.
func TestCallerCancels(t *testing.T) {
	in(t, func(t *testing.T, n *network) {
		n.mute(n.brokers(5)...)
		ctx, cancel := context.WithTimeout(t.Context(), 700*time.Millisecond)
		defer cancel()
		_, err := n.client().Credentials(ctx)
		unavailable(t, err, credential.ReasonBrokerUnreachable, "2 called, 3 not")
		if n.took() != 700*time.Millisecond {
			t.Errorf("the call took %v", n.took())
		}
	})
}

// TestOrder: whatever addresses DNS returns, in any order, with any duplicates, each broker is called once, in the order of
// its rank.
func TestOrder(t *testing.T) {
	for seed := range uint64(20) {
		in(t, func(t *testing.T, n *network) {
			random := rand.New(rand.NewPCG(seed, 1))
			set := map[netip.Addr]bool{}
			var returned []netip.Addr
			family := 0
			for range 1 + random.IntN(250) {
				v4 := netip.AddrFrom4([4]byte{10, 0, 0, byte(random.IntN(250))})
				v6 := netip.AddrFrom16([16]byte{0: 0xfd, 15: byte(random.IntN(250))})
				switch a := random.IntN(3); {
				case seed%2 == 0 || a == 0:
					returned = append(returned, v6)
				case a == 1:
					returned, family = append(returned, v4), 4
				default:
					returned, family = append(returned, netip.AddrFrom16(v4.As16())), 4
				}
			}
			for _, a := range returned {
				if a = a.Unmap(); a.Is4() == (family == 4) {
					set[a] = true
				}
			}
			addresses := slices.SortedFunc(maps.Keys(set), netip.Addr.Compare)
			ranked := placement.Rank(key, addresses[:min(len(addresses), 64)])
			n.resolve(returned...)
			got, err := n.call(n.client())
			unavailable(t, err, credential.ReasonBrokerUnreachable, fmt.Sprintf("%d called, 0 not", len(ranked)))
			var order []netip.Addr
			for _, d := range got {
				order = append(order, d.Addr)
			}
			if !slices.Equal(order, ranked) {
				t.Errorf("seed %d: DNS returned %v\ncalled %v\nwant   %v", seed, returned, order, ranked)
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
		unavailable(t, err, credential.ReasonBrokerUnreachable, host, "DNS", "no such record")

		// After a successful look-up, calls work during a DNS outage.
		ranked := n.brokers(4)
		n.serve(ranked[0], responding(good()))
		for _, fail := range []func(){func() {}, n.unresolve, func() { n.resolve() }} {
			fail()
			got, err = n.call(c)
			succeeded(t, err)
			want(t, got, dialed{ranked[0], 0})
		}
	})
}

// A look-up that hangs does not use up the call.
func TestLookupHangs(t *testing.T) {
	in(t, func(t *testing.T, n *network) {
		ranked := n.brokers(4)
		n.serve(ranked[0], responding(good()))
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

// If no known broker responds, the brokers are looked up once more.
func TestNewBrokersAreFound(t *testing.T) {
	before, after := netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("10.0.0.2")
	for name, tt := range map[string]struct {
		mute bool
		at   time.Duration
	}{"failed": {}, "hanging": {true, 2500 * time.Millisecond}} {
		t.Run(name, func(t *testing.T) {
			in(t, func(t *testing.T, n *network) {
				if tt.mute {
					n.mute(before)
				}
				n.serve(after, responding(good()))
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
	t.Run("known from an earlier call", func(t *testing.T) {
		in(t, func(t *testing.T, n *network) {
			ranked := n.brokers(10)
			n.serve(ranked[0], responding(good()))
			c := n.client()
			_, err := n.call(c)
			succeeded(t, err)

			delete(n.nodes, ranked[0])
			found := netip.MustParseAddr("10.9.9.9")
			n.serve(found, responding(good()))
			n.dns = func() ([]netip.Addr, error) {
				if n.lookups == 2 {
					return nil, errors.New("unavailable")
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

// lookupEnds is longer than any look-up.
const lookupEnds = 31 * time.Second

// TestNothingContinues: a finished call ends immediately. Only its look-up continues, until its own limit.
func TestNothingContinues(t *testing.T) {
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

// There is only one more look-up, and none if there are many brokers.
func TestOneMoreLookup(t *testing.T) {
	for count, lookups := range map[byte]int{1: 2, 3: 2, 4: 1} {
		in(t, func(t *testing.T, n *network) {
			n.brokers(count)
			got, err := n.call(n.client())
			unavailable(t, err, credential.ReasonBrokerUnreachable)
			if len(got) != int(count) || n.lookups != lookups {
				t.Errorf("of %d brokers %v were dialed after %d look-ups, want all and %d", count, got, n.lookups, lookups)
			}
		})
	}
}

// An IP address as target needs no look-up.
func TestLiteralTarget(t *testing.T) {
	for target, addr := range map[string]string{"10.0.0.1:9443": "10.0.0.1", "[fd00::1]:9443": "fd00::1"} {
		in(t, func(t *testing.T, n *network) {
			at := netip.MustParseAddr(addr)
			n.serve(at, responding(good()))
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

// machines runs brokers behind real sockets, at 127.0.0.2 and higher, on one port. A nil leaf leaves its address unused.
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
				t.Skipf("not run: this system has only one loopback address, and the test needs several: %v", err)
			case err != nil:
				t.Fatal(err)
			}
			_, port, _ = net.SplitHostPort(listener.Addr().String())
		}
		s := &server{respond: responding(good())}
		servers = append(servers, s)
		if leaf != nil {
			s.serve(t, listener, serverTLS(leaf))
		}
	}
	return servers, port, func(_ context.Context, family, _ string) ([]netip.Addr, error) { return ofFamily(all, family), nil }
}

// TestEachBrokerIsVerified: the client sends no token to a server that cannot prove the broker's name, and skips an
// address without a server.
func TestEachBrokerIsVerified(t *testing.T) {
	ca := certstest.NewCA(t)
	other, stranger := ca.Leaf("other.credence.svc"), certstest.NewCA(t).Leaf(host)
	servers, port, lookup := machines(t, other, stranger, nil, ca.Leaf("127.0.0.5"), ca.Leaf(host))
	for _, s := range servers[:4] {
		s.respond = func(context.Context) (*brokerpb.GetCredentialsResponse, error) {
			t.Error("the token was sent to an unverified server")
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
	// Each connection is closed with its call. The server notices that a little later.
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
	if servers[4].calls.Load() != 8 {
		t.Errorf("the broker was called %d times, want 8", servers[4].calls.Load())
	}
}

// If no server proves the name, the error contains the name in the certificate.
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
	unavailable(t, err, credential.ReasonBrokerUnreachable, "other.credence.svc", "2 called")
	if !regexp.MustCompile(`at 127\.0\.0\.[23] `).MatchString(err.Error()) {
		t.Errorf("error %q does not contain the broker's address", err)
	}
}

// One broker with a wrong clock does not decide about a pod. If it says that the token has expired, or is not valid yet,
// another broker must confirm it.
func TestWrongClockOfOneBroker(t *testing.T) {
	type responses []func(context.Context) (*brokerpb.GetCredentialsResponse, error)
	expired := refuse(credential.ErrUnauthenticated, credential.ReasonTokenExpired)
	early := refuse(credential.ErrUnavailable, credential.ReasonTokenEarly)
	unavailableSTS := refuse(credential.ErrUnavailable, credential.ReasonSTSUnavailable)
	lease := responding(good())
	for name, tt := range map[string]struct {
		responses responses // nil: no broker at this address
		dialed    int
		kind      error // nil: a lease
		reason    credential.Reason
	}{
		"the first clock is ahead":              {responses{expired, lease, lease}, 2, nil, ""},
		"the first clock is behind":             {responses{early, lease, lease}, 2, nil, ""},
		"two clocks are behind":                 {responses{early, early, lease}, 3, nil, ""},
		"one clock is ahead and one behind":     {responses{expired, early, lease}, 3, nil, ""},
		"two brokers agree":                     {responses{expired, expired, lease}, 2, credential.ErrUnauthenticated, credential.ReasonTokenExpired},
		"two brokers agree, one is down":        {responses{expired, nil, expired}, 3, credential.ErrUnauthenticated, credential.ReasonTokenExpired},
		"the second refuses for another reason": {responses{expired, refuse(credential.ErrDenied, credential.ReasonRoleNotPermitted), lease}, 2, credential.ErrDenied, credential.ReasonRoleNotPermitted},
		"there is only one broker":              {responses{expired}, 1, credential.ErrUnauthenticated, credential.ReasonTokenExpired},
		"the second broker is down":             {responses{expired, nil}, 2, credential.ErrUnavailable, credential.ReasonTokenExpired},
		"the second broker fails":               {responses{expired, unavailableSTS}, 2, credential.ErrUnavailable, credential.ReasonTokenExpired},
		"all clocks are behind":                 {responses{early, early}, 2, credential.ErrUnavailable, credential.ReasonTokenEarly},
	} {
		t.Run(name, func(t *testing.T) {
			in(t, func(t *testing.T, n *network) {
				for i, at := range n.brokers(byte(len(tt.responses))) {
					if tt.responses[i] != nil {
						n.serve(at, tt.responses[i])
					}
				}
				got, err := n.call(n.client())
				if len(got) != tt.dialed {
					t.Errorf("%d brokers were called, want %d", len(got), tt.dialed)
				}
				if (err == nil) != (tt.kind == nil) || tt.kind != nil && !errors.Is(err, tt.kind) || credential.ReasonOf(err) != tt.reason {
					t.Errorf("error %v (%s), want %v, %q", err, credential.ReasonOf(err), tt.kind, tt.reason)
				}
				if errors.Is(err, credential.ErrUnavailable) && errors.Is(err, credential.ErrUnauthenticated) {
					t.Errorf("error %v is of two kinds", err)
				}
			})
		})
	}
}
