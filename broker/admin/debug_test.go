package admin_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/credence-iam/credence/broker/admin"
	"github.com/credence-iam/credence/broker/audit"
	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/broker/debugapi"
	"github.com/credence-iam/credence/broker/identity"
	"github.com/credence-iam/credence/broker/policy"
)

const (
	cartRole     = "arn:aws:iam::123456789012:role/cart"
	ordersARN    = "arn:aws:iam::123456789012:role/orders"
	secretMarker = "very/secret+key"
)

// grantOf returns the grant of a pod with these annotations.
func grantOf(t *testing.T, annotations ...string) policy.Grant {
	t.Helper()
	keys, err := policy.NewKeys(policy.DefaultPrefix)
	if err != nil {
		t.Fatal(err)
	}
	rules, err := policy.New(policy.Config{Keys: keys})
	if err != nil {
		t.Fatal(err)
	}
	of := map[string]string{}
	for i := 0; i < len(annotations); i += 2 {
		of[policy.DefaultPrefix+"/"+annotations[i]] = annotations[i+1]
	}
	pod := policy.Pod{Namespace: "shop", Name: "cart-1", UID: "u-1", ServiceAccount: "cart", Request: keys.Request(of)}
	g, err := rules.Grant(pod, policy.Namespace{
		Name: "shop", Labels: map[string]string{policy.DefaultPrefix + "/inject": "enabled"},
		Annotations: map[string]string{policy.DefaultPrefix + "/permitted": ".*"},
	})
	if err != nil {
		t.Fatal(err)
	}
	return g
}

// sessions is a double of the cache.
type sessions struct {
	states []admin.State
	done   []string // commands with their number of sessions: "renew 2"
}

func (s *sessions) States(match func(policy.Grant) bool) (all []admin.State) {
	for _, state := range s.states {
		if match(state.Key) {
			all = append(all, state)
		}
	}
	return all
}

func (s *sessions) count(order string, match func(policy.Grant) bool) int {
	n := 0
	for _, state := range s.states {
		if match(state.Key) {
			n++
		}
	}
	s.done = append(s.done, fmt.Sprint(order, " ", n))
	return n
}

func (s *sessions) Renew(match func(policy.Grant) bool) int { return s.count("renew", match) }
func (s *sessions) Drop(match func(policy.Grant) bool) int  { return s.count("drop", match) }

// auditor stores entries, or fails.
type auditor struct {
	entries []audit.Entry
	err     error
}

func (a *auditor) Record(e audit.Entry) error { a.entries = append(a.entries, e); return a.err }

// desk is a handler of debug pages with doubles.
type desk struct {
	sessions
	auditor

	log     bytes.Buffer
	handler http.Handler
}

func newDesk(t *testing.T, anyAddress bool, states ...admin.State) *desk {
	t.Helper()
	d := &desk{sessions: sessions{states: states}}
	var err error
	d.handler, err = admin.Debug(admin.DebugConfig{
		Sessions: &d.sessions, Audit: &d.auditor, Logger: slog.New(slog.NewJSONHandler(&d.log, nil)), AnyAddress: anyAddress,
	})
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func (d *desk) do(t *testing.T, method, target string, header ...string) *httptest.ResponseRecorder {
	t.Helper()
	r := httptest.NewRequestWithContext(t.Context(), method, "http://localhost:8081"+target, nil)
	for i := 0; i < len(header); i += 2 {
		if header[i] == "Host" {
			r.Host = header[i+1]
		} else {
			r.Header.Set(header[i], header[i+1])
		}
	}
	w := httptest.NewRecorder()
	d.handler.ServeHTTP(w, r)
	return w
}

func states(t *testing.T) []admin.State {
	now := time.Now()
	return []admin.State{
		{
			Key: grantOf(t, "role", ordersARN), Active: 0, Fetching: true, Waiters: 3, Failures: 2, NotBefore: now.Add(20 * time.Second),
			Failure: &credential.Error{
				Kind: credential.ErrDenied, Reason: credential.ReasonSTSDenied, Message: "AWS refuses the role\x1b[2J", Cause: errors.New("because of " + secretMarker),
			},
		},
		{
			Key: grantOf(t, "role", cartRole, "session-name", "shop-cart", "external-id", secretMarker), Active: 4, Tenants: []string{"shop", "pay", "b", "a"},
			AccessKeyID: "ASIACART2", Issued: now.Add(-10 * time.Minute), Expiration: now.Add(50 * time.Minute), NextLook: now.Add(17 * time.Minute),
		},
		{
			Key: grantOf(t, "role", cartRole), Active: 1, AccessKeyID: "ASIACART1", Issued: now.Add(-61 * time.Minute), Expiration: now.Add(-time.Minute),
			Failures: 1, Failure: errors.New("panic with " + secretMarker),
		},
	}
}

type shown struct {
	Matched, Offset int
	LeftOut         int `json:"left_out"`
	Grants          []struct {
		Grant, Role, Reason, Message string
		AccessKeyID                  string  `json:"access_key_id"`
		ExternalID                   bool    `json:"external_id"`
		Remaining                    float64 `json:"remaining_seconds"`
		Pods, Waiters, Failures      int
		Namespaces                   []string
		Fetching                     bool
		Issued, Expiration           time.Time
		NextLook                     time.Time `json:"next_look"`
	}
}

func decode(t *testing.T, w *httptest.ResponseRecorder) (p shown) {
	t.Helper()
	if w.Code != http.StatusOK || w.Header().Get("Content-Type") != "application/json" {
		t.Fatalf("response %d %s: %s", w.Code, w.Header().Get("Content-Type"), w.Body)
	}
	if err := json.Unmarshal(w.Body.Bytes(), &p); err != nil {
		t.Fatal(err)
	}
	return p
}

func TestGrants(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newDesk(t, false, states(t)...)
		w := d.do(t, http.MethodGet, "/debug/grants")
		p := decode(t, w)
		if p.Matched != 3 || len(p.Grants) != 3 || p.LeftOut != 0 {
			t.Fatalf("the page is %+v", p)
		}
		expired, cart, orders := p.Grants[0], p.Grants[1], p.Grants[2]
		if expired.Remaining != 0 || expired.Reason != "INTERNAL" || expired.Message != "" || expired.AccessKeyID != "ASIACART1" {
			t.Errorf("the grant with an expired session is %+v", expired)
		}
		if cart.Role != cartRole || cart.Grant != cartRole+" as shop-cart" || !cart.ExternalID || cart.Remaining != 3000 || cart.Pods != 4 || strings.Join(cart.Namespaces, " ") != "a b pay shop" ||
			!cart.NextLook.Equal(time.Now().Add(17*time.Minute)) || !cart.Issued.Equal(time.Now().Add(-10*time.Minute)) {
			t.Errorf("the grant with a valid session is %+v", cart)
		}
		if orders.Reason != "STS_ACCESS_DENIED" || !strings.HasPrefix(orders.Message, "AWS refuses") || !orders.Fetching || orders.Waiters != 3 || orders.Failures != 2 {
			t.Errorf("the refused grant is %+v", orders)
		}
		if strings.Contains(w.Body.String(), secretMarker) {
			t.Errorf("the page contains a cause or an external ID: %s", w.Body)
		}
		for target, want := range map[string]int{
			"?role=" + url.QueryEscape(cartRole): 2, "?failing=true": 2, "?failing=true&role=" + url.QueryEscape(cartRole): 1,
			"?role=arn:aws:iam::123456789012:role/car": 0,
		} {
			if p := decode(t, d.do(t, http.MethodGet, "/debug/grants"+target)); p.Matched != want || len(p.Grants) != want {
				t.Errorf("%s returns %d of %d grants, want %d", target, len(p.Grants), p.Matched, want)
			}
		}
	})
}

// podsOf has the pods of grants.
type podsOf map[policy.Grant][]string

func (p podsOf) Pods(g policy.Grant) []string { return p[g] }

func (p podsOf) Grant(pod string) (policy.Grant, bool) {
	for g, pods := range p {
		if slices.Contains(pods, pod) {
			return g, true
		}
	}
	return policy.Grant{}, false
}

// The pods of a grant are named in order, as far as they fit, and select it.
func TestPodsOfGrants(t *testing.T) {
	all := states(t)
	var many []string
	for i := range 2 * debugapi.MaxPodNames {
		many = append(many, fmt.Sprintf("shop/cart-%02d", i*7%(2*debugapi.MaxPodNames)))
	}
	handler, err := admin.Debug(admin.DebugConfig{
		Sessions: &sessions{states: all}, Audit: &auditor{}, Logger: slog.New(slog.DiscardHandler),
		Pods: podsOf{all[0].Key: {"shop/orders-1"}, all[1].Key: many},
	})
	if err != nil {
		t.Fatal(err)
	}
	names := func(query string) (names []string) {
		w := httptest.NewRecorder()
		handler.ServeHTTP(w, httptest.NewRequestWithContext(t.Context(), http.MethodGet, "http://localhost/debug/grants?"+query, nil))
		var p debugapi.Page
		if err := json.Unmarshal(w.Body.Bytes(), &p); err != nil {
			t.Fatalf("%s: %d %s", query, w.Code, w.Body)
		}
		for _, g := range p.Grants {
			names = append(names, fmt.Sprint(g.SessionName, g.PodNames))
		}
		return names
	}
	first := slices.Sorted(slices.Values(many))[:debugapi.MaxPodNames]
	for query, want := range map[string][]string{
		"":                                   {"credence[]", fmt.Sprint("shop-cart", first), "credence[shop/orders-1]"},
		"pod=shop/orders-1":                  {"credence[shop/orders-1]"},
		"pod=" + many[len(many)-1]:           {fmt.Sprint("shop-cart", first)},
		"pod=shop/orders-2":                  nil,
		"pod=shop/orders-1&role=" + cartRole: nil,
	} {
		if got := names(query); !slices.Equal(got, want) {
			t.Errorf("%q returns %q, want %q", query, got, want)
		}
	}
}

func TestTable(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newDesk(t, false, states(t)...)
		want := []string{
			"GRANT", "PODS", "ACCESS KEY", "REMAINING", "NEXT",
			cartRole + " as shop-cart", "a,b,pay and 1 more", "ASIACART2", "50m0s", "17m0s", "STS_ACCESS_DENIED", "AWS refuses the role?[2J", "now", "\n3 of 3 grants, from offset 0; 0 left out.\n",
		}
		for name, w := range map[string]*httptest.ResponseRecorder{
			"format": d.do(t, http.MethodGet, "/debug/grants?format=table"),
			"accept": d.do(t, http.MethodGet, "/debug/grants", "Accept", "text/plain"),
		} {
			text := w.Body.String()
			for _, part := range want {
				if !strings.Contains(text, part) {
					t.Errorf("%s: the table lacks %q:\n%s", name, part, text)
				}
			}
			if strings.ContainsAny(text, "\x1b") || strings.Contains(text, secretMarker) || !strings.HasPrefix(w.Header().Get("Content-Type"), "text/plain") {
				t.Errorf("%s: the table is %q", name, text)
			}
		}
		decode(t, d.do(t, http.MethodGet, "/debug/grants?format=json", "Accept", "text/plain"))
	})
}

func TestPages(t *testing.T) {
	var many []admin.State
	for i := range 1203 {
		many = append(many, admin.State{Key: grantOf(t, "role", fmt.Sprintf("arn:aws:iam::123456789012:role/r%04d", i))})
	}
	d := newDesk(t, false, many...)
	seen := map[string]bool{}
	for offset, want := range map[int]int{0: 500, 500: 500, 1000: 203, 5000: 0} {
		p := decode(t, d.do(t, http.MethodGet, fmt.Sprintf("/debug/grants?offset=%d", offset)))
		if len(p.Grants) != want || p.Offset+len(p.Grants)+p.LeftOut != 1203 || p.Matched != 1203 {
			t.Errorf("offset %d: %d grants, %d left out", offset, len(p.Grants), p.LeftOut)
		}
		for _, g := range p.Grants {
			seen[g.Role] = true
		}
	}
	if len(seen) != 1203 {
		t.Errorf("all pages have %d grants", len(seen))
	}
	if text := d.do(t, http.MethodGet, "/debug/grants?format=table&limit=2").Body.String(); !strings.Contains(text, "2 of 1203 grants, from offset 0; 1201 left out: use offset=2, or one role") {
		t.Errorf("the table ends with %q", text[max(len(text)-100, 0):])
	}
	for _, bad := range []string{"limit=0", "limit=10001", "limit=x", "offset=-1", "format=xml", "failing=perhaps", "role=cart", "rloe=x", "pod=cart", "pod=/cart", "pod=shop/", "limit=1&limit=2"} {
		if w := d.do(t, http.MethodGet, "/debug/grants?"+bad); w.Code != http.StatusBadRequest || w.Body.Len() > 300 {
			t.Errorf("%s: %d %s", bad, w.Code, w.Body)
		}
	}
}

func TestCommands(t *testing.T) {
	for _, command := range []audit.Decision{audit.Renew, audit.Drop} {
		d := newDesk(t, false, states(t)...)
		w := d.do(t, http.MethodPost, "/debug/grants/"+string(command)+"?role="+url.QueryEscape(cartRole))
		var result struct {
			Role, Order string
			Sessions    int
		}
		if err := json.Unmarshal(w.Body.Bytes(), &result); err != nil || w.Code != http.StatusOK || result.Role != cartRole || result.Order != string(command) || result.Sessions != 2 {
			t.Errorf("%s: %d %s", command, w.Code, w.Body)
		}
		if len(d.done) != 1 || d.done[0] != string(command)+" 2" {
			t.Errorf("%s: carried out: %v", command, d.done)
		}
		if len(d.entries) != 1 || d.entries[0].Decision != command || d.entries[0].Role != cartRole || d.entries[0].Peer == "" {
			t.Errorf("%s: audit entries: %+v", command, d.entries)
		}
		if text := d.log.String(); !strings.Contains(text, `"level":"INFO"`) || !strings.Contains(text, cartRole) || !strings.Contains(text, `"sessions":2`) || !strings.Contains(text, `"command":"`+string(command)) {
			t.Errorf("%s: log: %s", command, text)
		}
	}
}

func TestRefusedCommands(t *testing.T) {
	role := "?role=" + url.QueryEscape(cartRole)
	for name, tt := range map[string]struct {
		method, target string
		header         []string
		code           int
	}{
		"over GET":            {http.MethodGet, "/debug/grants/drop" + role, nil, http.StatusMethodNotAllowed},
		"over HEAD":           {http.MethodHead, "/debug/grants/drop" + role, nil, http.StatusMethodNotAllowed},
		"for all roles":       {http.MethodPost, "/debug/grants/drop", nil, http.StatusBadRequest},
		"for an empty role":   {http.MethodPost, "/debug/grants/drop?role=", nil, http.StatusBadRequest},
		"for a name":          {http.MethodPost, "/debug/grants/drop?role=cart", nil, http.StatusBadRequest},
		"for a pattern":       {http.MethodPost, "/debug/grants/drop?role=arn:aws:iam::123456789012:role/*", nil, http.StatusBadRequest},
		"for two roles":       {http.MethodPost, "/debug/grants/drop" + role + "&role=" + ordersARN, nil, http.StatusBadRequest},
		"with more":           {http.MethodPost, "/debug/grants/drop" + role + "&force=true", nil, http.StatusBadRequest},
		"to a foreign name":   {http.MethodPost, "/debug/grants/drop" + role, []string{"Host", "rebound.example.com:8081"}, http.StatusForbidden},
		"to a name like ours": {http.MethodPost, "/debug/grants/drop" + role, []string{"Host", "localhost.example.com"}, http.StatusForbidden},
		"to another address":  {http.MethodPost, "/debug/grants/drop" + role, []string{"Host", "10.0.0.1:8081"}, http.StatusForbidden},
		"to no host":          {http.MethodPost, "/debug/grants/drop" + role, []string{"Host", ""}, http.StatusForbidden},
		"from a page":         {http.MethodPost, "/debug/grants/drop" + role, []string{"Origin", "https://example.com"}, http.StatusForbidden},
		"from our own page":   {http.MethodPost, "/debug/grants/drop" + role, []string{"Origin", "http://localhost:8081"}, http.StatusForbidden},
		"from a page, silent": {http.MethodPost, "/debug/grants/drop" + role, []string{"Sec-Fetch-Site", "cross-site"}, http.StatusForbidden},
		"elsewhere":           {http.MethodPost, "/debug/grants", nil, http.StatusMethodNotAllowed},
	} {
		d := newDesk(t, false, states(t)...)
		w := d.do(t, tt.method, tt.target, tt.header...)
		if w.Code != tt.code || len(d.done) > 0 || len(d.entries) > 0 {
			t.Errorf("%s: %d %s, carried out: %v", name, w.Code, w.Body, d.done)
		}
		if tt.code == http.StatusForbidden {
			if w := d.do(t, http.MethodGet, "/debug/grants", tt.header...); w.Code != http.StatusForbidden || strings.Contains(w.Body.String(), "ASIA") {
				t.Errorf("%s: GET /debug/grants: %d", name, w.Code)
			}
		}
	}
	d := newDesk(t, false, states(t)...)
	d.err = credential.Errorf(credential.ErrUnavailable, credential.ReasonAuditUnavailable, "no audit")
	if w := d.do(t, http.MethodPost, "/debug/grants/drop"+role); w.Code != http.StatusServiceUnavailable || len(d.done) > 0 {
		t.Errorf("without audit: %d, carried out: %v", w.Code, d.done)
	}
}

// TestCommandsWithToken carries out a command only if the holder of its token may send commands. Pages need no token.
func TestCommandsWithToken(t *testing.T) {
	unavailable := credential.Errorf(credential.ErrUnavailable, credential.ReasonAPIServerUnavailable, "try again")
	unavailable.Cause = errors.New(secretMarker)
	for _, tt := range []struct {
		header string
		err    error
		status int
		text   string
	}{
		{"Bearer good", nil, http.StatusOK, ""},
		{"Bearer bad", credential.Errorf(credential.ErrUnauthenticated, credential.ReasonTokenInvalid, "no token of ours"), http.StatusUnauthorized, "no token of ours"},
		{"", credential.Errorf(credential.ErrUnauthenticated, credential.ReasonTokenMissing, "there is no token"), http.StatusUnauthorized, "there is no token"},
		{"Bearer good", unavailable, http.StatusServiceUnavailable, "try again"},
		{"Bearer good", errors.New(secretMarker), http.StatusUnauthorized, "could not be verified"},
	} {
		s, log, got := &sessions{}, &auditor{}, ""
		handler, err := admin.Debug(admin.DebugConfig{Sessions: s, Audit: log, Logger: slog.New(slog.DiscardHandler), Authorize: func(_ context.Context, token identity.UnverifiedToken) error {
			got = token.Reveal()
			return tt.err
		}})
		if err != nil {
			t.Fatal(err)
		}
		for method, path := range map[string]string{http.MethodPost: "/debug/grants/drop?role=" + url.QueryEscape(cartRole), http.MethodGet: "/debug/grants"} {
			r := httptest.NewRequestWithContext(t.Context(), method, path, nil)
			r.Host = "localhost"
			r.Header.Set("Authorization", tt.header)
			w := httptest.NewRecorder()
			handler.ServeHTTP(w, r)
			want := tt.status
			if method == http.MethodGet {
				want = http.StatusOK
			}
			if w.Code != want || method == http.MethodPost && !strings.Contains(w.Body.String(), tt.text) || strings.Contains(w.Body.String(), secretMarker) {
				t.Errorf("%s with %q: status %d, %q; want %d", method, tt.header, w.Code, w.Body, want)
			}
		}
		if done := len(s.done) + len(log.entries); (done == 2) != (tt.status == http.StatusOK) || got != strings.TrimPrefix(tt.header, "Bearer ") {
			t.Errorf("%q: %d effects, token %q", tt.header, done, got)
		}
	}
}

func TestHosts(t *testing.T) {
	for host, want := range map[string][2]bool{ // on loopback, and with AnyAddress
		"localhost":        {true, true},
		"localhost:18081":  {true, true},
		"127.0.0.1:8081":   {true, true},
		"127.9.9.9":        {true, true},
		"[::1]:8081":       {true, true},
		"[::1]":            {true, true},
		"10.1.2.3:8081":    {false, true},
		"[fd00::1]:8081":   {false, true},
		"example.com":      {false, false},
		"127.0.0.1.nip.io": {false, false},
		"localhost.":       {false, false},
		"credence-broker":  {false, false},
		"[::1]evil.com":    {false, false},
	} {
		for i, anyAddress := range []bool{false, true} {
			w := newDesk(t, anyAddress).do(t, http.MethodGet, "/debug/grants", "Host", host)
			if got := w.Code == http.StatusOK; got != want[i] {
				t.Errorf("%q, any address %v: %d", host, anyAddress, w.Code)
			}
		}
	}
}

func TestProfiles(t *testing.T) {
	d := newDesk(t, false)
	for path, want := range map[string]string{
		"/debug/pprof/": "goroutine", "/debug/pprof/goroutine?debug=1": "goroutine profile", "/debug/pprof/heap?debug=1": "heap profile", "/debug/pprof/cmdline": "admin",
	} {
		if w := d.do(t, http.MethodGet, path); w.Code != http.StatusOK || !strings.Contains(w.Body.String(), want) {
			t.Errorf("%s: %d %.100s", path, w.Code, w.Body)
		}
	}
}

func TestLoopback(t *testing.T) {
	for text, want := range map[string]bool{"127.0.0.1": true, "::1": true, "0.0.0.0": false, "::": false, "10.0.0.1": false} {
		if got := admin.Loopback(&net.TCPAddr{IP: net.ParseIP(text)}); got != want {
			t.Errorf("%s: %v", text, got)
		}
	}
	if admin.Loopback(&net.UnixAddr{}) {
		t.Error("an address that is not TCP counts as loopback")
	}
	if _, err := admin.Debug(admin.DebugConfig{}); err == nil {
		t.Error("Debug accepts an empty configuration")
	}
}
