package client_test

import (
	"context"
	"crypto/tls"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/credence-iam/credence/broker/client"
	"github.com/credence-iam/credence/broker/client/dnstest"
	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/certs"
	"github.com/credence-iam/credence/certs/certstest"
)

const fullName = host + ".cluster.local."

var (
	v4 = netip.MustParseAddr("10.0.0.1")
	v6 = netip.MustParseAddr("fd00::1")
)

// insideEnv is set in the process with its own resolv.conf, to the path of that file.
const insideEnv = "CREDENCE_TEST_RESOLV_CONF"

// init makes package net read resolv.conf outside a bubble. Otherwise the package's state of the file would belong to the
// bubble.
func init() {
	if os.Getenv(insideEnv) != "" {
		return // The file is not mounted yet.
	}
	_, _ = (&net.Resolver{PreferGo: true}).LookupNetIP(context.Background(), "ip4", "localhost") //nolint:forbidigo // there is no caller
}

// odd and even drop every second query.
func odd(n int, _ dnstest.Query) dnstest.Treatment  { return dnstest.Treatment{Drop: n%2 == 1} }
func even(n int, _ dnstest.Query) dnstest.Treatment { return dnstest.Treatment{Drop: n%2 == 0} }

func slowly(int, dnstest.Query) dnstest.Treatment {
	return dnstest.Treatment{After: 1100 * time.Millisecond}
}

// dropping drops the queries of one type.
func dropping(which string) func(int, dnstest.Query) dnstest.Treatment {
	return func(_ int, q dnstest.Query) dnstest.Treatment { return dnstest.Treatment{Drop: q.Type == which} }
}

// TestResolvers: within one call, the client finds the address with good and bad resolvers, with as few queries as possible.
func TestResolvers(t *testing.T) {
	both, six := []netip.Addr{v4, v6}, []netip.Addr{v6}
	for name, tt := range map[string]struct {
		has     []netip.Addr
		treat   func(int, dnstest.Query) dnstest.Treatment
		want    netip.Addr
		queries string // empty: any number
	}{
		"ordinary":                       {both, nil, v4, "A"},
		"drops AAAA":                     {both, dropping("AAAA"), v4, "A"},
		"drops A":                        {both, dropping("A"), v6, "A AAAA"},
		"drops the first of two":         {both, odd, v6, "A AAAA"},
		"drops the first of two, one A":  {[]netip.Addr{v4}, odd, v4, ""},
		"drops the second of two, one A": {[]netip.Addr{v4}, even, v4, "A"},
		"takes 1.1 s":                    {both, slowly, v4, "A AAAA"},
		"AAAA arrives first": {both, func(_ int, q dnstest.Query) dnstest.Treatment {
			return dnstest.Treatment{After: map[string]time.Duration{"A": 800 * time.Millisecond}[q.Type]}
		}, v4, "A AAAA"},
		"IPv6 only":              {six, nil, v6, "A AAAA"},
		"IPv6 only, takes 1.1 s": {six, slowly, v6, "A AAAA"},
		"IPv6 only, drops A":     {six, dropping("A"), v6, "A AAAA"},
		"truncates": {both, func(int, dnstest.Query) dnstest.Treatment {
			return dnstest.Treatment{Truncated: true}
		}, v4, "A A"},
		"fails at first": {both, func(n int, q dnstest.Query) dnstest.Treatment {
			return dnstest.Treatment{Fails: n < 8 && q.Type == "A", Drop: q.Type == "AAAA"}
		}, v4, ""},
		"fails for A": {both, func(_ int, q dnstest.Query) dnstest.Treatment {
			return dnstest.Treatment{Fails: q.Type == "A"}
		}, v6, ""},
	} {
		t.Run(name, func(t *testing.T) {
			in(t, func(t *testing.T, n *network) {
				dns := dnstest.New(map[string][]netip.Addr{fullName: tt.has}, tt.treat)
				n.serve(tt.want, responding(good()))
				got, err := n.call(n.client(func(cfg *client.Config) {
					cfg.DNSName, cfg.Lookup = fullName, dns.LookupInMemory
				}))
				succeeded(t, err)
				if len(got) != 1 || got[0].Addr != tt.want {
					t.Errorf("dialed %v, want %v", got, tt.want)
				}
				checkQueries(t, dns, tt.queries, fullName)
				time.Sleep(lookupEnds)
			})
		})
	}
}

// checkQueries checks the types of the queries, and that all are for one name.
func checkQueries(t *testing.T, dns *dnstest.Server, want, name string) {
	t.Helper()
	var types []string
	for _, q := range dns.Queries() {
		types = append(types, q.Type)
		if q.Name != name {
			t.Errorf("%q was looked up, want only %q", q.Name, name)
		}
	}
	if got := strings.Join(types, " "); want != "" && got != want {
		t.Errorf("queries %q, want %q", got, want)
	}
}

// TestFullNameIsWrong: if the full name does not exist, because the cluster has another domain, the host is looked up.
// After the full name was found once, only it is looked up.
func TestFullNameIsWrong(t *testing.T) {
	in(t, func(t *testing.T, n *network) {
		records := map[string][]netip.Addr{host + ".": {v4}}
		dns := dnstest.New(records, nil)
		n.serve(v4, responding(good()))
		c := n.client(func(cfg *client.Config) { cfg.DNSName, cfg.Lookup = fullName, dns.LookupInMemory })
		_, err := n.call(c)
		succeeded(t, err)

		delete(records, host+".")
		records[fullName] = []netip.Addr{v4}
		_, err = n.call(c)
		succeeded(t, err)
		delete(records, fullName)
		before := len(dns.Queries())
		_, err = n.call(c)
		succeeded(t, err) // with the address of the look-up before
		for _, q := range dns.Queries()[before:] {
			if q.Name != fullName {
				t.Errorf("%q was looked up, want only %q", q.Name, fullName)
			}
		}
	})
}

// TestFullNameFails: a query for a full name with a wrong domain leaves the cluster. There, a server may fail or not
// respond. Then the host is looked up too.
func TestFullNameFails(t *testing.T) {
	for name, tt := range map[string]struct {
		treatment dnstest.Treatment
		calls     int // until the address is found
	}{
		"SERVFAIL":    {dnstest.Treatment{Fails: true}, 1},
		"no response": {dnstest.Treatment{Drop: true}, 2},
	} {
		t.Run(name, func(t *testing.T) {
			in(t, func(t *testing.T, n *network) {
				dns := dnstest.New(map[string][]netip.Addr{host + ".": {v4}}, func(_ int, q dnstest.Query) dnstest.Treatment {
					if q.Name == fullName {
						return tt.treatment
					}
					return dnstest.Treatment{}
				})
				n.serve(v4, responding(good()))
				c := n.client(func(cfg *client.Config) { cfg.DNSName, cfg.Lookup = fullName, dns.LookupInMemory })
				for range tt.calls - 1 {
					_, err := n.call(c)
					unavailable(t, err, credential.ReasonBrokerUnreachable, "DNS", fullName)
				}
				_, err := n.call(c)
				succeeded(t, err)
				time.Sleep(lookupEnds)
			})
		})
	}
}

// TestErrorOfNames: if no name is found, the error is that of a record that may exist.
func TestErrorOfNames(t *testing.T) {
	for name, fails := range map[string]func(q dnstest.Query) bool{
		"the full name": func(q dnstest.Query) bool { return q.Name == fullName },
		"the host":      func(q dnstest.Query) bool { return q.Name == host+"." },
		"A":             func(q dnstest.Query) bool { return q.Type == "A" },
		"AAAA":          func(q dnstest.Query) bool { return q.Type == "AAAA" },
	} {
		t.Run(name, func(t *testing.T) {
			in(t, func(t *testing.T, n *network) {
				dns := dnstest.New(nil, func(_ int, q dnstest.Query) dnstest.Treatment { return dnstest.Treatment{Fails: fails(q)} })
				_, err := n.call(n.client(func(cfg *client.Config) { cfg.DNSName, cfg.Lookup = fullName, dns.LookupInMemory }))
				unavailable(t, err, credential.ReasonBrokerUnreachable, "server misbehaving")
				time.Sleep(lookupEnds)
			})
		})
	}
}

// TestLookupOutlivesItsCall: a look-up that takes longer than its call serves the next call, which starts no other.
func TestLookupOutlivesItsCall(t *testing.T) {
	for name, tt := range map[string]struct{ takes, pause, want time.Duration }{
		"the next call waits for it":      {12 * time.Second, time.Second, time.Second},
		"it ends between the calls":       {12 * time.Second, 5 * time.Second, 0},
		"within the time of its own call": {9 * time.Second, 0, 0},
	} {
		t.Run(name, func(t *testing.T) {
			in(t, func(t *testing.T, n *network) {
				ranked := n.brokers(4)
				n.serve(ranked[0], responding(good()))
				var lookups atomic.Int32
				c := n.client(func(cfg *client.Config) {
					cfg.Lookup = func(ctx context.Context, family, name string) ([]netip.Addr, error) {
						if family == "ip4" {
							lookups.Add(1)
						}
						select {
						case <-time.After(tt.takes):
							return n.lookup(ctx, family, name)
						case <-ctx.Done():
							return nil, ctx.Err()
						}
					}
				})
				got, err := n.call(c)
				if tt.takes < client.CallTimeout {
					succeeded(t, err)
					want(t, got, dialed{ranked[0], tt.takes})
				} else {
					unavailable(t, err, credential.ReasonBrokerUnreachable, "DNS", host, "no response in time")
					began := lookups.Load()
					time.Sleep(tt.pause)
					got, err = n.call(c)
					succeeded(t, err)
					want(t, got, dialed{ranked[0], tt.want})
					if tt.want == 0 && lookups.Load() != began {
						t.Error("the next call did not use the result")
					}
				}
				time.Sleep(lookupEnds)
			})
		})
	}
}

// TestResultOfALateLookup: the result of a look-up whose call has ended counts as current for one call, and only for a while.
func TestResultOfALateLookup(t *testing.T) {
	for name, tt := range map[string]struct {
		pause time.Duration // since the call timed out
		looks []bool        // whether each later call starts a look-up
	}{
		"soon": {5 * time.Second, []bool{false, true}},
		"late": {time.Minute, []bool{true}},
	} {
		t.Run(name, func(t *testing.T) {
			in(t, func(t *testing.T, n *network) {
				n.serve(n.brokers(4)[0], responding(good()))
				var lookups atomic.Int32
				respondsAt := time.Now().Add(client.CallTimeout + time.Second)
				c := n.client(func(cfg *client.Config) {
					cfg.Lookup = func(ctx context.Context, family, name string) ([]netip.Addr, error) {
						lookups.Add(1)
						select {
						case <-time.After(time.Until(respondsAt)):
							return n.lookup(ctx, family, name)
						case <-ctx.Done():
							return nil, ctx.Err()
						}
					}
				})
				_, err := n.call(c)
				unavailable(t, err, credential.ReasonBrokerUnreachable, "no response in time")
				time.Sleep(tt.pause)
				for i, want := range tt.looks {
					before := lookups.Load()
					_, err := n.call(c)
					succeeded(t, err)
					if looked := lookups.Load() != before; looked != want {
						t.Errorf("call %d starts a look-up: %v, want %v", i, looked, want)
					}
				}
				time.Sleep(lookupEnds)
			})
		})
	}
}

// TestOneLookupAtATime: concurrent calls share a look-up.
func TestOneLookupAtATime(t *testing.T) {
	in(t, func(t *testing.T, n *network) {
		dns := dnstest.New(map[string][]netip.Addr{fullName: {v4}}, slowly)
		n.serve(v4, responding(good()))
		c := n.client(func(cfg *client.Config) { cfg.DNSName, cfg.Lookup = fullName, dns.LookupInMemory })
		done := make(chan error)
		for range 8 {
			go func() {
				_, err := c.Credentials(t.Context())
				done <- err
			}()
		}
		for range 8 {
			succeeded(t, <-done)
		}
		checkQueries(t, dns, "A AAAA", fullName)
		time.Sleep(lookupEnds)
	})
}

// TestResolverOnTheNetwork: look-ups work over real UDP and TCP.
func TestResolverOnTheNetwork(t *testing.T) {
	ca := certstest.NewCA(t)
	s := &server{respond: responding(good())}
	_, port, err := net.SplitHostPort(s.listen(t, ca.Leaf(host)))
	if err != nil {
		t.Fatal(err)
	}
	tokenFile := filepath.Join(t.TempDir(), "token")
	writeToken(t, tokenFile, token)
	for name, treat := range map[string]func(int, dnstest.Query) dnstest.Treatment{
		"drops AAAA, truncates": func(_ int, q dnstest.Query) dnstest.Treatment {
			return dnstest.Treatment{Drop: q.Type == "AAAA", Truncated: true}
		},
		"is slow": func(int, dnstest.Query) dnstest.Treatment { return dnstest.Treatment{After: 400 * time.Millisecond} },
	} {
		t.Run(name, func(t *testing.T) {
			dns := dnstest.New(map[string][]netip.Addr{fullName: {netip.MustParseAddr("127.0.0.1")}}, treat)
			dns.Listen(t, "127.0.0.1:0")
			c, err := client.New(client.Config{
				// The certificate has the name of the target, not the full name.
				Target: host + ":" + port, DNSName: fullName, TokenFile: tokenFile, Lookup: dns.Lookup,
				TLS: &tls.Config{MinVersion: tls.VersionTLS13, RootCAs: ca.Pool()},
			})
			if err != nil {
				t.Fatal(err)
			}
			if _, err := c.Credentials(t.Context()); err != nil {
				t.Error(err)
			}
			for _, q := range dns.Queries() {
				if q.Name != fullName {
					t.Errorf("%q was looked up, want only %q", q.Name, fullName)
				}
			}
		})
	}
}

// TestFullNameIsNotVerified: the certificate must be for the target's host, whatever name was looked up.
func TestFullNameIsNotVerified(t *testing.T) {
	in(t, func(t *testing.T, n *network) {
		n.resolve(v4)
		s := n.serve(v4, responding(good()))
		_, err := n.call(n.client(func(cfg *client.Config) {
			cfg.Target, cfg.DNSName = "other.credence.svc:9443", host
		}))
		unavailable(t, err, credential.ReasonBrokerUnreachable, host, "other.credence.svc")
		if s.calls.Load() != 0 {
			t.Error("the token was sent to an unverified server")
		}
	})
}

func TestBadDNSName(t *testing.T) {
	for _, name := range []string{"a b", "dns:///a", "a:1", "fe80%eth0", strings.Repeat("a.", 128)} {
		_, err := client.New(client.Config{
			Target: "broker:1", DNSName: name, TokenFile: "token", TLS: &tls.Config{MinVersion: tls.VersionTLS13},
		})
		if err == nil || !strings.Contains(err.Error(), "is not a DNS name") {
			t.Errorf("New with DNS name %.20q: %v", name, err)
		}
	}
}

// TestNoProxy: the client does not connect to a proxy of the environment.
func TestNoProxy(t *testing.T) {
	const address = "CREDENCE_TEST_BROKER"
	if os.Getenv(address) != "" {
		callThroughAnyAddress(t, os.Getenv(address))
		return
	}
	var proxied atomic.Int32
	proxy := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		proxied.Add(1)
		w.WriteHeader(http.StatusForbidden)
	}))
	t.Cleanup(proxy.Close)
	dir := t.TempDir()
	ca := certstest.NewCA(t)
	s := &server{respond: responding(good())}
	target := s.listen(t, ca.Leaf("localhost"))
	// Package net/http reads these variables once per process.
	child := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestNoProxy$", "-test.v")
	child.Env = []string{address + "=" + target, "CREDENCE_TEST_ROOTS=" + ca.WriteTo(dir)}
	for _, name := range []string{"HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"} {
		child.Env = append(child.Env, name+"="+proxy.URL)
	}
	out, err := child.CombinedOutput()
	if err != nil || !strings.Contains(string(out), "--- PASS: TestNoProxy") {
		t.Errorf("calling with a proxy in the environment: %v\n%s", err, out)
	}
	if proxied.Load() != 0 || s.calls.Load() != 1 {
		t.Errorf("%d connections went to the proxy and %d calls to the broker, want 0 and 1", proxied.Load(), s.calls.Load())
	}
}

// callThroughAnyAddress calls the broker at the address 0.0.0.0. For Linux that is this machine, but for net/http it is no
// loopback address, which it would never send to a proxy.
func callThroughAnyAddress(t *testing.T, target string) {
	tokenFile := filepath.Join(t.TempDir(), "token")
	writeToken(t, tokenFile, token)
	request, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "https://0.0.0.0", http.NoBody)
	if err != nil {
		t.Fatal(err)
	}
	if proxy, err := http.ProxyFromEnvironment(request); proxy == nil {
		t.Fatalf("the environment has no proxy for this address: %v", err)
	}
	roots, err := certs.NewRoots(os.Getenv("CREDENCE_TEST_ROOTS"), nil)
	if err != nil {
		t.Fatal(err)
	}
	c, err := client.New(client.Config{
		Target: target, TokenFile: tokenFile, TLS: certs.ClientConfig(roots, ""),
		Lookup: func(_ context.Context, family, _ string) ([]netip.Addr, error) {
			return ofFamily([]netip.Addr{netip.IPv4Unspecified()}, family), nil
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Credentials(t.Context()); err != nil {
		t.Fatal(err)
	}
}
