package dashboard_test

import (
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/credence-iam/credence/broker/admin"
	"github.com/credence-iam/credence/broker/cache"
	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/broker/debugapi"
	"github.com/credence-iam/credence/operator/dashboard"
	"github.com/credence-iam/credence/operator/dashboard/view"
	"github.com/credence-iam/credence/operator/metrics"
)

// situation is a state of a cluster, and that of ten minutes before.
type situation struct{ before, now view.Snapshot }

// load is what a broker did.
type load struct {
	calls   int // of STS that succeeded
	failed  map[credential.Reason]int
	refused map[credential.Reason]int
	cache   cache.Stats
}

// metrics returns the metrics of a broker that did this, as the broker itself writes them.
func metricsOf(t testing.TB, version string, did load) metrics.Values {
	t.Helper()
	m, err := admin.NewMetrics(version, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	for n := range did.calls {
		m.STSCall("AssumeRole", "ok", time.Duration(30+n%40)*time.Millisecond)
		m.Answer("", time.Millisecond)
	}
	for reason, n := range did.failed {
		for range n {
			m.STSCall("AssumeRole", string(reason), 3*time.Second)
		}
	}
	for reason, n := range did.refused {
		for range n {
			m.Answer(reason, time.Millisecond)
		}
	}
	if err := m.Watch(admin.Sources{
		Cache: func() cache.Stats { return did.cache }, Ready: func() bool { return true },
		Certificate: func() time.Time { return time.Now().Add(60 * 24 * time.Hour) },
	}); err != nil {
		t.Fatal(err)
	}
	w := httptest.NewRecorder()
	m.Handler().ServeHTTP(w, httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/metrics", nil))
	parsed := metrics.Parse(w.Body.Bytes())
	if len(parsed) < 100 {
		t.Fatalf("the broker's metrics have %d series", len(parsed))
	}
	return parsed
}

// installed returns a snapshot of a healthy installation without sessions.
func installed(t testing.TB, at time.Time, did load) view.Snapshot {
	t.Helper()
	s := view.Snapshot{
		Time: at, Cluster: "production", Namespace: "credence", RefusedKnown: true,
		Webhook: &view.Deployment{Want: 2, Ready: 2}, Broker: &view.Deployment{Want: 2, Ready: 2},
	}
	for n, name := range []string{"credence-broker-6c5f7d8b9-4kx2p", "credence-broker-6c5f7d8b9-zt7mq", "credence-webhook-7b9c6d5f4-8hjwn", "credence-webhook-7b9c6d5f4-p2vxk"} {
		p := view.Pod{
			Name: name, Node: fmt.Sprintf("node-%d", n%2), Zone: fmt.Sprintf("eu-central-1%c", 'a'+n%2), Webhook: n > 1, Ready: true, State: "Running",
			Started: at.Add(-5 * time.Hour), Image: "registry.example/credence-broker:v1.0.0", Metrics: metricsOf(t, "v1.0.0", did), Read: at,
		}
		if p.Webhook {
			p.Metrics = metrics.Parse([]byte("credence_webhook_build_info{goversion=\"go1.26\",version=\"v1.0.0\"} 1\n" +
				"credence_webhook_reviews_total{decision=\"injected\"} 40\ncredence_webhook_refusals_total{reason=\"ROLE_NOT_PERMITTED\"} 0\n"))
		}
		s.Pods = append(s.Pods, p)
	}
	return s
}

// session returns a session of both brokers.
func sessions(s *view.Snapshot, change func(*debugapi.Grant), role, namespace string, left time.Duration) {
	for n := range 2 {
		issued, end := s.Time.Add(left-time.Hour), s.Time.Add(left)
		g := debugapi.Grant{
			Role: "arn:aws:iam::123456789012:role/" + role, SessionName: "production." + role, Duration: 3600, Pods: 3, Namespaces: []string{namespace},
			AccessKeyID: fmt.Sprintf("ASIAEXAMPLE%d%04d", n, len(s.Sessions)), Issued: &issued, Expiration: &end, RemainingSeconds: left.Seconds(),
		}
		g.Grant = g.Role + " as " + g.SessionName
		if change != nil {
			change(&g)
		}
		s.Sessions = append(s.Sessions, view.Session{Grant: g, Broker: s.Pods[n].Name, Read: s.Time})
	}
}

// none makes a grant one without a session, for a reason.
func none(reason credential.Reason, message string) func(*debugapi.Grant) {
	return func(g *debugapi.Grant) {
		g.AccessKeyID, g.Issued, g.Expiration, g.RemainingSeconds, g.Failures = "", nil, nil, 0, 4
		g.Reason, g.Message = string(reason), message
	}
}

// situations are states of clusters, by name.
func situations(t testing.TB) map[string]situation {
	const ago = 10 * time.Minute
	at := time.Now()
	fine := cache.Stats{Entries: 3, Active: 3, Warm: 3, Rate: 200, Share: 200, Demand: 0.003}
	pair := func(first, second load) situation {
		return situation{installed(t, at.Add(-ago), first), installed(t, at, second)}
	}

	healthy := pair(load{calls: 100, cache: fine}, load{calls: 130, cache: fine})
	sessions(&healthy.now, nil, "shop-cart", "shop", 52*time.Minute)
	sessions(&healthy.now, nil, "shop-search", "shop", 41*time.Minute)
	sessions(&healthy.now, nil, "billing", "billing", 33*time.Minute)

	short := cache.Stats{Entries: 5, Active: 5, Warm: 2, Refused: 1, Late: 1, Rate: 40, Share: 200, Demand: 180, Waiting: 12, InFlight: 64}
	failing := pair(load{calls: 100, cache: fine}, load{
		calls: 101, cache: short,
		failed:  map[credential.Reason]int{credential.ReasonSTSUnavailable: 40, credential.ReasonSTSDenied: 6, credential.ReasonBrokerCredentials: 2},
		refused: map[credential.Reason]int{credential.ReasonSTSDenied: 20, credential.ReasonRoleNotPermitted: 7, credential.ReasonTokenAudience: 1},
	})
	failing.now.Webhook.Ready, failing.now.Broker.Ready = 0, 1
	for n := range 2 {
		p := &failing.now.Pods[2+n]
		p.Ready, p.State, p.Restarts, p.Err, p.Metrics = false, "CrashLoopBackOff", 17, "the pod does not run: CrashLoopBackOff", nil
	}
	failing.now.Pods[1].Ready = false
	sessions(&failing.now, none(credential.ReasonSTSDenied, "STS refuses role arn:aws:iam::123456789012:role/shop-cart: its trust policy does not name the broker's role"), "shop-cart", "shop", 0)
	sessions(&failing.now, func(g *debugapi.Grant) { g.Reason, g.Message = "STS_UNAVAILABLE", "STS does not respond" }, "shop-search", "shop", 19*time.Minute)
	sessions(&failing.now, nil, "billing", "billing", 12*time.Minute)
	sessions(&failing.now, func(g *debugapi.Grant) { none("", "")(g); g.Fetching = true }, "new", "new", 0)
	sessions(&failing.now, nil, "audit", "audit", 58*time.Minute)
	for n := range 12 {
		failing.now.Refused = append(failing.now.Refused, view.Refused{
			Namespace: "shop", Pod: fmt.Sprintf("cart-5d8f9c7b6-%05d", n), Event: "CredentialsRefused", Reason: "STS_ACCESS_DENIED",
			Message: "STS refuses role arn:aws:iam::123456789012:role/shop-cart: its trust policy does not name the broker's role", Time: at.Add(-time.Duration(n) * time.Minute),
		})
	}
	failing.now.Refused = append(failing.now.Refused, view.Refused{
		Namespace: "credence", Pod: failing.now.Pods[1].Name, Event: "AWSIdentityUnconfirmed", Message: "AWS refuses the broker's own credentials (InvalidClientTokenId)", Time: at,
	})

	many := pair(load{calls: 4000, cache: fine}, load{calls: 4400, cache: fine})
	for n := range 200 {
		sessions(&many.now, nil, fmt.Sprintf("team-%03d-worker", n), fmt.Sprintf("team-%03d", n%40), time.Duration(28+n%32)*time.Minute)
	}

	empty := pair(load{}, load{})
	for n := range empty.now.Pods {
		empty.now.Pods[n].Started = at.Add(-time.Minute)
	}

	unreachable := pair(load{calls: 100, cache: fine}, load{calls: 130, cache: fine})
	sessions(&unreachable.now, nil, "shop-cart", "shop", 52*time.Minute)
	unreachable.now.Sessions = unreachable.now.Sessions[:1]
	lost := &unreachable.now.Pods[1]
	lost.Err, lost.Metrics = "GET /metrics of pod credence/credence-broker-6c5f7d8b9-zt7mq, port 8080: context deadline exceeded", nil
	unreachable.now.Problems = []string{`needs: list events in all namespaces; the cluster admin can grant it: listing the Events of brokers: events is forbidden: User "ann" cannot list resource "events" in API group "" at the cluster scope`}
	unreachable.now.RefusedKnown = false

	long := pair(load{calls: 100, cache: fine}, load{calls: 130, cache: fine, refused: map[credential.Reason]int{credential.ReasonAnnotationInvalid: 3}})
	long.now.Cluster = "arn:aws:eks:eu-central-1:123456789012:cluster/" + strings.Repeat("very-long-name-", 6)
	sessions(&long.now, none(credential.ReasonSTSRejected, strings.Repeat("word ", 80)+strings.Repeat("x", 200)), strings.Repeat("path/", 40)+strings.Repeat("r", 64), strings.Repeat("n", 63), 0)
	for n := range long.now.Pods {
		long.now.Pods[n].Name, long.now.Pods[n].Node = strings.Repeat("credence-", 24)+fmt.Sprint(n), strings.Repeat("node.", 30)+"example.com"
	}
	long.now.Refused = []view.Refused{{Namespace: strings.Repeat("n", 63), Pod: strings.Repeat("p", 253), Reason: "ANNOTATION_INVALID", Message: strings.Repeat("y", 600), Time: at}}

	hostile := pair(load{calls: 100, cache: fine}, load{calls: 130, cache: fine})
	attack := `"><script>window.attacked=1</script><img src=http://evil.example/x onerror=window.attacked=1>` + "\u202e\x1b[2J</title></style>{{.Cluster}}"
	hostile.now.Cluster, hostile.now.Namespace = attack, attack
	sessions(&hostile.now, none(credential.Reason(attack), attack), attack, attack, 0)
	sessions(&hostile.now, nil, "javascript:window.attacked=1", attack, 40*time.Minute)
	hostile.now.Pods[0].Node, hostile.now.Pods[0].Zone, hostile.now.Pods[0].Image, hostile.now.Pods[1].Err = attack, attack, "x:"+attack, attack
	hostile.now.Problems = []string{attack}
	hostile.now.Refused = []view.Refused{{Namespace: attack, Pod: attack, Reason: attack, Message: attack, Event: attack, Time: at}}

	return map[string]situation{
		"healthy": healthy, "failing": failing, "many": many, "empty": empty, "unreachable": unreachable, "long": long, "hostile": hostile,
	}
}

// show returns a dashboard that shows a situation.
func show(t testing.TB, s situation) *dashboard.Dashboard {
	t.Helper()
	d, err := dashboard.New(dashboard.Config{Gather: nothing, Location: time.UTC})
	if err != nil {
		t.Fatal(err)
	}
	d.Put(s.before)
	d.Put(s.now)
	return d
}
