// Package dashboard is a page in a browser with the state of Credence in a cluster: health, sessions and their time left,
// STS, refusals with pods and remedies, brokers, and the budget of STS calls.
//
// [Gatherer] reads a [view.Snapshot] from the cluster, package view makes the page of snapshots, and [Dashboard] serves it by
// HTTP.
//
// It guarantees: it changes nothing in the cluster; a browser loads nothing from another host; only a request with the
// path that New made gets a page, and a request from another web site gets none; text from the cluster never becomes HTML;
// it reads from the cluster only while somebody looks at the page; memory is bounded.
package dashboard

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/subtle"
	"embed"
	"errors"
	"fmt"
	"html/template"
	"io/fs"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"
	"unicode"

	"golang.org/x/sync/errgroup"

	"github.com/credence-iam/credence/operator/dashboard/view"
)

const (
	// interval is the time between two snapshots while a page is open. A large cluster gets more time: see run.
	interval = 10 * time.Second
	// open is how long after a request a page counts as open. It refreshes itself every [interval], or every 15 s without
	// JavaScript.
	open = 40 * time.Second
	// patience is how long a request waits for the first snapshot.
	patience = 3 * time.Second
	// gatherTimeout limits one snapshot.
	gatherTimeout = time.Minute
)

// Config configures [New].
type Config struct {
	// Gather returns the present state of the cluster. It is called by one goroutine at a time. Required.
	Gather func(context.Context) view.Snapshot
	// Location is the time zone of the times on the page. Default: the local one.
	Location *time.Location
}

// Dashboard serves the page. Make it with [New].
type Dashboard struct {
	cfg   Config
	token string // first part of each path
	asked chan struct{}

	mu      sync.Mutex
	latest  view.Snapshot // guarded by mu
	history view.History  // guarded by mu
	first   chan struct{} // closed when there is a snapshot
	seen    time.Time     // of the last request; guarded by mu
}

// New returns a dashboard without a snapshot yet.
func New(cfg Config) (*Dashboard, error) {
	if cfg.Gather == nil {
		return nil, errors.New("a dashboard needs the function Gather")
	}
	if cfg.Location == nil {
		cfg.Location = time.Local
	}
	return &Dashboard{cfg: cfg, token: rand.Text(), asked: make(chan struct{}, 1), first: make(chan struct{})}, nil
}

// Path returns the path of the page. It has 128 random bits, so that other users of this machine do not find it.
func (d *Dashboard) Path() string { return "/" + d.token + "/" }

// run reads from the cluster until ctx ends: once at the start, and then every [interval] while a page is open. If a
// snapshot takes long, it waits four times as long, so that it uses a fifth of the time.
func (d *Dashboard) run(ctx context.Context) error {
	for {
		begin := time.Now()
		gathering, cancel := context.WithTimeout(ctx, gatherTimeout)
		snapshot := d.cfg.Gather(gathering)
		cancel()
		if ctx.Err() != nil {
			return nil
		}
		d.store(snapshot)
		wait := time.NewTimer(max(interval, 4*time.Since(begin)))
		select {
		case <-ctx.Done():
			wait.Stop()
			return nil
		case <-wait.C:
		}
		if !d.isOpen() {
			select {
			case <-ctx.Done():
				return nil
			case <-d.asked:
			}
		}
	}
}

func (d *Dashboard) store(s view.Snapshot) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.latest = s.After(d.latest)
	d.history = d.history.With(d.latest)
	select {
	case <-d.first:
	default:
		close(d.first)
	}
}

// isOpen reports whether a page is open. If none is, it forgets earlier requests, so that the next one wakes run.
func (d *Dashboard) isOpen() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	if time.Since(d.seen) < open {
		return true
	}
	select {
	case <-d.asked:
	default:
	}
	return false
}

// state returns the latest snapshot and those before it. It waits a moment for the first one.
func (d *Dashboard) state(ctx context.Context) (view.Snapshot, view.History) {
	d.mu.Lock()
	d.seen = time.Now()
	d.mu.Unlock()
	select {
	case d.asked <- struct{}{}:
	default:
	}
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	select {
	case <-d.first:
	case <-ctx.Done():
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.latest, slices.Clone(d.history)
}

//go:embed assets
var assets embed.FS

var page = template.Must(template.ParseFS(assets, "assets/page.html"))

// kinds are the content types of the files beside the page.
var kinds = map[string]string{"style.css": "text/css; charset=utf-8", "page.js": "text/javascript; charset=utf-8", "icon.svg": "image/svg+xml"}

// policy lets a browser load nothing but the files beside the page.
const policy = "default-src 'none'; style-src 'self'; script-src 'self'; img-src 'self'; connect-src 'self'; " +
	"form-action 'self'; base-uri 'none'; frame-ancestors 'none'"

// Limits of a request. The only client is a browser on this machine.
const (
	requestTime = 10 * time.Second
	maxHeaders  = 16 << 10
	drainTime   = 2 * time.Second
)

// Serve serves the page on a listener, which should be on loopback, and reads from the cluster, until ctx ends.
func (d *Dashboard) Serve(ctx context.Context, listener net.Listener) error {
	server := &http.Server{
		Handler: d, ReadTimeout: requestTime, ReadHeaderTimeout: requestTime, WriteTimeout: requestTime + patience, IdleTimeout: time.Minute, MaxHeaderBytes: maxHeaders,
	}
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return d.run(ctx) })
	group.Go(func() error {
		if err := server.Serve(listener); !errors.Is(err, http.ErrServerClosed) {
			return fmt.Errorf("serving the dashboard: %w", err)
		}
		return nil
	})
	group.Go(func() error {
		<-ctx.Done()
		drain, cancel := context.WithTimeout(context.WithoutCancel(ctx), drainTime)
		defer cancel()
		return server.Shutdown(drain)
	})
	return group.Wait()
}

// ServeHTTP serves the page to the browser of the person who has its path.
func (d *Dashboard) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	h := w.Header()
	for name, value := range map[string]string{
		"Cache-Control": "no-store", "Content-Security-Policy": policy, "Cross-Origin-Opener-Policy": "same-origin",
		"Cross-Origin-Resource-Policy": "same-origin", "Referrer-Policy": "no-referrer", "X-Content-Type-Options": "nosniff", "X-Frame-Options": "DENY",
	} {
		h.Set(name, value)
	}
	token, file, found := strings.Cut(strings.TrimPrefix(r.URL.Path, "/"), "/")
	switch {
	case !loopback(r.Host):
		http.Error(w, "the Host header must be 127.0.0.1, [::1] or localhost", http.StatusForbidden)
	case foreign(r):
		http.Error(w, "requests from other web sites are refused", http.StatusForbidden)
	case r.Method != http.MethodGet && r.Method != http.MethodHead:
		h.Set("Allow", "GET, HEAD")
		http.Error(w, "the dashboard only shows; use GET", http.StatusMethodNotAllowed)
	case !found || subtle.ConstantTimeCompare([]byte(token), []byte(d.token)) != 1:
		http.Error(w, "not found; use the whole URL that credence dashboard printed", http.StatusNotFound)
	case file == "":
		d.page(w, r)
	case kinds[file] != "":
		h.Set("Content-Type", kinds[file])
		content, _ := fs.ReadFile(assets, "assets/"+file) // A test reads each.
		_, _ = w.Write(content)                           //nolint:gosec // G705: it is a file of ours.
	default:
		http.Error(w, "not found", http.StatusNotFound)
	}
}

func (d *Dashboard) page(w http.ResponseWriter, r *http.Request) {
	latest, before := d.state(r.Context())
	var text bytes.Buffer
	if err := page.Execute(&text, view.Of(latest, before, view.ChoiceOf(r.URL.Query()), time.Now().In(d.cfg.Location))); err != nil {
		http.Error(w, "the page cannot be shown: "+err.Error(), http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "text/html; charset=utf-8")
	_, _ = w.Write(bytes.Map(visible, text.Bytes()))
}

// visible replaces characters that show nothing, or change the direction of the text that follows. Everybody who may write
// annotations can send them.
func visible(r rune) rune {
	if r == '\n' || unicode.IsPrint(r) {
		return r
	}
	return '?'
}

// loopback reports whether host is this machine. If a web site uses its own name for our address, Host has that name.
func loopback(host string) bool {
	if name, _, err := net.SplitHostPort(host); err == nil {
		host = name
	}
	ip := net.ParseIP(strings.Trim(host, "[]"))
	return host == "localhost" || ip != nil && ip.IsLoopback()
}

// foreign reports whether another web site makes the browser send r. If a user follows a link from one, there is no page
// either: the link has no token, and a browser would be at fault to show one that has.
func foreign(r *http.Request) bool {
	origin := r.Header.Get("Origin")
	return origin != "" && origin != "http://"+r.Host ||
		!slices.Contains([]string{"", "none", "same-origin"}, r.Header.Get("Sec-Fetch-Site"))
}
