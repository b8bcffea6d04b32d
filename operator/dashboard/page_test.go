package dashboard_test

import (
	"fmt"
	"html"
	"regexp"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/credence-iam/credence/broker/cache"
	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/broker/debugapi"
)

var (
	rows   = regexp.MustCompile(`(?s)<tr[^>]*>(.*?)</tr>`)
	tags   = regexp.MustCompile(`<[^>]*>`)
	spaces = regexp.MustCompile(`\s+`)
)

// part returns the texts of the rows or items in one part of the page.
func part(t testing.TB, page, id string, of *regexp.Regexp) (texts []string) {
	t.Helper()
	_, rest, found := strings.Cut(page, `id="part-`+id+`">`)
	if !found {
		t.Fatalf("the page has no part %s", id)
	}
	rest, _, _ = strings.Cut(rest, "</section>")
	for _, match := range of.FindAllStringSubmatch(rest, -1) {
		text := tags.ReplaceAllString(strings.ReplaceAll(match[1], "<td", " | <td"), " ")
		texts = append(texts, strings.TrimSpace(spaces.ReplaceAllString(html.UnescapeString(text), " ")))
	}
	return texts
}

// items matches the findings of the health.
var items = regexp.MustCompile(`(?s)<li class="(?:ok|unknown|warning|failed)">(.*?)</li>`)

// TestHealth shows what each situation says, in the order in which a credential travels.
func TestHealth(t *testing.T) {
	synctest.Test(t, func(t *testing.T) { // The clock stands still.
		all := situations(t)
		for name, want := range map[string][]string{
			"healthy": {
				"OK webhook : 2 of 2 are ready", "OK broker : 2 of 2 are ready", "OK STS : 0 of 60 calls of STS fail",
				"OK sessions : 3 sessions, none needs attention", "OK budget : renewals need 0.4/min, and the brokers may make 400.0/s",
			},
			"failing": {
				"Failed webhook : none is ready, so annotated pods in opted-in namespaces are refused cluster admin: See why its pods are not ready (see docs/operations.md) kubectl -n credence describe pods -l app.kubernetes.io/name=credence,app.kubernetes.io/component=webhook",
				"Warning broker : 1 of 2 are ready cluster admin: See why its pods are not ready (see docs/operations.md) kubectl -n credence describe pods -l app.kubernetes.io/name=credence,app.kubernetes.io/component=broker",
				"Warning pod credence-broker-6c5f7d8b9-zt7mq : AWSIdentityUnconfirmed: AWS refuses the broker's own credentials (InvalidClientTokenId) cluster admin: See the events of this pod (see docs/operations.md) kubectl -n credence describe pod credence-broker-6c5f7d8b9-zt7mq",
				"Failed AWS : 4 calls fail because of the brokers' own AWS credentials cluster admin: Correct the AWS credentials of the brokers; their logs have the words of AWS (see docs/aws.md#how-its-own-credentials-are-kept)",
				"Failed STS : 80 of 98 calls of STS fail cluster admin: Do not restart brokers; find out whether STS or the way to it fails (see docs/operations.md#when-sts-is-down)",
				"Warning sessions : 1 session is missing, because its fetch failed AWS admin: See the reasons in the table of sessions",
				"Warning sessions : 1 session is valid, but its renewal failed cluster admin: See the reasons in the table of sessions, before these sessions expire",
				"Warning sessions : 1 session is overdue for its renewal cluster admin: See STS and the budget below",
				"Warning budget : renewals need 360.0/s, and the brokers may make 400.0/s cluster admin: Raise the value broker.stsRate, or let pods share sessions (see docs/scale.md)",
			},
			"empty": {
				"OK webhook : 2 of 2 are ready", "OK broker : 2 of 2 are ready", "OK budget : renewals need 0.0/s, and the brokers may make 0.0/s",
			},
		} {
			if name == "empty" {
				want = want[:2] // Without a share, there is nothing to say of the budget.
			}
			if diff := cmp.Diff(want, part(t, text(t, show(t, all[name]), ""), "health", items)); diff != "" {
				t.Errorf("%s (-want +got):\n%s", name, diff)
			}
		}
	})
}

// TestHealthOfNumbers reports what the numbers of one pod show.
func TestHealthOfNumbers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) { // The clock stands still.
		for _, tt := range []struct {
			series string
			value  float64
			want   string
		}{
			{"credence_broker_certificate_expiry_timestamp_seconds", float64(time.Now().Add(50 * time.Hour).Unix()), "its certificate expires in 2 days"},
			{"credence_broker_rules_file_ok", 0, "the rules file is invalid"},
			{"credence_broker_informer_age_seconds", 301, "its watches of the API server do not work since 5 min"},
			{"credence_broker_token_verification_age_seconds", 3601, "it has read no signing keys for 1 h"},
			{"credence_broker_clock_skew_seconds", -61, "its clock differs from that of AWS by 1 min"},
			{"credence_webhook_sidecar_settings_file_ok", 0, "the file of the sidecar settings is invalid"},
			{`credence_broker_build_info{goversion="go1.26",version="v1.1.0"}`, 1, "different versions run: v1.0.0, v1.1.0"},
			{"credence_broker_audit_lines_lost_total", 3, "3 audit lines are lost"},
		} {
			s := situations(t)["healthy"]
			if strings.Contains(tt.series, "build_info") {
				delete(s.now.Pods[0].Metrics, `credence_broker_build_info{goversion="go1.26",version="v1.0.0"}`)
				for series := range s.now.Pods[0].Metrics {
					if strings.Contains(series, "build_info") {
						delete(s.now.Pods[0].Metrics, series)
					}
				}
			}
			s.now.Pods[0].Metrics[tt.series] = tt.value
			if found := strings.Join(part(t, text(t, show(t, s), ""), "health", items), "\n"); !strings.Contains(found, tt.want) {
				t.Errorf("%s %g: the health is\n%s\nwant %q", tt.series, tt.value, found, tt.want)
			}
		}
	})
}

// TestSessions shows each grant once, those that need attention first.
func TestSessions(t *testing.T) {
	synctest.Test(t, func(t *testing.T) { // The clock stands still.
		s := situations(t)["failing"]
		want := []string{
			"State Time left Role and session Namespaces Pods Brokers and access keys",
			"| No session, the fetch failed | none of 1 h arn:aws:iam::123456789012:role/shop-cart as production.shop-cart STS_ACCESS_DENIED: STS refuses role arn:aws:iam::123456789012:role/shop-cart: its trust policy does not name the broker's role (AWS admin) | shop | 3 | credence-broker-6c5f7d8b9-4kx2p credence-broker-6c5f7d8b9-zt7mq",
			"| Valid, the renewal is overdue | 12 min of 1 h arn:aws:iam::123456789012:role/billing as production.billing | billing | 3 | credence-broker-6c5f7d8b9-4kx2p credence-broker-6c5f7d8b9-zt7mq ASIAEXAMPLE00004 ASIAEXAMPLE10005",
			"| Valid, the renewal failed | 19 min of 1 h arn:aws:iam::123456789012:role/shop-search as production.shop-search STS_UNAVAILABLE: STS does not respond (cluster admin) | shop | 3 | credence-broker-6c5f7d8b9-4kx2p credence-broker-6c5f7d8b9-zt7mq ASIAEXAMPLE00002 ASIAEXAMPLE10003",
			"| First fetch | none of 1 h arn:aws:iam::123456789012:role/new as production.new | new | 3 | credence-broker-6c5f7d8b9-4kx2p credence-broker-6c5f7d8b9-zt7mq",
			"| Valid | 58 min of 1 h arn:aws:iam::123456789012:role/audit as production.audit | audit | 3 | credence-broker-6c5f7d8b9-4kx2p credence-broker-6c5f7d8b9-zt7mq ASIAEXAMPLE00008 ASIAEXAMPLE10009",
		}
		for n := range s.now.Sessions {
			s.now.Sessions[n].Read = time.Now().Add(time.Minute) // A clock that was set back takes no time from a session.
		}
		if diff := cmp.Diff(want, part(t, text(t, show(t, s), ""), "sessions", rows)); diff != "" {
			t.Errorf("sessions (-want +got):\n%s", diff)
		}
		if got := part(t, text(t, show(t, s), "?show=attention&q=SHOP"), "sessions", rows); len(got) != 3 {
			t.Errorf("sessions of shop that need attention: %q", got)
		}
	})
}

// TestOwnersCount shows the session of an owner, not that of a broker that responded once.
func TestOwnersCount(t *testing.T) {
	synctest.Test(t, func(t *testing.T) { // The clock stands still.
		s := situations(t)["healthy"]
		s.now.Sessions = nil
		sessions(&s.now, nil, "cart", "shop", 50*time.Minute)
		s.now.Sessions[1].Pods, s.now.Sessions[1].RemainingSeconds = 0, 60
		got := part(t, text(t, show(t, s), ""), "sessions", rows)
		if len(got) != 2 || !strings.Contains(got[1], "| Valid | 50 min") {
			t.Errorf("sessions %q", got)
		}
	})
}

// TestPages shows a hundred sessions at a time.
func TestPages(t *testing.T) {
	s := situations(t)["many"]
	seen := map[string]bool{}
	for _, query := range []string{"", "?from=100"} {
		for _, text := range part(t, text(t, show(t, s), query), "sessions", rows)[1:] {
			seen[text] = true
		}
	}
	if len(seen) != 200 {
		t.Errorf("two pages have %d sessions", len(seen))
	}
	for query, want := range map[string]string{
		"?from=100": `<a href="?#sessions">Previous sessions</a>`, "": `<a href="?from=100#sessions">Next sessions</a>`,
		"?q=team":          `<a href="?from=100&amp;q=team#sessions">Next sessions</a>`,
		"?q=nothing":       "No session matches.",
		"?from=nonsense":   "1 to 100 of 200.",
		"?from=1000":       "No session matches.",
		"?q=%22%3E%3Cb%3E": `value="&#34;&gt;&lt;b&gt;"`,
	} {
		if page := text(t, show(t, s), query); !strings.Contains(page, want) {
			t.Errorf("%s: the page lacks %q", query, want)
		}
	}
}

// TestRefusals shows reasons with their pods, and what docs/errors.md says.
func TestRefusals(t *testing.T) {
	synctest.Test(t, func(t *testing.T) { // The clock stands still.
		got := part(t, text(t, show(t, situations(t)["failing"]), ""), "refusals", rows)
		if len(got) != 4 {
			t.Fatalf("refusals: %q", got)
		}
		for n, want := range []string{
			"Reason Recent Since start At admission Pods What to do",
			"STS_ACCESS_DENIED denied | 40 | 40 | 0 | STS refuses role arn:aws:iam::123456789012:role/shop-cart: its trust policy does not name the broker's role shop/cart-5d8f9c7b6-00000, ",
			"ROLE_NOT_PERMITTED denied | 14 | 14 | 0 | none known | owner of the namespace : The namespace permits other roles than the pod's.",
			"TOKEN_AUDIENCE unauthenticated | 2 | 2 | 0 | none known | cluster admin : ",
		} {
			if !strings.HasPrefix(got[n], want) {
				t.Errorf("row %d is %q, want %q", n, got[n], want)
			}
		}
		if !strings.Contains(got[1], "ago and 4 more pods | AWS admin : AWS refuses the role to the broker.") {
			t.Errorf("row 1 is %q", got[1])
		}
	})
}

// TestUnreachable keeps the last numbers of a broker that does not respond, with their age, and all sessions if none does.
func TestUnreachable(t *testing.T) {
	synctest.Test(t, func(t *testing.T) { // The clock stands still.
		s := situations(t)["unreachable"]
		page := text(t, show(t, s), "")
		if got := strings.Join(part(t, page, "brokers", rows), "\n"); !strings.Contains(got, "context deadline exceeded | No response | v1.0.0 | node-1 | eu-central-1b | 5 h | 0 | 3 of 3 | 100 | 10 min old") {
			t.Errorf("the brokers are\n%s", got)
		}
		if !strings.Contains(page, "you may not list Events in all namespaces") || !strings.Contains(page, "needs: list events in all namespaces") {
			t.Error("the page does not name the missing right")
		}

		d := show(t, situations(t)["healthy"])
		lost := situations(t)["healthy"].now
		for n := range lost.Pods {
			lost.Pods[n].Err, lost.Pods[n].Metrics = "no route to host", nil
		}
		lost.Sessions = nil
		lost.Time = lost.Time.Add(time.Second)
		d.Put(lost)
		if got := part(t, text(t, d, ""), "sessions", rows); len(got) != 4 {
			t.Errorf("without brokers, the sessions are %q", got)
		}
		if page := text(t, d, ""); !strings.Contains(page, "No broker responds.") {
			t.Error("the page does not say that no broker responds")
		}
	})
}

// TestRecent counts what happened since the oldest sample, also if a broker has restarted meanwhile.
func TestRecent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) { // The clock stands still.
		d := show(t, situation{})
		at := time.Now().Add(-time.Hour)
		for minute, calls := range []int{100, 110, 120, 7} { // It restarts before the last one.
			d.Put(installed(t, at.Add(time.Duration(minute)*5*time.Minute), load{calls: calls, cache: cache.Stats{}}))
		}
		got := part(t, text(t, d, ""), "sts", rows)
		if len(got) != 4 || !strings.HasSuffix(got[1], "| 14 | 0 | 14 | 0") {
			t.Errorf("after a restart, STS has %q", got)
		}
		d.Put(installed(t, at.Add(20*time.Minute), load{calls: 12, failed: map[credential.Reason]int{credential.ReasonSTSThrottled: 1}}))
		page := text(t, d, "")
		if got := part(t, page, "sts", rows); !strings.HasSuffix(got[1], "| 26 | 2 | 26 | 2") || !strings.Contains(page, "in the last 15 min") {
			t.Errorf("later, STS has %q", got)
		}
	})
}

// TestLimits leaves out sessions of a cluster with more than the page can have, and says so.
func TestLimits(t *testing.T) {
	s := situations(t)["healthy"]
	s.now.SessionsLeftOut = 12
	if page := text(t, show(t, s), ""); !strings.Contains(page, "12 more sessions are not shown") {
		t.Error("the page does not say what it leaves out")
	}
}

// BenchmarkPage renders a page with 10,000 grants of two brokers each.
func BenchmarkPage(b *testing.B) {
	s := situation{now: installed(b, time.Now(), load{})}
	for n := range 10_000 {
		sessions(&s.now, func(g *debugapi.Grant) { g.Pods = n % 7 }, fmt.Sprintf("role-%d", n), "team", 40*time.Minute)
	}
	d := show(b, s)
	b.ReportAllocs()
	for b.Loop() {
		_ = text(b, d, "")
	}
}
