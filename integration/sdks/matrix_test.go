//go:build unix

package main

import (
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func TestOutcomes(t *testing.T) {
	t.Parallel()
	denied := &refusal{Code: "STS_ACCESS_DENIED", Message: "AWS refuses the role"}
	good := answer{ARN: assumed("r")}
	for name, test := range map[string]struct {
		bad, last answer
		err       error
		refusal   *refusal
		want      Outcome
	}{
		"success":                  {last: good, want: Works},
		"another role":             {last: answer{ARN: assumed("other")}, want: Fails},
		"a failure in between":     {bad: answer{Error: "timeout"}, last: good, want: Fails},
		"a driver that ended":      {last: good, err: errors.New("ended"), want: Fails},
		"the code in the error":    {last: answer{Error: "x: STS_ACCESS_DENIED: y"}, refusal: denied, want: Reason},
		"the code beside it":       {last: answer{Error: "x", Code: "STS_ACCESS_DENIED"}, refusal: denied, want: Reason},
		"the message alone":        {last: answer{Error: "x: AWS refuses the role."}, refusal: denied, want: Reason},
		"another error":            {last: answer{Error: "Unable to locate credentials"}, refusal: denied, want: Hidden},
		"an error without refusal": {last: answer{Error: "Unable to locate credentials"}, want: Fails},
		"expired":                  {last: answer{Error: "An error occurred", Code: "ExpiredToken"}, refusal: denied, want: Expired},
	} {
		r := &row{client: client{name: "c"}, path: Container}
		tr := newTrial(r, refused)
		tr.last, tr.err = test.last, test.err
		for _, a := range []answer{test.bad, test.last} {
			if a.Error != "" && tr.bad == nil {
				tr.bad = &a
			}
		}
		if got := tr.outcome("r", test.refusal); got.Outcome != test.want {
			t.Errorf("%s: %s (%s), want %s", name, got.Outcome, got.Error, test.want)
		}
	}
}

func TestAuditedCallsAreOfOurNamespace(t *testing.T) {
	t.Parallel()
	log := filepath.Join(t.TempDir(), "log")
	lines := []string{
		`{"time":"x","decision":"allow","namespace":"sdks","pod":"a"}`,
		`time=x level=INFO msg="not an audit line"`,
		`{"time":"x","decision":"deny","namespace":"sdks","pod":"a"}`,
		`{"time":"x","decision":"allow","namespace":"other","pod":"a"}`,
		`{"level":"INFO","namespace":"sdks","pod":"a"}`,
		`{"time":"x","decision":"allow","namespace":"sdks","pod":"b"}`,
	}
	if err := os.WriteFile(log, []byte(strings.Join(lines, "\n")), 0o600); err != nil {
		t.Fatal(err)
	}
	calls, err := auditedCalls(log)
	if diff := cmp.Diff(map[string]int{"a": 2, "b": 1}, calls); diff != "" || err != nil {
		t.Errorf("calls (-want +got): %v\n%s", err, diff)
	}
}

func TestDoorTellsOfTheFirstRequest(t *testing.T) {
	t.Parallel()
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/v1/credentials" {
			_, _ = io.WriteString(w, "behind it")
		}
	}))
	defer server.Close()
	d, err := openDoor(t.Context(), []string{metadataVariable + "=" + server.URL, fullURIVariable + "=" + server.URL + "/v1/credentials", "A=b"})
	if err != nil {
		t.Fatal(err)
	}
	defer d.close()
	if strings.Contains(strings.Join(d.env, " "), server.URL) || value(d.env, "A") != "b" {
		t.Errorf("the environment is %q", d.env)
	}
	select {
	case <-d.first:
		t.Error("it tells of a request before there was one")
	default:
	}
	request, err := http.NewRequestWithContext(t.Context(), http.MethodGet, value(d.env, fullURIVariable), nil)
	if err != nil {
		t.Fatal(err)
	}
	status, body, err := send(request)
	if err != nil || status != http.StatusOK || string(body) != "behind it" {
		t.Errorf("behind it is %d %q, %v", status, body, err)
	}
	<-d.first
}

func TestSidecarIsAskedForItsReason(t *testing.T) {
	t.Parallel()
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch {
		case r.URL.Path == "/latest/api/token":
			_, _ = io.WriteString(w, "session")
		case r.Header.Get("Authorization") == "right", r.Header.Get("X-Aws-Ec2-Metadata-Token") == "session" && path.Base(r.URL.Path) == "r":
			w.WriteHeader(http.StatusForbidden)
			_, _ = io.WriteString(w, `{"code":"DENIED","message":"no","Code":"DENIED","Message":"no"}`)
		case r.Header.Get("Authorization") == "good":
			_, _ = io.WriteString(w, `{"AccessKeyId":"ASIA","Expiration":"2026-11-28T02:03:04Z"}`)
		case r.Header.Get("Authorization") == "endless":
			_, _ = io.WriteString(w, `{"AccessKeyId":"ASIA"}`)
		case r.Header.Get("Authorization") == "other":
			w.WriteHeader(http.StatusForbidden)
		case r.Header.Get("Authorization") == "wrong":
			w.WriteHeader(http.StatusForbidden)
			_, _ = io.WriteString(w, `{"code":"AUTHORIZATION_INVALID","message":"wrong"}`)
		}
	}))
	defer server.Close()
	metadata := []string{metadataVariable + "=" + server.URL}
	container := append([]string{fullURIVariable + "=" + server.URL + "/v1", authorizationVariable + "=right"}, metadata...)
	for _, test := range []struct {
		env         []string
		wrong, want string
	}{{container, "", "DENIED"}, {container, "wrong", "AUTHORIZATION_INVALID"}, {metadata, "", "DENIED"}} {
		if r, _, err := askSidecar(t.Context(), test.env, "r", test.wrong); err != nil || r.Code != test.want {
			t.Errorf("asked with %q: %+v, %v, want %s", test.wrong, r, err, test.want)
		}
	}
	if r, _, err := askSidecar(t.Context(), withToken(container, "other"), "r", ""); err == nil {
		t.Errorf("an answer without a reason is taken for %+v", r)
	}
	want := time.Date(2026, 11, 28, 2, 3, 4, 0, time.UTC)
	if r, until, err := askSidecar(t.Context(), withToken(container, "good"), "r", ""); err != nil || r != nil || !until.Equal(want) {
		t.Errorf("credentials are read as %+v, valid until %v, %v", r, until, err)
	}
	if _, until, err := askSidecar(t.Context(), withToken(container, "endless"), "r", ""); err == nil {
		t.Errorf("credentials that state no end are taken as valid until %v", until)
	}
}

// That a broker was stopped is not taken on trust.
func TestNobodyAt(t *testing.T) {
	t.Parallel()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address := listener.Addr().String()
	if err := nobodyAt(t.Context(), address); err == nil || !strings.Contains(err.Error(), "somebody answers at "+address) {
		t.Errorf("with a listener: %v", err)
	}
	_ = listener.Close()
	if err := nobodyAt(t.Context(), address); err != nil {
		t.Errorf("without: %v", err)
	}
	if err := nobodyAt(t.Context(), "127.0.0.1:none"); err == nil {
		t.Error("an address that cannot be dialled counts as left")
	}
}

func TestFlags(t *testing.T) {
	t.Parallel()
	o, err := parse([]string{"-only", "go-v2,curl", "-life", "1h"}, io.Discard)
	if err != nil || len(o.only) != 2 || o.life.Hours() != 1 {
		t.Errorf("read as %+v, %v", o, err)
	}
	for _, args := range [][]string{{"-only", "java"}, {"-life", "1m"}, {"-life", "13h"}, {"all"}} {
		if _, err := parse(args, io.Discard); err == nil {
			t.Errorf("%q is taken", args)
		}
	}
}

// What a scenario rests on, a sidecar that refuses, is seen to be so, and no client blamed for it.
func TestRefusalIsSeen(t *testing.T) {
	t.Parallel()
	w := newToy(nil)
	p, err := w.pod(t.Context(), "p", lifeRole, Container)
	if err != nil {
		t.Fatal(err)
	}
	m := &matrix{world: w}
	if r, err := m.refused(t.Context(), p.env, lifeRole, "wrong", http.StatusForbidden, "AUTHORIZATION_INVALID"); err != nil || r.Message == "" {
		t.Errorf("a refusal is taken for %+v, %v", r, err)
	}
	if _, err := m.refused(t.Context(), p.env, lifeRole, "wrong", http.StatusForbidden, "STS_ACCESS_DENIED"); err == nil || !strings.Contains(err.Error(), "answers 403 AUTHORIZATION_INVALID, want 403 STS_ACCESS_DENIED") {
		t.Errorf("another refusal: %v", err)
	}
	if _, err := m.refused(t.Context(), p.env, lifeRole, "", http.StatusForbidden, "STS_ACCESS_DENIED"); err == nil || !strings.Contains(err.Error(), "gives credentials") {
		t.Errorf("no refusal: %v", err)
	}
}
