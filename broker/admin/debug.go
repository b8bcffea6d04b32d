package admin

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/pprof"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"
	"unicode"

	"github.com/gorilla/mux"

	"github.com/credence-iam/credence/broker/audit"
	"github.com/credence-iam/credence/broker/cache"
	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/broker/debugapi"
	"github.com/credence-iam/credence/broker/identity"
	"github.com/credence-iam/credence/broker/policy"
)

// State is the state of one grant in the cache. It contains no secret.
type State = cache.State[policy.Grant]

// Sessions is the cache, as far as the debug pages use it.
type Sessions interface {
	States(match func(policy.Grant) bool) []State
	Renew(match func(policy.Grant) bool) int
	Drop(match func(policy.Grant) bool) int
}

// Pods knows the grants that are renewed for pods. A pod is namespace/name. Pods returns them in any order.
type Pods interface {
	Grant(pod string) (grant policy.Grant, ok bool)
	Pods(grant policy.Grant) []string
}

// DebugConfig configures [Debug].
type DebugConfig struct {
	// Sessions are shown and changed. Required.
	Sessions Sessions
	// Pods knows which grants are renewed for which pods. Default: the pages name no pods.
	Pods Pods
	// Audit records each command before it takes effect. Required.
	Audit interface{ Record(audit.Entry) error }
	// Logger receives each command. Required.
	Logger *slog.Logger
	// Authorize returns nil if the holder of a token may send commands. Its error is shown to the client. Nil: every client
	// that reaches the listener may.
	Authorize func(context.Context, identity.UnverifiedToken) error
	// AnyAddress accepts any address as Host, for a listener that is deliberately not on loopback. Names other than
	// localhost are still refused, because a web page can make a browser use a name.
	AnyAddress bool
}

// Limits of one page of grants. A grant takes some 600 bytes of JSON, and the names of its pods at most 7 kB.
const (
	defaultGrants = 500
	maxGrants     = debugapi.MaxGrants
)

// Debug returns a handler that serves
//
//	GET  /debug/grants                  the state of each grant
//	POST /debug/grants/renew?role=ARN   renew the sessions of one role
//	POST /debug/grants/drop?role=ARN    drop them, then fetch new ones
//	GET  /debug/pprof/                  profiles of the process
//
// Grants are JSON, or a table with ?format=table or Accept: text/plain. ?role=ARN selects those of one role,
// ?pod=NAMESPACE/NAME the one that is renewed for that pod, ?failing=true those whose last fetch failed, ?limit=N&offset=N
// a page. The pages serve every client that reaches them, without
// authentication, except that commands can need a token, in the header Authorization: Bearer. They refuse requests that a
// browser sends on behalf of a web page, by Host and Origin.
func Debug(cfg DebugConfig) (http.Handler, error) {
	if cfg.Sessions == nil || cfg.Audit == nil || cfg.Logger == nil {
		return nil, errors.New("debug pages need Sessions, an Audit log and a Logger")
	}
	d := debug{cfg}
	router := mux.NewRouter()
	router.HandleFunc(debugapi.GrantsPath, d.grants).Methods(http.MethodGet)
	router.HandleFunc(debugapi.RenewPath, func(w http.ResponseWriter, r *http.Request) {
		d.command(w, r, audit.Renew, cfg.Sessions.Renew)
	}).Methods(http.MethodPost)
	router.HandleFunc(debugapi.DropPath, func(w http.ResponseWriter, r *http.Request) {
		d.command(w, r, audit.Drop, cfg.Sessions.Drop)
	}).Methods(http.MethodPost)
	// Package pprof also registers these in http.DefaultServeMux, which nothing here serves.
	for path, handler := range map[string]http.HandlerFunc{
		"/debug/pprof/cmdline": pprof.Cmdline, "/debug/pprof/profile": pprof.Profile, "/debug/pprof/symbol": pprof.Symbol, "/debug/pprof/trace": pprof.Trace,
	} {
		router.HandleFunc(path, withoutDeadline(handler)).Methods(http.MethodGet)
	}
	router.PathPrefix("/debug/pprof/").HandlerFunc(withoutDeadline(pprof.Index)).Methods(http.MethodGet)
	return d.guard(router), nil
}

type debug struct{ cfg DebugConfig }

// withoutDeadline lifts the read deadline, at which net/http would cut off a running profile.
func withoutDeadline(handler http.HandlerFunc) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		_ = http.NewResponseController(w).SetReadDeadline(time.Time{}) // An error means that there is no deadline.
		handler(w, r)
	}
}

// guard refuses requests that a web page makes a browser send. If the page uses its own name for our address (DNS
// rebinding), Host has that name. If it uses our address, Origin or Sec-Fetch-Site shows the page.
func (d debug) guard(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch {
		case !d.trustedHost(r.Host):
			writeText(w, http.StatusForbidden, "the Host header must be 127.0.0.1, [::1] or localhost")
		case r.Header.Get("Origin") != "" || !slices.Contains([]string{"", "none", "same-origin"}, r.Header.Get("Sec-Fetch-Site")):
			writeText(w, http.StatusForbidden, "requests from web pages are refused")
		default:
			w.Header().Set("X-Content-Type-Options", "nosniff")
			w.Header().Set("Cache-Control", "no-store")
			next.ServeHTTP(w, r)
		}
	})
}

// trustedHost reports whether host is an address or localhost, and not a name of a foreign web site.
func (d debug) trustedHost(host string) bool {
	if name, _, err := net.SplitHostPort(host); err == nil {
		host = name
	}
	if host == "localhost" {
		return true
	}
	ip := net.ParseIP(strings.TrimSuffix(strings.TrimPrefix(host, "["), "]"))
	return ip != nil && (ip.IsLoopback() || d.cfg.AnyAddress)
}

func (d debug) grants(w http.ResponseWriter, r *http.Request) {
	query, err := parse(r.URL.Query())
	if err != nil {
		writeText(w, http.StatusBadRequest, err.Error())
		return
	}
	now := time.Now()
	var ofPod policy.Grant // no entry of the cache has the zero grant
	if query.pod != "" && d.cfg.Pods != nil {
		ofPod, _ = d.cfg.Pods.Grant(query.pod)
	}
	var matched []State
	selected := func(g policy.Grant) bool {
		return (query.role == "" || g.Role().String() == query.role) && (query.pod == "" || g == ofPod)
	}
	for _, s := range d.cfg.Sessions.States(selected) {
		if !query.failing || s.Failure != nil {
			matched = append(matched, s)
		}
	}
	slices.SortFunc(matched, func(a, b State) int {
		return cmp.Or(cmp.Compare(a.Key.String(), b.Key.String()), cmp.Compare(a.AccessKeyID, b.AccessKeyID))
	})
	p := debugapi.Page{Time: now.UTC(), Matched: len(matched), Offset: min(query.offset, len(matched)), Grants: []debugapi.Grant{}}
	shown := matched[p.Offset:]
	shown = shown[:min(len(shown), query.limit)]
	p.LeftOut = len(matched) - p.Offset - len(shown)
	for _, s := range shown {
		g := show(s, now)
		if d.cfg.Pods != nil {
			g.PodNames = slices.Sorted(slices.Values(d.cfg.Pods.Pods(s.Key)))
			g.PodNames = g.PodNames[:min(len(g.PodNames), debugapi.MaxPodNames)]
		}
		p.Grants = append(p.Grants, g)
	}
	if query.format == "table" || query.format == "" && strings.HasPrefix(r.Header.Get("Accept"), "text/plain") {
		w.Header().Set("Content-Type", "text/plain; charset=utf-8")
		table(w, p, now)
		return
	}
	writeJSON(w, p)
}

// query holds the parameters of /debug/grants.
type query struct {
	role, format  string
	pod           string // namespace/name
	failing       bool
	limit, offset int
}

func parse(values url.Values) (q query, err error) {
	q.limit = defaultGrants
	for key, all := range values {
		if len(all) != 1 {
			return query{}, fmt.Errorf("parameter %.20q occurs %d times; use it once", key, len(all))
		}
		value := all[0]
		switch key {
		case "role":
			q.role, err = roleOf(value)
		case "pod":
			q.pod = value
			if namespace, name, ok := strings.Cut(value, "/"); !ok || namespace == "" || name == "" {
				err = fmt.Errorf("pod=%.20q: must be NAMESPACE/NAME", value)
			}
		case "format":
			if q.format = value; value != "table" && value != "json" {
				err = fmt.Errorf("format=%.20q: must be table or json", value)
			}
		case "failing":
			if q.failing, err = strconv.ParseBool(value); err != nil {
				err = fmt.Errorf("failing=%.20q: must be true or false", value)
			}
		case "limit":
			if q.limit, err = strconv.Atoi(value); err != nil || q.limit < 1 || q.limit > maxGrants {
				err = fmt.Errorf("limit=%.20q: must be from 1 to %d", value, maxGrants)
			}
		case "offset":
			if q.offset, err = strconv.Atoi(value); err != nil || q.offset < 0 {
				err = fmt.Errorf("offset=%.20q: must be a number of grants", value)
			}
		default:
			err = fmt.Errorf("unknown parameter %.20q; use role, pod, failing, format, limit or offset", key)
		}
		if err != nil {
			return query{}, err
		}
	}
	return q, nil
}

// roleOf parses a role ARN, and returns it in the form that grants use.
func roleOf(text string) (string, error) {
	role, err := credential.ParseRoleARN(text)
	if err != nil {
		return "", fmt.Errorf("role must be the full ARN of one role: %w", err)
	}
	return role.String(), nil
}

// show returns the form of s on the pages.
func show(s State, now time.Time) debugapi.Grant {
	g := debugapi.Grant{
		Grant: s.Key.String(), Role: s.Key.Role().String(), SessionName: s.Key.SessionName(), Duration: s.Key.Duration().Seconds(),
		ExternalID: s.Key.ExternalID() != "", SessionPolicy: s.Key.SessionPolicy() != "", PolicyARNs: len(s.Key.PolicyARNs()), Tags: len(s.Key.Tags()),
		Pods: s.Active, Namespaces: slices.Sorted(slices.Values(s.Tenants)), AccessKeyID: s.AccessKeyID, Issued: timeOrNil(s.Issued), Expiration: timeOrNil(s.Expiration),
		NextLook: timeOrNil(s.NextLook), Fetching: s.Fetching, Waiters: s.Waiters, Failures: s.Failures, NotBefore: timeOrNil(s.NotBefore),
	}
	if !s.Expiration.IsZero() {
		g.RemainingSeconds = max(s.Expiration.Sub(now), 0).Round(time.Second).Seconds()
	}
	if s.Failure != nil {
		g.Reason = string(credential.ReasonOf(s.Failure))
		// Messages are for users. Other errors, and causes, are only in the log.
		if e, ok := errors.AsType[*credential.Error](s.Failure); ok {
			g.Message = e.Message
		}
	}
	return g
}

// timeOrNil returns t for JSON, nil for a zero t.
func timeOrNil(t time.Time) *time.Time {
	if t.IsZero() {
		return nil
	}
	t = t.UTC()
	return &t
}

// table writes p as a table. The message comes last, because it is long.
func table(w io.Writer, p debugapi.Page, now time.Time) {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	_, _ = fmt.Fprintln(t, "GRANT\tNAMESPACES\tPODS\tACCESS KEY\tREMAINING\tNEXT\tWAITERS\tFAILURES\tREASON\tMESSAGE")
	for _, g := range p.Grants {
		remaining, next := "-", "-"
		if g.Expiration != nil {
			remaining = (time.Duration(g.RemainingSeconds) * time.Second).String()
		}
		switch {
		case g.Fetching:
			next = "now"
		case g.NextLook != nil:
			next = g.NextLook.Sub(now).Round(time.Second).String()
		}
		_, _ = fmt.Fprintf(t, "%s\t%s\t%d\t%s\t%s\t%s\t%d\t%d\t%s\t%s\n", printable(g.Grant), printable(namespaces(g.Namespaces)), g.Pods, printable(cmp.Or(g.AccessKeyID, "-")), remaining, next,
			g.Waiters, g.Failures, printable(cmp.Or(g.Reason, "-")), printable(g.Message))
	}
	_ = t.Flush() // A client that has disconnected does not matter.
	_, _ = fmt.Fprintf(w, "\n%d of %d grants, from offset %d; %d left out", len(p.Grants), p.Matched, p.Offset, p.LeftOut)
	if p.LeftOut > 0 {
		_, _ = fmt.Fprintf(w, ": use offset=%d, or one role", p.Offset+len(p.Grants))
	}
	_, _ = fmt.Fprintln(w, ".")
}

// namespaces returns the first names and how many more there are: all namespaces may use a role.
func namespaces(names []string) string {
	const limit = 3
	if len(names) > limit {
		return fmt.Sprintf("%s and %d more", strings.Join(names[:limit], ","), len(names)-limit)
	}
	return cmp.Or(strings.Join(names, ","), "-")
}

// printable replaces characters with which users could move the reader's cursor.
func printable(text string) string {
	return strings.Map(func(r rune) rune {
		if unicode.IsPrint(r) {
			return r
		}
		return '?'
	}, text)
}

// command runs a command on the sessions of one role. If it cannot be audited although audit is required, it has no
// effect.
func (d debug) command(w http.ResponseWriter, r *http.Request, what audit.Decision, do func(func(policy.Grant) bool) int) {
	values := r.URL.Query()
	if len(values) != 1 || len(values["role"]) != 1 {
		writeText(w, http.StatusBadRequest, "exactly one parameter is required: ?role=ARN")
		return
	}
	role, err := roleOf(values.Get("role"))
	if err != nil {
		writeText(w, http.StatusBadRequest, err.Error())
		return
	}
	if d.cfg.Authorize != nil {
		token, _ := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
		if err := d.cfg.Authorize(r.Context(), identity.NewUnverifiedToken(token)); err != nil {
			status := http.StatusUnauthorized
			if errors.Is(err, credential.ErrUnavailable) {
				status = http.StatusServiceUnavailable
			}
			message := "the token could not be verified"
			if e, ok := errors.AsType[*credential.Error](err); ok {
				message = e.Message // Causes are only in the log.
			}
			d.cfg.Logger.WarnContext(r.Context(), "Refused a command", "command", what, "role", role, "peer", r.RemoteAddr, "error", err)
			writeText(w, status, "a command needs a token (docs/operations.md): "+message)
			return
		}
	}
	if err := d.cfg.Audit.Record(audit.Entry{Decision: what, Role: role, Peer: r.RemoteAddr}); err != nil {
		writeText(w, http.StatusServiceUnavailable, err.Error())
		return
	}
	n := do(func(g policy.Grant) bool { return g.Role().String() == role })
	d.cfg.Logger.InfoContext(r.Context(), "Carried out a command", "command", what, "role", role, "sessions", n, "peer", r.RemoteAddr)
	writeJSON(w, debugapi.Result{Role: role, Order: string(what), Sessions: n})
}

func writeJSON(w http.ResponseWriter, value any) {
	w.Header().Set("Content-Type", "application/json")
	encoder := json.NewEncoder(w)
	encoder.SetIndent("", "  ")
	_ = encoder.Encode(value) // A client that has disconnected does not matter.
}

// Loopback reports whether only this host or this pod can reach addr.
func Loopback(addr net.Addr) bool {
	tcp, ok := addr.(*net.TCPAddr)
	return ok && tcp.IP.IsLoopback()
}
