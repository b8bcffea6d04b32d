package versions

import (
	"bytes"
	"strings"
	"testing"

	"github.com/credence-iam/credence/operator/finding"
)

// TestJudge: each part that is too far from the newest part of the cluster is a finding with a remedy.
func TestJudge(t *testing.T) {
	current := []Program{{Part: "webhook", Version: "v1.4.0", Pods: 2}, {Part: "broker", Version: "v1.4.1", Pods: 3}}
	many := map[string]int{"a": 1, "b": 9, "c": 2, "d": 3, "e": 4, "f": 5, "it's": 8}
	for name, tt := range map[string]struct {
		client, kubernetes string
		more               []Program
		want               []string // steps
		has                string
	}{
		"one version":           {"v1.4.0", "v1.34.0", nil, nil, ""},
		"one apart":             {"v1.3.0", "v1.30.9-eks-1", []Program{{Part: "sidecar", Version: "v1.5.0", Pods: 1}}, nil, ""},
		"an old client":         {"v1.2.0", "v1.34.0", nil, []string{"client"}, "install the credence command v1.4.1"},
		"a build":               {"(devel)", "v1.34.0", nil, nil, ""},
		"an old Kubernetes":     {"v1.4.0", "v1.29.3+k3s1", nil, []string{"Kubernetes"}, "older than 1.30"},
		"an old broker":         {"v1.4.0", "v1.34.0", []Program{{Part: "broker", Version: "v1.2.0", Pods: 1}}, []string{"broker"}, "helm -n credence history credence"},
		"sidecars of an age":    {"v1.4.0", "v1.34.0", []Program{{Part: "sidecar", Version: "v1.2.0", Pods: 32, Namespaces: many}}, []string{"sidecar"}, "of 32 pods in 7 namespaces has version v1.2.0"},
		"an unknown sidecar":    {"v1.4.0", "v1.34.0", []Program{{Part: "sidecar", Pods: 5}}, nil, ""},
		"everything at once":    {"v1.2.0", "v1.29.0", []Program{{Part: "sidecar", Version: "v1.2.0", Pods: 1}}, []string{"Kubernetes", "client", "sidecar"}, ""},
		"a sidecar of tomorrow": {"v1.4.0", "v1.34.0", []Program{{Part: "sidecar", Version: "v1.6.0", Pods: 1}}, []string{"sidecar"}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			r := Report{Client: tt.client, Kubernetes: tt.kubernetes, Namespace: "credence", Programs: append(append([]Program{}, current...), tt.more...)}
			r.judge()
			var steps []string
			for _, f := range r.Findings {
				steps = append(steps, f.Step)
				if f.Remedy == nil || f.Remedy.Who == "" || f.Remedy.What == "" || f.State == finding.OK {
					t.Errorf("finding %+v has no remedy", f)
				}
			}
			var text bytes.Buffer
			if err := r.Write(&text); err != nil {
				t.Fatal(err)
			}
			if strings.Join(steps, " ") != strings.Join(tt.want, " ") || r.Found() != (len(tt.want) > 0) || !strings.Contains(text.String(), tt.has) {
				t.Errorf("findings are about %q, want %q, and %q in:\n%s", steps, tt.want, tt.has, text.String())
			}
			if strings.Contains(text.String(), "-n a get pods") {
				t.Errorf("the smallest of many namespaces is named:\n%s", text.String())
			}
		})
	}
}

// TestWriteIsSafe: no text from the cluster moves the cursor of its reader.
func TestWriteIsSafe(t *testing.T) {
	r := Report{Client: "v1.0.0", Kubernetes: "v1.34.0\x1b[2J", Programs: []Program{{Part: "sidecar", Image: "x\x1b[2J\n" + strings.Repeat("y", 10_000), Pods: 1}}}
	var text bytes.Buffer
	if err := r.Write(&text); err != nil {
		t.Fatal(err)
	}
	if strings.ContainsAny(text.String(), "\x1b") || text.Len() > 3000 || strings.Count(text.String(), "\n") != 4 {
		t.Errorf("output is %q", text.String())
	}
}
