package dashboard_test

import (
	"bufio"
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/credence-iam/credence/operator/dashboard"
	"github.com/credence-iam/credence/operator/dashboard/view"
)

// browsers are programs that speak the DevTools protocol.
var browsers = []string{"chromium", "chromium-browser", "google-chrome-stable", "google-chrome"}

// tab is a page in a headless browser, which the DevTools protocol drives over a pipe. A client library would bring a
// generated package for each of its fifty domains, and this test needs ten calls.
type tab struct {
	t       *testing.T
	session string

	mu      sync.Mutex
	to      *os.File
	next    int                          // guarded by mu
	waiting map[int]chan json.RawMessage // guarded by mu
	events  []event                      // guarded by mu
	changed chan struct{}                // closed at the next event; guarded by mu
}

type event struct {
	Method string
	Params json.RawMessage
}

// openTab starts a browser until the test ends. It skips the test if there is none.
func openTab(t *testing.T) *tab {
	t.Helper()
	at := slices.IndexFunc(browsers, func(name string) bool { _, err := exec.LookPath(name); return err == nil })
	if at < 0 {
		t.Skipf("no browser runs the dashboard: install one of %s", strings.Join(browsers, ", "))
	}
	theirs, to, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	from, theirsOut, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	home := t.TempDir()
	command := exec.CommandContext(ctx, browsers[at], "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--disable-dev-shm-usage", "--no-first-run",
		"--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-extensions", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
		"--user-data-dir="+home, "--remote-debugging-pipe", "about:blank")
	command.ExtraFiles = []*os.File{theirs, theirsOut}
	command.Env = append(os.Environ(), "HOME="+home)
	if err := command.Start(); err != nil {
		t.Fatal(err)
	}
	_, _ = theirs.Close(), theirsOut.Close()
	b := &tab{t: t, to: to, waiting: map[int]chan json.RawMessage{}, changed: make(chan struct{})}
	read := make(chan struct{})
	go func() { defer close(read); b.read(from) }()
	t.Cleanup(func() {
		b.call("Browser.close", nil, nil)
		if err := command.Wait(); err != nil {
			t.Errorf("the browser ends with %v", err)
		}
		cancel()
		<-read
	})
	var created struct{ TargetID string }
	b.call("Target.createTarget", map[string]any{"url": "about:blank"}, &created)
	var attached struct{ SessionID string }
	b.call("Target.attachToTarget", map[string]any{"targetId": created.TargetID, "flatten": true}, &attached)
	b.session = attached.SessionID
	for _, domain := range []string{"Page", "Runtime", "Log", "Network"} {
		b.call(domain+".enable", nil, nil)
	}
	return b
}

// read distributes what the browser sends: responses, and events.
func (b *tab) read(from *os.File) {
	messages := bufio.NewReader(from)
	for {
		text, err := messages.ReadBytes(0)
		if err != nil {
			return
		}
		var m struct {
			ID             int
			Result, Error  json.RawMessage
			Method         string
			Params         json.RawMessage
			SessionIDOfTab string `json:"sessionId"`
		}
		if err := json.Unmarshal(text[:len(text)-1], &m); err != nil {
			continue
		}
		b.mu.Lock()
		if response := b.waiting[m.ID]; m.ID > 0 && response != nil {
			if m.Error != nil {
				m.Result = json.RawMessage(`{"failed":` + string(m.Error) + `}`)
			}
			response <- m.Result
			delete(b.waiting, m.ID)
		} else if m.Method != "" {
			b.events = append(b.events, event{m.Method, m.Params})
			close(b.changed)
			b.changed = make(chan struct{})
		}
		b.mu.Unlock()
	}
}

// call calls a method of the protocol, and decodes its result.
func (b *tab) call(method string, params map[string]any, result any) {
	b.t.Helper()
	if params == nil {
		params = map[string]any{}
	}
	b.mu.Lock()
	b.next++
	response := make(chan json.RawMessage, 1)
	b.waiting[b.next] = response
	message := map[string]any{"id": b.next, "method": method, "params": params}
	if b.session != "" && method != "Browser.close" {
		message["sessionId"] = b.session
	}
	text, err := json.Marshal(message)
	if err == nil {
		_, err = b.to.Write(append(text, 0))
	}
	b.mu.Unlock()
	if err != nil {
		b.t.Fatal(err)
	}
	select {
	case text := <-response:
		if strings.HasPrefix(string(text), `{"failed":`) {
			b.t.Fatalf("%s: %s", method, text)
		}
		if result != nil {
			if err := json.Unmarshal(text, result); err != nil {
				b.t.Fatalf("%s returns %s: %v", method, text, err)
			}
		}
	case <-time.After(2 * time.Minute):
		b.t.Fatalf("%s: the browser does not respond", method)
	}
}

// load opens an address, and returns when the page is complete.
func (b *tab) load(address string) {
	b.t.Helper()
	b.mu.Lock()
	b.events = nil
	b.mu.Unlock()
	b.call("Page.navigate", map[string]any{"url": address}, nil)
	deadline := time.After(2 * time.Minute)
	for {
		b.mu.Lock()
		complete, changed := slices.ContainsFunc(b.events, func(e event) bool { return e.Method == "Page.loadEventFired" }), b.changed
		b.mu.Unlock()
		if complete {
			return
		}
		select {
		case <-changed:
		case <-deadline:
			b.t.Fatalf("%s does not load", address)
		}
	}
}

// evaluate returns the value of an expression on the page. It waits for a promise.
func (b *tab) evaluate(expression string, value any) {
	b.t.Helper()
	var result struct {
		Result           struct{ Value json.RawMessage }
		ExceptionDetails json.RawMessage
	}
	b.call("Runtime.evaluate", map[string]any{"expression": expression, "returnByValue": true, "awaitPromise": true}, &result)
	if result.ExceptionDetails != nil {
		b.t.Fatalf("%.80s…: %s", expression, result.ExceptionDetails)
	}
	if value != nil {
		if err := json.Unmarshal(result.Result.Value, value); err != nil {
			b.t.Fatalf("%.80s… is %s: %v", expression, result.Result.Value, err)
		}
	}
}

// as sets the width of the window, and light or dark.
func (b *tab) as(width int, scheme string) {
	b.call("Emulation.setDeviceMetricsOverride", map[string]any{"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": false}, nil)
	b.call("Emulation.setEmulatedMedia", map[string]any{"features": []map[string]string{{"name": "prefers-color-scheme", "value": scheme}}}, nil)
}

// complaints returns errors of the page's scripts and policies, and its requests to other hosts.
func (b *tab) complaints(host string) (all []string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	requests := 0
	for _, e := range b.events {
		switch e.Method {
		case "Runtime.exceptionThrown", "Log.entryAdded", "Runtime.consoleAPICalled":
			all = append(all, e.Method+" "+string(e.Params))
		case "Network.requestWillBeSent":
			var sent struct{ Request struct{ URL string } }
			if err := json.Unmarshal(e.Params, &sent); err != nil || !strings.HasPrefix(sent.Request.URL, "http://"+host+"/") {
				all = append(all, "request to "+sent.Request.URL)
			}
			requests++
		}
	}
	if requests < 3 {
		all = append(all, fmt.Sprintf("only %d requests: the page, its style and its script are 3", requests))
	}
	return all
}

// press presses the key Tab.
func (b *tab) press() {
	for _, kind := range []string{"rawKeyDown", "keyUp"} {
		b.call("Input.dispatchKeyEvent", map[string]any{"type": kind, "key": "Tab", "code": "Tab", "windowsVirtualKeyCode": 9}, nil)
	}
}

// screenshots is a folder for a picture of each page, to look at. Empty: none.
var screenshots = os.Getenv("CREDENCE_SCREENSHOTS")

func (b *tab) screenshot(name string) {
	if screenshots == "" {
		return
	}
	var picture struct{ Data string }
	b.call("Page.captureScreenshot", map[string]any{"captureBeyondViewport": true}, &picture)
	data, err := base64.StdEncoding.DecodeString(picture.Data)
	if err == nil {
		err = os.WriteFile(filepath.Join(screenshots, name+".png"), data, 0o600)
	}
	if err != nil {
		b.t.Error(err)
	}
}

// serve serves a dashboard, and returns its host and address.
func serve(t *testing.T, d *dashboard.Dashboard) (host, address string) {
	t.Helper()
	server := httptest.NewServer(d)
	t.Cleanup(server.Close)
	host = strings.TrimPrefix(server.URL, "http://")
	return host, server.URL + d.Path()
}

// TestBrowser opens each situation in a browser, light and dark, narrow and wide.
func TestBrowser(t *testing.T) {
	b := openTab(t)
	rules, err := os.ReadFile("testdata/rules.js")
	if err != nil {
		t.Fatal(err)
	}
	for name, s := range situations(t) {
		host, address := serve(t, show(t, s))
		for _, width := range []int{380, 1400} {
			for _, scheme := range []string{"light", "dark"} {
				b.as(width, scheme)
				b.load(address)
				var wrong []string
				b.evaluate(string(rules), &wrong)
				for _, w := range append(wrong, b.complaints(host)...) {
					t.Errorf("%s, %d, %s: %s", name, width, scheme, w)
				}
				b.screenshot(fmt.Sprintf("%s-%d-%s", name, width, scheme))
			}
		}
	}
}

// TestBrowserKeyboard walks through the page by the key Tab: each control shows that it has the focus.
func TestBrowserKeyboard(t *testing.T) {
	b := openTab(t)
	_, address := serve(t, show(t, situations(t)["failing"]))
	b.as(1400, "light")
	b.load(address)
	var controls int
	b.evaluate(`document.querySelectorAll("a, button, input, [tabindex='0']").length`, &controls)
	names := map[string]bool{}
	for range controls {
		b.press()
		var now struct {
			Name, Outline string
			Number        int
		}
		b.evaluate(`(() => { const e = document.activeElement, s = getComputedStyle(e);
			return { Name: e.tagName, Number: [...document.querySelectorAll("*")].indexOf(e), Outline: s.outlineStyle + " " + s.outlineWidth }; })()`, &now)
		if names[fmt.Sprint(now.Number)] = true; now.Outline != "solid 3px" {
			t.Errorf("the focus on %s has the outline %s", now.Name, now.Outline)
		}
	}
	if controls < 12 || len(names) != controls {
		t.Errorf("the key Tab reaches %d of %d controls", len(names), controls)
	}
}

// TestBrowserUpdates changes the cluster while the page is open: the page shows it, announces it, and leaves alone what the
// reader has the focus in. Without the command, it says so.
func TestBrowserUpdates(t *testing.T) {
	b := openTab(t)
	all := situations(t)
	d := show(t, all["healthy"])
	server := httptest.NewServer(d)
	defer server.Close()
	b.load(server.URL + d.Path())
	const state = `(() => ({ Summary: document.getElementById("summary").textContent, Announced: document.getElementById("announce").textContent,
		Offline: document.getElementById("offline").textContent, Pressed: document.getElementById("pause").getAttribute("aria-pressed"),
		Focus: document.activeElement.id, Field: document.getElementById("q").value, Title: document.title }))()`
	var s struct{ Summary, Announced, Offline, Pressed, Focus, Field, Title string }
	// update makes the page look for changes now, and waits for one of the elements to change.
	update := func(id string) {
		b.evaluate(`new Promise((done) => { new MutationObserver(() => setTimeout(done, 100)).observe(document.getElementById("`+id+`"), { childList: true, subtree: true, characterData: true });
			document.dispatchEvent(new Event("visibilitychange")); })`, nil)
		b.evaluate(state, &s)
	}
	b.evaluate(`(() => { const q = document.getElementById("q"); q.focus(); q.value = "typ"; })()`, nil)
	d.Put(all["failing"].now)
	update("part-health")
	if !strings.HasSuffix(s.Summary, "failures") || s.Announced != "Health: "+s.Summary || s.Focus != "q" || s.Field != "typ" || !strings.HasPrefix(s.Title, s.Summary) || s.Pressed != "false" {
		t.Errorf("after a failure, the page has %+v", s)
	}
	server.CloseClientConnections()
	server.Close()
	update("offline")
	if !strings.Contains(s.Offline, "does not respond") || !strings.HasSuffix(s.Summary, "failures") {
		t.Errorf("without the command, the page has %+v", s)
	}
}

// TestBrowserWithoutScripts shows all of the page without JavaScript, which then reloads itself.
func TestBrowserWithoutScripts(t *testing.T) {
	b := openTab(t)
	_, address := serve(t, show(t, situations(t)["many"]))
	b.call("Emulation.setScriptExecutionDisabled", map[string]any{"value": true}, nil)
	b.load(address + "?q=team-007")
	var s struct {
		Refresh string
		Rows    int
		Pause   bool
	}
	b.evaluate(`(() => ({ Refresh: document.querySelector("noscript meta")?.httpEquiv ?? "", Rows: document.querySelectorAll("#sessions tbody tr").length,
		Pause: document.getElementById("pause").checkVisibility() }))()`, &s)
	if s.Refresh != "refresh" || s.Rows != 5 || s.Pause {
		t.Errorf("without JavaScript, the page has %+v", s)
	}
}

// nothing gathers nothing.
func nothing(context.Context) view.Snapshot { return view.Snapshot{} }
