package sessions_test

import (
	"encoding/json"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/credence-iam/credence/broker/debugapi"
	"github.com/credence-iam/credence/operator/installation"
	"github.com/credence-iam/credence/operator/sessions"
)

const (
	cart   = "arn:aws:iam::123456789012:role/shop/cart"
	orders = "arn:aws:iam::123456789012:role/orders"
)

// now is the time of the brokers.
var now = time.Date(2026, 11, 29, 12, 0, 0, 0, time.UTC)

func at(d time.Duration) *time.Time { t := now.Add(d); return &t }

// grant returns a grant whose session was issued ten minutes ago.
func grant(role, key string, change ...func(*debugapi.Grant)) debugapi.Grant {
	g := debugapi.Grant{
		Grant: role + " as credence", Role: role, SessionName: "credence", Duration: 3600, Pods: 2, PodNames: []string{"shop/a", "shop/b"}, Namespaces: []string{"shop"},
		AccessKeyID: key, Issued: at(-10 * time.Minute), Expiration: at(50 * time.Minute), RemainingSeconds: 3000, NextLook: at(15 * time.Minute),
	}
	for _, c := range change {
		c(&g)
	}
	return g
}

func broker(name string, grants ...debugapi.Grant) sessions.Broker {
	return sessions.Broker{Name: "credence-broker-6f8d-" + name, Page: debugapi.Page{Time: now, Matched: len(grants), Grants: grants}}
}

func failed(name string, err error) sessions.Broker {
	b := broker(name)
	b.Err = err
	return b
}

func snapshot() sessions.Snapshot {
	return sessions.Snapshot{Namespace: "credence", Brokers: []sessions.Broker{
		broker("aaaaa", grant(orders, "ASIAORDERSA", func(g *debugapi.Grant) {
			g.Failures, g.Reason, g.Message, g.RemainingSeconds = 3, "STS_ACCESS_DENIED", "AWS refuses the role\x1b[2J", 0
			g.Namespaces = []string{"a", "b", "c", "d"}
		}), grant(cart, "ASIACARTA")),
		broker("bbbbb", grant(cart, "ASIACARTB"), grant(orders, "", func(g *debugapi.Grant) {
			g.Pods, g.PodNames, g.Namespaces, g.Issued, g.Expiration, g.NextLook, g.Fetching = 0, nil, nil, nil, nil, nil, true
		})),
		failed("ccccc", &installation.ForbiddenError{Right: "create pods/portforward in namespace credence", Err: errors.New("x")}),
	}}
}

func TestTable(t *testing.T) {
	s := snapshot()
	for name, tt := range map[string]struct {
		query  sessions.Query
		format sessions.Format
		want   string
	}{
		"all": {sessions.Query{}, sessions.Table, `
ROLE       SESSION   NAMESPACES      PODS  AGE  LEFT     RENEWAL  BROKER  LAST ERROR
orders     credence  a,b and 2 more  2     10m  expired  15m      aaaaa   STS_ACCESS_DENIED (3 times)
orders     credence  -               0     -    -        now      bbbbb   -
shop/cart  credence  shop            2     10m  50m      15m      aaaaa   -
shop/cart  credence  shop            2     10m  50m      15m      bbbbb   -
`},
		"one role, wide": {sessions.Query{Role: "cart"}, sessions.Wide, `
ROLE                                      SESSION   NAMESPACES  PODS  AGE  LEFT  RENEWAL  BROKER                      OWNER  ACCESS KEY  DURATION  POD NAMES      LAST ERROR
arn:aws:iam::123456789012:role/shop/cart  credence  shop        2     10m  50m   15m      credence-broker-6f8d-aaaaa  yes    ASIACARTA   60m       shop/a,shop/b  -
arn:aws:iam::123456789012:role/shop/cart  credence  shop        2     10m  50m   15m      credence-broker-6f8d-bbbbb  yes    ASIACARTB   60m       shop/a,shop/b  -
`},
		"failing, wide": {sessions.Query{Failing: true}, sessions.Wide, `
ROLE                                   SESSION   NAMESPACES  PODS  AGE  LEFT     RENEWAL  BROKER                      OWNER  ACCESS KEY   DURATION  POD NAMES      LAST ERROR
arn:aws:iam::123456789012:role/orders  credence  a,b,c,d     2     10m  expired  15m      credence-broker-6f8d-aaaaa  yes    ASIAORDERSA  60m       shop/a,shop/b  STS_ACCESS_DENIED (3 times): AWS refuses the role?[2J
`},
		"none": {sessions.Query{Role: "car"}, sessions.Table, "?"},
	} {
		var out strings.Builder
		if err := s.Write(&out, s.Rows(tt.query), tt.format); err != nil {
			t.Fatal(err)
		}
		want := tt.want[1:] + "broker credence-broker-6f8d-ccccc: your user may not do this; needs: create pods/portforward in namespace credence\n"
		if diff := cmp.Diff(want, out.String()); diff != "" {
			t.Errorf("%s (-want +got):\n%s", name, diff)
		}
	}
	if !s.Failed() {
		t.Error("a snapshot with a broker that failed has not failed")
	}
}

// squeeze replaces the spaces between columns by one.
func squeeze(text string) string {
	var lines []string
	for line := range strings.Lines(text) {
		lines = append(lines, strings.Join(strings.Fields(line), " "))
	}
	return strings.Join(lines, "\n")
}

// Two brokers whose names end alike have their whole names.
func TestEqualEnds(t *testing.T) {
	s := sessions.Snapshot{Brokers: []sessions.Broker{broker("a-x", grant(cart, "")), broker("b-x", grant(cart, ""))}}
	var out strings.Builder
	if err := s.Write(&out, s.Rows(sessions.Query{}), sessions.Table); err != nil || !strings.Contains(out.String(), "-b-x ") || !strings.Contains(out.String(), "-a-x ") {
		t.Errorf("%v\n%s", err, out.String())
	}
}

func TestJSON(t *testing.T) {
	s := snapshot()
	s.Brokers[0].Page.Grants[0].Message = "\u009b2J\u202e\U000e0001é"
	var out strings.Builder
	if err := s.Write(&out, s.Rows(sessions.Query{Role: orders}), sessions.JSON); err != nil {
		t.Fatal(err)
	}
	var got struct {
		Namespace string
		Brokers   []struct {
			Name              string
			Sessions, Failing int
			Right             string `json:"missing_right"`
		}
		Sessions []struct {
			Broker, Role, Message string
			Owner                 bool
			Age                   float64 `json:"age_seconds"`
			Key                   string  `json:"access_key_id"`
		}
	}
	if err := json.Unmarshal([]byte(out.String()), &got); err != nil {
		t.Fatal(err)
	}
	if len(got.Sessions) != 2 || got.Sessions[0].Key != "ASIAORDERSA" || got.Sessions[0].Age != 600 || !got.Sessions[0].Owner || got.Sessions[1].Owner ||
		len(got.Brokers) != 3 || got.Brokers[0].Failing != 1 || got.Brokers[1].Sessions != 2 || got.Brokers[2].Right == "" {
		t.Errorf("JSON is %s", out.String())
	}
	if got.Sessions[0].Message != s.Brokers[0].Page.Grants[0].Message || strings.ContainsAny(out.String(), "\u009b\u202e\U000e0001") || !strings.Contains(out.String(), "é") {
		t.Errorf("the message is %+q in %+q", got.Sessions[0].Message, out.String())
	}
}

func TestRoleOf(t *testing.T) {
	s := snapshot()
	s.Brokers[1].Page.Grants = append(s.Brokers[1].Page.Grants, grant("arn:aws:iam::123456789012:role/other/orders", ""), grant("nonsense:role/strange", ""))
	for name, want := range map[string]string{
		"cart": cart, "shop/cart": cart, cart: cart, "arn:aws:iam::123456789012:role/absent": "arn:aws:iam::123456789012:role/absent",
		"orders": "2 roles have the name", "absent": "no broker has a session", "strange": "no broker has a session", "arn:aws:iam::1:role/x": "--role: ", "art": "no broker has a session",
	} {
		got, err := s.RoleOf(name)
		if err != nil {
			got = err.Error()
		}
		if !strings.HasPrefix(got, want) {
			t.Errorf("%s: %s, want %s", name, got, want)
		}
	}
}

func TestPreviewAndReport(t *testing.T) {
	var out strings.Builder
	if err := sessions.Drop.Preview(&out, snapshot(), cart, `context "prod"`); err != nil {
		t.Fatal(err)
	}
	want := `drop the sessions of arn:aws:iam::123456789012:role/shop/cart in 3 brokers of namespace credence, context "prod":

BROKER SESSIONS PODS NAMESPACES NOTE
credence-broker-6f8d-aaaaa 1 2 shop -
credence-broker-6f8d-bbbbb 1 2 shop -
credence-broker-6f8d-ccccc ? ? ? your user may not do this; needs: create pods/portforward in namespace credence

` + sessions.Drop.Effect
	if diff := cmp.Diff(want, squeeze(out.String())); diff != "" {
		t.Errorf("the preview (-want +got):\n%s", diff)
	}
	for name, tt := range map[string]struct {
		done []sessions.Done
		ok   bool
		want string
	}{
		"all": {[]sessions.Done{{Broker: "a", Sessions: 2}}, true, "broker a: renewed 2 sessions\n"},
		"some": {[]sessions.Done{{Broker: "a", Error: "gone\x1b"}, {Broker: "b"}}, false,
			"broker a: failed: gone?\nbroker b: renewed 0 sessions\n1 of 2 brokers failed; run the command again, it does no harm to the others\n"},
	} {
		var out strings.Builder
		if ok, err := sessions.Renew.Report(&out, cart, tt.done, sessions.Table); ok != tt.ok || err != nil || out.String() != tt.want {
			t.Errorf("%s: %t %v\n%s", name, ok, err, out.String())
		}
	}
}
