//go:build unix

package main

import (
	"context"
	"errors"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/credence-iam/credence/integration/stack"
)

func TestJudge(t *testing.T) {
	t.Parallel()
	denied := &refusal{Code: "STS_ACCESS_DENIED", Message: "AWS refuses the role"}
	good := output{ARN: assumed("r"), Key: "k"}
	for name, test := range map[string]struct {
		output  output
		err     error
		refused *refusal
		want    outcome
	}{
		"success":                   {output: good, want: works},
		"another role":              {output: output{ARN: assumed("other")}, want: fails},
		"no identity":               {output: output{}, want: fails},
		"success despite a refusal": {output: good, refused: denied, want: fails},
		"a script that exited":      {output: good, err: errors.New("exited"), want: fails},
		"a script that hangs":       {err: errTimeout, want: hangs},
		"the code in the error":     {output: output{Error: "x: STS_ACCESS_DENIED: y"}, refused: denied, want: reason},
		"the code beside it":        {output: output{Error: "x", Code: "STS_ACCESS_DENIED"}, refused: denied, want: reason},
		"the message alone":         {output: output{Error: "x: AWS refuses the role."}, refused: denied, want: reason},
		"another error":             {output: output{Error: "Unable to locate credentials"}, refused: denied, want: noReason},
		"an error without refusal":  {output: output{Error: "Unable to locate credentials"}, want: fails},
		"expired credentials":       {output: output{Error: "An error occurred", Code: "ExpiredToken"}, refused: denied, want: expired},
	} {
		if got := classify(test.output, test.err, "r", test.refused); got.outcome != test.want {
			t.Errorf("%s: got %s (%s), want %s", name, got.outcome, got.text, test.want)
		}
	}
	for _, test := range []struct {
		output output
		err    error
		want   outcome
	}{
		{output{Region: stack.Region}, nil, works},
		{output{Region: "us-east-1"}, nil, fails},
		{output{}, nil, fails},
		{output{Error: "unsupported"}, nil, none},
		{output{Error: "no region"}, nil, notFound},
		{output{Region: stack.Region}, errTimeout, hangs},
	} {
		if got := classifyRegion(test.output, test.err); got.outcome != test.want {
			t.Errorf("region %+v, %v: got %s, want %s", test.output, test.err, got.outcome, test.want)
		}
	}
}

func TestFaults(t *testing.T) {
	t.Parallel()
	for _, s := range sdks {
		for _, path := range s.paths {
			r := &row{sdk: s, path: path, results: make(map[string]result)}
			tried := 0
			for _, c := range scenarios {
				if want := s.expected(path, c.name); want != "" {
					tried++
					r.results[c.name] = result{outcome: outcome(strings.Split(string(want), ", or ")[0])}
				}
			}
			if lines := r.faults(); len(lines) > 0 || tried == 0 {
				t.Errorf("%s: %d expected results have the faults %q", r.name(), tried, lines)
			}
			for scenario := range r.results {
				other := &row{sdk: s, path: path, results: maps.Clone(r.results)}
				other.results[scenario] = result{outcome: fails}
				if lines := other.faults(); len(lines) != 1 || !strings.Contains(lines[0], scenario) {
					t.Errorf("%s: a failed scenario %q gives %q", r.name(), scenario, lines)
				}
				delete(other.results, scenario)
				if lines := other.faults(); len(lines) != 1 {
					t.Errorf("%s: a missing scenario %q gives %q", r.name(), scenario, lines)
				}
			}
		}
	}
}

func TestStorms(t *testing.T) {
	t.Parallel()
	begin := time.Date(2026, 11, 28, 2, 3, 4, 0, time.UTC)
	life := func(name string) *pod {
		// There is a broker for 3 of these minutes.
		return &pod{name: name, role: lifeRole, callEvery: time.Minute, created: begin, stopped: begin.Add(5 * time.Minute), stsCalls: 5}
	}
	for name, test := range map[string]struct {
		calls    map[string]int
		stsCalls int // for the refused role
		want     string
	}{
		"as many as allowed":       {map[string]int{"a": 5, "b": 2, "r": 3}, 3, ""},
		"a sidecar calls too much": {map[string]int{"a": 6, "b": 2, "r": 3}, 3, "pod a: the sidecar called the broker 6 times, want 2 to 5"},
		"no renewal is counted":    {map[string]int{"a": 5, "b": 1, "r": 3}, 3, "pod b: the sidecar called the broker 1 times, want 2 to 5"},
		"a refused pod is missing": {map[string]int{"a": 5, "b": 2}, 0, "pod r: the sidecar called the broker 0 times, want 1 to 3"},
		"the broker calls more":    {map[string]int{"a": 5, "b": 2, "r": 2}, 3, "role refused: the broker called STS 3 times, want 1 to 2"},
	} {
		refused := &pod{name: "r", role: "refused", callEvery: time.Second, created: begin, stopped: begin.Add(time.Second), stsCalls: test.stsCalls}
		got := strings.Join(storms([]*pod{life("a"), life("b"), refused}, test.calls, 2*time.Minute), "\n")
		if !strings.HasPrefix(got, test.want) || test.want == "" && got != "" {
			t.Errorf("%s: got %q, want %q", name, got, test.want)
		}
	}
}

func TestBrokerCalls(t *testing.T) {
	t.Parallel()
	log := filepath.Join(t.TempDir(), "log")
	if err := os.WriteFile(log, []byte(`{"decision":"allow","namespace":"sdks","pod":"a"}
time=x level=INFO msg="not an audit line"
{"decision":"deny","namespace":"sdks","pod":"a"}
{"decision":"allow","namespace":"other","pod":"a"}
{"level":"INFO","namespace":"sdks","pod":"a"}
{"decision":"allow","namespace":"sdks","pod":"b"}
`), 0o600); err != nil {
		t.Fatal(err)
	}
	calls, err := brokerCalls(log)
	if diff := cmp.Diff(map[string]int{"a": 2, "b": 1}, calls); diff != "" || err != nil {
		t.Errorf("calls (-want +got): %v\n%s", err, diff)
	}
}

// TestSidecar has a double of the sidecar behind a door.
func TestSidecar(t *testing.T) {
	t.Parallel()
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch r.Header.Get("Authorization") {
		case "good":
			_, _ = io.WriteString(w, `{"AccessKeyId":"ASIA","Expiration":"2026-11-28T02:03:04Z"}`)
		case "endless":
			_, _ = io.WriteString(w, `{"AccessKeyId":"ASIA"}`)
		case "refused":
			w.WriteHeader(http.StatusForbidden)
			_, _ = io.WriteString(w, `{"code":"DENIED","message":"no","Code":"DENIED","Message":"no"}`)
		default:
			w.WriteHeader(http.StatusForbidden)
		}
	}))
	defer server.Close()
	d, err := newDoor(t.Context(), []string{metadataVariable + "=" + server.URL, fullURIVariable + "=" + server.URL + "/v1/credentials"})
	if err != nil {
		t.Fatal(err)
	}
	defer d.close()
	select {
	case <-d.first:
		t.Error("the door reports a connection before there is one")
	default:
	}
	env := func(token string) []string { return append(slices.Clone(d.env), authorizationVariable+"="+token) }
	want := time.Date(2026, 11, 28, 2, 3, 4, 0, time.UTC)
	if r, expiration, err := requestCredentials(t.Context(), env("good")); r != nil || err != nil || !expiration.Equal(want) {
		t.Errorf("credentials: got %+v, %v, %v", r, expiration, err)
	}
	<-d.first
	for _, token := range []string{"endless", "other"} {
		if r, _, err := requestCredentials(t.Context(), env(token)); err == nil {
			t.Errorf("a response without expiration and reason: got %+v", r)
		}
	}
	if r, err := wantRefusal(t.Context(), env("refused"), "DENIED"); err != nil || r.Message != "no" {
		t.Errorf("the wanted refusal: got %+v, %v", r, err)
	}
	for token, code := range map[string]string{"refused": "OTHER", "good": "DENIED"} {
		if r, err := wantRefusal(t.Context(), env(token), code); err == nil {
			t.Errorf("not the wanted refusal: got %+v", r)
		}
	}
}

func TestFind(t *testing.T) {
	root, bin := t.TempDir(), t.TempDir()
	t.Setenv("PATH", bin+":/usr/bin:/bin")
	write := func(path, content string) {
		t.Helper()
		if err := os.WriteFile(path, []byte("#!/bin/sh\n"+content), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	write(filepath.Join(bin, "credence-runtime"), `. "$1"`)
	l := &lab{dir: t.TempDir(), logs: t.TempDir()}
	for content, found := range map[string]bool{
		`echo '{"client":"real","version":"v1.9.3.post1"}'; cat`: true,
		`echo '{"client":"real","version":"1.10.0"}'; cat`:       false, // too new
		`echo '{"client":"real","version":"1.9"}'; cat`:          false,
		`echo '{"client":"other","version":"1.9.3"}'; cat`:       false,
		`echo '{"version":"1.9.3"}'; cat`:                        false,
		`echo hello; cat`:                                        false,
		`exit 3`:                                                 false,
		`yes | tr -d '\n'`:                                       false,
	} {
		write(filepath.Join(root, "client.sh"), content)
		s := sdk{name: "real-old", runtime: "credence-runtime", script: "client.sh", from: "1.2.0", before: "1.10.0"}
		if command, version, err := l.find(t.Context(), root, s); (err == nil) != found || found && version != "1.9.3.post1" {
			t.Errorf("%s: found %q, version %q, %v", content, command, version, err)
		}
	}
	if _, _, err := l.find(t.Context(), root, sdk{name: "real", runtime: "credence-no-such"}); err == nil {
		t.Error("a client without a runtime was found")
	}
	if _, err := chosen("go-v2,java"); err == nil {
		t.Error("an unknown client can be chosen")
	}
}

func TestScript(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	s, err := startScript(t.Context(), []string{"/bin/sh", "-c", `echo '{"client":"double","version":"1.2"}'
read -r command; echo "{\"error\":\"$command, $WORD\",\"code\":\"C\"}"; read -r command; echo '{'; sleep 1000`},
		[]string{"PATH=" + os.Getenv("PATH"), "WORD=x"}, dir, filepath.Join(dir, "log"), make(chan struct{}, 1))
	if err != nil {
		t.Fatal(err)
	}
	defer s.stop() // with its child, or this test never ends
	if a, err := s.call(t.Context(), "word"); err != nil || a.Error != "word, x" || a.Code != "C" {
		t.Errorf("got %+v, %v", a, err)
	}
	if _, err := s.call(t.Context(), "half"); err == nil || !strings.Contains(err.Error(), "not JSON") {
		t.Errorf("half an object: got %v", err)
	}
	canceled, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := s.call(canceled, "next"); err == nil || !strings.Contains(err.Error(), "after an error") {
		t.Errorf("the next call: got %v", err)
	}
}

// TestPage compares the page with the table, and updates it as after a run of one client.
func TestPage(t *testing.T) {
	t.Parallel()
	content, err := os.ReadFile(filepath.Join("../..", pagePath))
	if err != nil {
		t.Fatal(err)
	}
	page := string(content)
	same, err := updatePage(page, nil)
	if diff := cmp.Diff(page, same); diff != "" || err != nil {
		t.Errorf("run make sdks: the page is not as the table expects: %v\n%s", err, diff)
	}
	_, table, _, _ := cut(page, "results")
	if n := strings.Count(table, "\n"); n < len(sdks) || strings.Contains(page, "| not run |") {
		t.Errorf("the page has %d lines of results, or a client that was not run", n)
	}
	rows := []*row{{sdk: sdks[0], path: container, version: "9.9.9", results: map[string]result{
		refused: {outcome: reason, text: "no `role`: http://127.0.0.1:41234/v1\n0f8fad5b-d9cb-469f-a165-70867728950e", code: "DENIED"},
		longer:  {outcome: hangs, text: "no line came"},
	}}}
	rows = append(rows, &row{sdk: sdks[0], path: metadataV2, version: "9.9.9", results: rows[0].results})
	updated, err := updatePage(page, rows)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"| go-v2 | AWS SDK for Go v2 | 9.9.9 |", "### go-v2\n\n- role refused, container, imds-v2: `no 'role': http://127.0.0.1:PORT/v1 ID`, code `DENIED`\n\n### go-v1\n"} {
		if !strings.Contains(updated, want) {
			t.Errorf("the updated page lacks %q", want)
		}
	}
	_, before, _, _ := cut(page, "errors")
	_, after, _, _ := cut(updated, "errors")
	if quotes(before, nil) != before || section(before, "curl") != section(after, "curl") || section(after, "curl") == "" {
		t.Error("the errors of a client that was not run are changed")
	}
	if _, err := updatePage("# A page without markers\n", nil); err == nil {
		t.Error("a page without markers was updated")
	}
}
