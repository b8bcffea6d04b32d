//go:build linux

package soak

import (
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// TestRecorder shows what a recorder finds in the logs of containers, in the form in which a container runtime writes them.
func TestRecorder(t *testing.T) {
	logs := t.TempDir()
	r := newRecorder()
	write := func(pod, container, text string) {
		t.Helper()
		folder := filepath.Join(logs, pod+"_0f0f0f0f-0000-0000-0000-000000000000", container)
		if err := os.MkdirAll(folder, 0o700); err != nil {
			t.Fatal(err)
		}
		path := filepath.Join(folder, "0.log")
		file, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
		if err != nil {
			t.Fatal(err)
		}
		defer file.Close()
		if _, err := file.WriteString(text); err != nil {
			t.Fatal(err)
		}
		r.read(path)
	}
	const second = "2026-01-02T03:04:05.6Z stdout F "
	from := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	write("load_go-1", "app", second+"calls 10\n"+second+"FAILED credentials no session for known-17\n"+second+"FAILED network lost\n"+second+"calls")
	write("load_go-1", "app", " 20\n"+"2026-01-02T03:05:05.6Z stdout F FAILED credentials later\n")
	write("load_go-1", sidecarName, second+`{"level":"ERROR","msg":"Could not","reason":"STS_UNAVAILABLE"}`+"\n"+second+`{"level":"INFO","msg":"Received"}`+"\n")
	write("credence_credence-broker-1", "broker", second+"panic: x\n")
	write("cert-manager_x", "cert-manager-controller", second+`{"level":"ERROR","msg":"not ours"}`+"\n")
	for _, w := range []*wait{
		{kind: known, began: from.Add(-time.Second), ended: from.Add(time.Second), problems: []string{"refused by 10.1.2.3:443", "refused by 10.1.2.4:443"}},
		{kind: fresh, began: from, ended: from.Add(3 * time.Second)},
		{kind: fresh, began: from},                                                // it still waits
		{kind: fresh, began: from, ended: from.Add(-1)},                           // before
		{kind: known, began: from.Add(time.Hour), ended: from.Add(2 * time.Hour)}, // after
	} {
		r.begin(w)
	}
	got, unreachable := r.result(from, from.Add(30*time.Second))
	want := result{
		Errors:      map[string]int{"go-1: credentials no session for POD": 1},
		Unreachable: 1,
		Known:       []float64{2}, New: []float64{3},
		Problems: []string{"refused by ADDRESS"},
		Logged:   map[string][]string{"sidecar": {"ERROR Could not (STS_UNAVAILABLE)"}, "broker": {"panic: x"}},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("result (-want +got):\n%s", diff)
	}
	if r.callsOf("go-1") != 20 || unreachable["go-1: lost"] != 1 {
		t.Errorf("%d calls, unreachable %v", r.callsOf("go-1"), unreachable)
	}
	if err := r.newPods(from.Add(-time.Minute)); err != nil {
		t.Error(err)
	}
	if err := r.newPods(from); err == nil {
		t.Error("a new pod of each kind succeeded, but none began after the failure")
	}
}

func TestPart(t *testing.T) {
	if got := part(25 * time.Minute); session == 15*time.Minute && got != 6*time.Minute+15*time.Second {
		t.Errorf("25 minutes of an hour are %v of %v", got, session)
	}
}
