package dashboard_test

import (
	"context"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/credence-iam/credence/operator/dashboard"
	"github.com/credence-iam/credence/operator/dashboard/view"
)

// get sends a request as a browser does.
func get(t testing.TB, d *dashboard.Dashboard, method, host, path string, header map[string]string) *httptest.ResponseRecorder {
	t.Helper()
	r := httptest.NewRequestWithContext(t.Context(), method, path, nil)
	r.Host = host
	for name, value := range header {
		r.Header.Set(name, value)
	}
	w := httptest.NewRecorder()
	d.ServeHTTP(w, r)
	return w
}

// text returns the page.
func text(t testing.TB, d *dashboard.Dashboard, query string) string {
	t.Helper()
	r := get(t, d, http.MethodGet, "127.0.0.1:8000", d.Path()+query, nil)
	if r.Code != http.StatusOK {
		t.Fatalf("the page has status %d", r.Code)
	}
	return r.Body.String()
}

// TestGuard serves the page only to the browser of the person who has its URL.
func TestGuard(t *testing.T) {
	d := show(t, situations(t)["healthy"])
	const here = "127.0.0.1:8000"
	for _, tt := range []struct {
		name, method, host, path string
		header                   map[string]string
		want                     int
	}{
		{"the page", "GET", here, d.Path(), nil, 200},
		{"its headers", "HEAD", here, d.Path(), nil, 200},
		{"localhost", "GET", "localhost:8000", d.Path(), nil, 200},
		{"IPv6", "GET", "[::1]:8000", d.Path(), nil, 200},
		{"its own script", "GET", here, d.Path(), map[string]string{"Origin": "http://" + here, "Sec-Fetch-Site": "same-origin"}, 200},
		{"typed into the browser", "GET", here, d.Path(), map[string]string{"Sec-Fetch-Site": "none"}, 200},
		{"its style", "GET", here, d.Path() + "style.css", nil, 200},
		{"its script's file", "GET", here, d.Path() + "page.js", nil, 200},
		{"its icon", "GET", here, d.Path() + "icon.svg", nil, 200},
		{"its template", "GET", here, d.Path() + "page.html", nil, 404},
		{"another file", "GET", here, d.Path() + "../../etc/passwd", nil, 404},
		{"no path", "GET", here, "/", nil, 404},
		{"no token", "GET", here, "//", nil, 404},
		{"a prefix of the token", "GET", here, d.Path()[:10] + "/", nil, 404},
		{"another token", "GET", here, "/" + strings.Repeat("A", len(d.Path())-2) + "/", nil, 404},
		{"a style without the token", "GET", here, "/style.css", nil, 404},
		{"a name of a web site", "GET", "evil.example:8000", d.Path(), nil, 403},
		{"an address elsewhere", "GET", "192.0.2.1:8000", d.Path(), nil, 403},
		{"no host", "GET", "", d.Path(), nil, 403},
		{"a script of a web site", "GET", here, d.Path(), map[string]string{"Origin": "http://evil.example"}, 403},
		{"a script of a file", "GET", here, d.Path(), map[string]string{"Origin": "null"}, 403},
		{"another port of this machine", "GET", here, d.Path(), map[string]string{"Sec-Fetch-Site": "same-site"}, 403},
		{"a link of a web site", "GET", here, d.Path(), map[string]string{"Sec-Fetch-Site": "cross-site"}, 403},
		{"a command", "POST", here, d.Path(), nil, 405},
		{"a deletion", "DELETE", here, d.Path(), nil, 405},
	} {
		r := get(t, d, tt.method, tt.host, tt.path, tt.header)
		if r.Code != tt.want {
			t.Errorf("%s: status %d, want %d", tt.name, r.Code, tt.want)
		}
		for name, value := range map[string]string{
			"Cache-Control": "no-store", "Referrer-Policy": "no-referrer", "X-Content-Type-Options": "nosniff", "X-Frame-Options": "DENY", "Cross-Origin-Resource-Policy": "same-origin",
		} {
			if r.Header().Get(name) != value {
				t.Errorf("%s: header %s is %q, want %q", tt.name, name, r.Header().Get(name), value)
			}
		}
		if policy := r.Header().Get("Content-Security-Policy"); !strings.HasPrefix(policy, "default-src 'none'; ") || strings.Contains(policy, "unsafe") || strings.Contains(policy, "http") {
			t.Errorf("%s: policy %q", tt.name, policy)
		}
		if r.Header().Get("Set-Cookie") != "" {
			t.Errorf("%s: it sets cookies", tt.name)
		}
	}
}

// TestPaths gives each dashboard a path of its own.
func TestPaths(t *testing.T) {
	one, two := show(t, situation{}), show(t, situation{})
	if one.Path() == two.Path() || len(one.Path()) < 28 {
		t.Errorf("paths %s and %s", one.Path(), two.Path())
	}
}

// TestReadsWhileOpen reads from the cluster once at the start, and then only while somebody looks.
func TestReadsWhileOpen(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var reads, took atomic.Int64
		d, err := dashboard.New(dashboard.Config{Location: time.UTC, Gather: func(ctx context.Context) view.Snapshot {
			reads.Add(1)
			select {
			case <-time.After(time.Duration(took.Load())):
			case <-ctx.Done():
			}
			return view.Snapshot{Time: time.Now(), Cluster: "production"}
		}})
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan error)
		go func() { ended <- d.Serve(ctx, &silent{done: make(chan struct{})}) }()
		expect := func(what string, want int64) {
			t.Helper()
			if synctest.Wait(); reads.Load() != want {
				t.Errorf("%s: %d reads, want %d", what, reads.Load(), want)
			}
		}
		expect("at the start", 1)
		time.Sleep(time.Hour)
		expect("after an hour without a page", 1)
		if page := text(t, d, ""); !strings.Contains(page, "1 h ago") || !strings.Contains(page, "this is old") {
			t.Error("the page does not say that it is old")
		}
		expect("a page opens", 2)
		for range 6 { // a minute
			time.Sleep(10 * time.Second)
			_ = text(t, d, "")
		}
		expect("a page is open for a minute", 8)
		for range 100 { // Each request is served from memory.
			_ = text(t, d, "")
		}
		expect("a hundred requests", 8)
		time.Sleep(time.Hour)
		expect("the page is closed", 11)

		took.Store(int64(30 * time.Second)) // A large cluster gets a pause of two minutes.
		for range 300 {
			_ = text(t, d, "")
			time.Sleep(time.Second)
		}
		expect("five minutes with a slow cluster", 14)
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("it ends with %v", err)
		}
	})
}

// silent is a listener without clients.
type silent struct{ done chan struct{} }

func (s *silent) Accept() (net.Conn, error) { <-s.done; return nil, net.ErrClosed }
func (s *silent) Close() error              { close(s.done); return nil }
func (s *silent) Addr() net.Addr            { return &net.TCPAddr{} }

// TestFirstPage shows at once that the first snapshot is not there yet, and reloads itself without JavaScript too.
func TestFirstPage(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d, err := dashboard.New(dashboard.Config{Gather: nothing})
		if err != nil {
			t.Fatal(err)
		}
		begin := time.Now()
		page := text(t, d, "")
		if !strings.Contains(page, "Reading from the cluster") || !strings.Contains(page, `<meta http-equiv="refresh" content="2">`) || time.Since(begin) > 5*time.Second {
			t.Errorf("after %s, the page is %s", time.Since(begin), page)
		}
	})
	if _, err := dashboard.New(dashboard.Config{}); err == nil {
		t.Error("a dashboard without Gather is accepted")
	}
}

// TestMetricsExist compares the names of metrics in the sources with docs/metrics.md, which is generated from the programs.
func TestMetricsExist(t *testing.T) {
	docs, err := os.ReadFile("../../docs/metrics.md")
	if err != nil {
		t.Fatal(err)
	}
	files, err := filepath.Glob("view/*.go")
	if err != nil {
		t.Fatal(err)
	}
	found := 0
	for _, name := range files {
		source, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		for _, match := range regexp.MustCompile(`"(credence_(?:broker|webhook)_[a-z_]+)"`).FindAllSubmatch(source, -1) {
			if found++; !strings.Contains(string(docs), "`"+string(match[1])+"`") {
				t.Errorf("%s names the metric %s, which docs/metrics.md does not have", name, match[1])
			}
		}
		for _, match := range regexp.MustCompile(`m\[metric\+"([a-z_]+)"\]`).FindAllSubmatch(source, -1) {
			for _, program := range []string{"broker", "webhook"} {
				if found++; !strings.Contains(string(docs), "`credence_"+program+"_"+string(match[1])+"`") {
					t.Errorf("%s names the metric %s of the %s, which docs/metrics.md does not have", name, match[1], program)
				}
			}
		}
	}
	if found < 15 {
		t.Errorf("found %d names of metrics", found)
	}
}
