package explain_test

import (
	"bytes"
	"encoding/json"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"

	"github.com/credence-iam/credence/broker/assume/ststest"
	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/broker/debugapi"
	"github.com/credence-iam/credence/operator/explain"
	"github.com/credence-iam/credence/operator/finding"
	"github.com/credence-iam/credence/operator/snapshot"
)

// TestHealthy: a healthy pod has no finding, whatever its user may not see.
func TestHealthy(t *testing.T) {
	for name, tt := range map[string]struct {
		change     func(*world)
		unknown    int
		conclusion string
	}{
		"as it is":                          {func(*world) {}, 0, "The pod has credentials of " + roleARN + " until "},
		"a bare pod":                        {func(w *world) { w.Workload = nil }, 0, "The pod has credentials of "},
		"a sidecar that logs failures only": {func(w *world) { w.Log = []snapshot.LogLine{} }, 0, "The pod has credentials."},
		"a user of the namespace": {func(w *world) {
			w.Log, w.Installation.Configuration, w.Installation.WebhookTLS, w.Installation.WebhookPods, w.Installation.Brokers = nil, nil, nil, nil, nil
			w.Judge, w.Installation.Found.Webhook, w.Installation.Found.Broker = snapshot.Judge{}, nil, nil
			w.Installation.Found.Problems = []error{os.ErrPermission, os.ErrPermission}
			for _, source := range []string{snapshot.SourceLog, snapshot.SourceConfiguration, snapshot.SourceBrokers, snapshot.SourceGrants, snapshot.SourceCertificate} {
				w.Problems[source] = "needs: get something"
			}
		}, 5, "The pod has credentials; 5 steps are not known."},
		"a list of pods that takes too long": {func(w *world) {
			w.Installation.WebhookTLS, w.Installation.WebhookPods, w.Installation.Brokers = nil, nil, nil
			w.Problems[snapshot.SourceBrokers] = "no response within 1.2s"
		}, 2, "The pod has credentials of " + roleARN + " until "},
		"a new broker without keys, beside those that serve": {func(w *world) {
			wrong := w.Installation.Brokers[1]
			wrong.Pod = *wrong.Pod.DeepCopy()
			wrong.Pod.Name, wrong.Pod.Status.Conditions = "credence-broker-3", nil
			wrong.Grants = []debugapi.Grant{{Reason: string(credential.ReasonBrokerCredentials), Message: "the broker's own AWS credentials do not work"}}
			w.Installation.Brokers = append(w.Installation.Brokers, wrong)
		}, 0, "The pod has credentials of "},
		"variables of a Secret": {func(w *world) {
			w.Pod.Spec.Containers[0].EnvFrom = []corev1.EnvFromSource{{SecretRef: &corev1.SecretEnvSource{LocalObjectReference: corev1.LocalObjectReference{Name: "settings"}}}}
		}, 1, "one step is not known."},
		"a program that may ask the node": {func(w *world) { w.Pod.Spec.Containers[0].Image = "registry.example/s3fs:1.90" }, 1, "one step is not known."},
		"brokers that still have the grants of earlier pods": {func(w *world) {
			for i := range w.Installation.Brokers {
				b := &w.Installation.Brokers[i]
				old := b.Grants[0]
				old.AccessKeyID, old.Expiration, old.Reason, old.Failures = "", nil, "STS_ACCESS_DENIED", 3
				ended := old
				ended.Pods, old.ExternalID = 0, true
				b.Grants = append([]debugapi.Grant{old, ended}, b.Grants...)
			}
		}, 0, "The pod has credentials of "},
		"a trial": {func(w *world) { w.Trial = &snapshot.Trial{Line: "The pod has credentials of x", Succeeded: true} }, 0, "The pod has credentials of "},
		"a trial without the right": {func(w *world) {
			w.Problems[snapshot.SourceTrial] = "needs: update pods/ephemeralcontainers in namespace shop"
		}, 1, "one step is not known."},
		"a manifest": {func(w *world) { w.File, w.Pod = "cart.yaml", nil }, 0, "Nothing is wrong."},
	} {
		t.Run(name, func(t *testing.T) {
			w := healthy(t)
			tt.change(w)
			x := explain.Explain(w.Snapshot)
			unknown := 0
			for _, f := range x.Findings {
				switch f.State {
				case finding.OK:
				case finding.Unknown:
					unknown++
				default:
					t.Errorf("%s %s: %s", f.State, f.Step, f.Text)
				}
			}
			if unknown != tt.unknown || !x.Healthy || !strings.Contains(x.Conclusion, tt.conclusion) {
				t.Errorf("%d steps are unknown, healthy is %t, conclusion is %q: %+v", unknown, x.Healthy, x.Conclusion, x.Findings)
			}
		})
	}
}

// TestStarting: the Events of a kubelet that reads the ConfigMap of a new pod are no failure.
func TestStarting(t *testing.T) {
	w := healthy(t)
	w.Log, w.Pod.Status.InitContainerStatuses[0].State = nil, corev1.ContainerState{Waiting: &corev1.ContainerStateWaiting{Reason: "PodInitializing"}}
	w.Messages = []snapshot.Message{{Reason: "FailedMount", Time: w.Now, Text: `MountVolume.SetUp failed for volume "credence-identity" : failed to sync configmap cache: timed out waiting for the condition`}}
	x := explain.Explain(w.Snapshot)
	if cause, wrong := x.Cause(); wrong || x.Healthy || x.Conclusion != "The pod waits for its first credentials." {
		t.Errorf("cause is %+v, conclusion is %q", cause, x.Conclusion)
	}
}

// TestServedMeanwhile: what fails while the pod has credentials is a warning.
func TestServedMeanwhile(t *testing.T) {
	for _, name := range []string{"brokers with 0 replicas", "unreachable STS", "role that AWS does not have", "brokers without their rights", "wrong keys of the brokers", "audience of the brokers only"} {
		t.Run(name, func(t *testing.T) {
			w := healthy(t)
			session := slices.Clone(w.Log)
			broken[name](w)
			failure := w.Log[len(w.Log)-1]
			failure.Level, failure.Text, failure.Expiration = "WARN", "Could not renew credentials, serving the current ones", session[len(session)-1].Expiration
			w.Log, w.Pod.Status.InitContainerStatuses[0].Started = append(session, failure), new(true)
			x := explain.Explain(w.Snapshot)
			if cause, ok := x.Cause(); !ok || cause.State != finding.Warning || !strings.HasPrefix(x.Conclusion, "The pod has credentials, but: ") {
				t.Errorf("cause is %+v, conclusion is %q", cause, x.Conclusion)
			}
		})
	}
}

// TestOtherFailures: each failure of a sidecar is explained, also one that no step knows.
func TestOtherFailures(t *testing.T) {
	for reason, want := range map[string]string{
		"AUDIT_UNAVAILABLE":      "look up the reason",
		"POD_NOT_FOUND":          "recreate the pod",
		"ROLE_NOT_PERMITTED":     "wait",
		"API_SERVER_UNAVAILABLE": "reach the API server",
	} {
		w := healthy(t)
		w.Log = []snapshot.LogLine{{Time: w.Now, Level: "ERROR", Text: "Could not get credentials", Reason: reasonOf(reason), Error: "text"}}
		x := explain.Explain(w.Snapshot)
		if cause, ok := x.Cause(); !ok || cause.State != finding.Failed || !strings.Contains(cause.Remedy.What, want) {
			t.Errorf("%s: cause is %+v, remedy %+v", reason, cause, cause.Remedy)
		}
		// Without the log, the broker's Event says it.
		w.Log, w.Pod.Status.InitContainerStatuses[0].Started = nil, new(false)
		w.Messages = []snapshot.Message{{Object: "pod/cart-1", Reason: "CredentialsRefused", Text: reason + ": text", Time: w.Now}}
		byEvent := explain.Explain(w.Snapshot)
		if again, ok := byEvent.Cause(); !ok || again.Step == "" || !strings.Contains(again.Remedy.What, want) {
			t.Errorf("%s, by its Event: cause is %+v", reason, again)
		}
	}
}

// TestOutput: the output has no characters that move the reader's cursor, JSON has the same findings, and neither has a
// secret.
func TestOutput(t *testing.T) {
	w := healthy(t)
	w.Namespace.Annotations["iam.amazonaws.com/permitted"] = "\x1b[31m" + roleARN
	x := explain.Explain(w.Snapshot)
	var text, document bytes.Buffer
	if err := x.Write(&text, finding.Style{}); err != nil {
		t.Fatal(err)
	}
	if err := finding.WriteJSON(&document, x); err != nil {
		t.Fatal(err)
	}
	if strings.Contains(text.String(), "\x1b") || strings.Contains(document.String(), "\x1b") {
		t.Errorf("the output has an escape sequence: %q", text.String())
	}
	var again explain.Explanation
	if err := json.Unmarshal(document.Bytes(), &again); err != nil || len(again.Findings) != len(x.Findings) || again.Conclusion != x.Conclusion || again.Subject != x.Subject {
		t.Errorf("JSON is %+v, %v", again, err)
	}
	for _, f := range x.Findings {
		if !strings.Contains(text.String(), finding.Printable(f.Text)) {
			t.Errorf("text lacks %q", f.Text)
		}
	}
}

// TestAskersAreDocumented: docs/sdk-compatibility.md has each program that the command knows.
func TestAskersAreDocumented(t *testing.T) {
	page, err := os.ReadFile("../../docs/sdk-compatibility.md")
	if err != nil {
		t.Fatal(err)
	}
	_, section, _ := strings.Cut(string(page), "## What asks the node instead")
	if len(explain.AskNode) == 0 {
		t.Fatal("no program is known")
	}
	for _, program := range explain.AskNode {
		if !strings.Contains(strings.ToLower(section), "| "+program) {
			t.Errorf("the table lacks %s", program)
		}
	}
}

// TestOtherStates: faults of the installation and of clusters that no set-up of testdata/faults.yaml has.
func TestOtherStates(t *testing.T) {
	for name, tt := range map[string]struct {
		change            func(*world)
		step, text, fixed string
	}{
		"no Credence": {func(w *world) { w.Installation.Found = nil }, "installation", "found no Credence", "docs/install.md"},
		"no Deployment of the brokers": {func(w *world) {
			w.brokerless()
			w.Installation.Found.Broker = nil
			w.Installation.Found.Problems = []error{apierrors.NewNotFound(appsv1.Resource("deployments"), "credence-broker")}
		}, "installation", `deployments.apps "credence-broker" not found`, "helm -n credence get manifest credence"},
		"namespace that the webhook leaves out": {func(w *world) {
			w.Installation.Configuration.Webhooks[0].NamespaceSelector.MatchLabels["x"] = "y"
			w.uninjected()
		}, "admission", "leaves out namespace shop", "namespaceSelector"},
		"quota of some pods": {func(w *world) {
			w.Workload.Wanted, w.Workload.Pods = 3, 1
			w.Messages = []snapshot.Message{{Reason: "FailedCreate", Text: `pods "x" is forbidden: exceeded quota: memory, requested: requests.memory=16Mi, used: requests.memory=1Gi, limited: requests.memory=1Gi`}}
		}, "quota", "exceeded quota: memory", `{"spec":{"hard":{"requests.memory":"1056Mi"}}}`},
		"a pod that Kubernetes refuses": {func(w *world) {
			w.refused(`pods "cart-1" is forbidden: violates PodSecurity "restricted:latest": allowPrivilegeEscalation != false`)
		}, "admission", "violates PodSecurity", "describe deployment cart"},
		"a node without room": {func(w *world) {
			w.Pod.Status = corev1.PodStatus{Phase: corev1.PodPending, Conditions: []corev1.PodCondition{{Type: corev1.PodScheduled, Status: corev1.ConditionFalse, Message: "0/3 nodes are available"}}}
		}, "sidecar", "0/3 nodes are available", "describe pod cart-1"},
		"a sidecar that ends": {func(w *world) {
			w.Log = nil
			w.Pod.Status.InitContainerStatuses[0].State = corev1.ContainerState{Waiting: &corev1.ContainerStateWaiting{Reason: "CrashLoopBackOff"}}
			w.Pod.Status.InitContainerStatuses[0].LastTerminationState.Terminated = &corev1.ContainerStateTerminated{Reason: "OOMKilled"}
		}, "sidecar", "it ended with OOMKilled", "--previous"},
		"certificate of another root": {func(w *world) {
			w.unreachable("connection error: tls: failed to verify certificate: x509: certificate signed by unknown authority")
		}, "trust", "signed by unknown authority", "rollout restart deployment/credence-broker"},
		"DNS that does not work": {func(w *world) {
			w.unreachable("DNS has no address for the broker's host credence-broker.credence.svc: no such host")
		}, "DNS", "no such host", "k8s-app=kube-dns"},
		"a firewall": {func(w *world) { w.unreachable("connection error: dial tcp 10.0.0.2:9443: i/o timeout") }, "network", "i/o timeout", "get networkpolicies"},
		"a pod that another webhook changed": {func(w *world) {
			w.refused(`admission webhook "inject.credence-iam.github.io" denied the request: credence: the pod uses the network of its node; remove hostNetwork`)
		}, "pod", "the pod uses the network of its node", "docs/errors.md"},
		"trust ConfigMap gone, with brokers": {(*world).untrusting, "trust", "ConfigMap shop/credence-trust is missing", "rollout restart deployment/credence-broker"},
		"a copy of a pod":                    {func(w *world) { delete(w.Pod.Labels, "iam.amazonaws.com/injected") }, "injection", "copy of an injected pod", ""},
		"a tag that STS denies": {func(w *world) {
			w.fails(w.sts(ststest.Behavior{Fault: &ststest.Fault{Code: "AccessDenied", Status: 403, Message: "User: x is not authorized to perform: sts:TagSession on resource: y"}}, right))
		}, "STS", "sts:TagSession", `["sts:AssumeRole","sts:TagSession"]`},
		"a program on the sidecar's port": {func(w *world) {
			w.Trial = &snapshot.Trial{Line: "http://127.0.0.1:9779/v1/credentials responded with status 404 Not Found"}
		}, "trial", "status 404", "docs/errors.md"},
		"session that STS rejects": {func(w *world) { w.fails(w.sts(ststest.Behavior{MaxDuration: 20 * time.Minute}, right)) }, "STS", "MaxSessionDuration", ""},
	} {
		t.Run(name, func(t *testing.T) {
			w := healthy(t)
			tt.change(w)
			x := explain.Explain(w.Snapshot)
			cause, ok := x.Cause()
			if !ok || cause.Step != tt.step || cause.State != finding.Failed || !strings.Contains(cause.Text, tt.text) {
				t.Fatalf("cause is %+v", cause)
			}
			if remedy := strings.Join(append(cause.Remedy.Commands, cause.Remedy.Page), "\n"); !strings.Contains(remedy, tt.fixed) {
				t.Errorf("remedy is %s", remedy)
			}
		})
	}
}

// TestOrder: what starts before the sidecar gets no credentials, and the pod may have the sidecar of an earlier version.
func TestOrder(t *testing.T) {
	w := healthy(t)
	w.Pod.Spec.InitContainers = append([]corev1.Container{{Name: "mesh"}}, w.Pod.Spec.InitContainers...)
	w.Sidecar().Image = "localhost/credence-sidecar:old"
	x := explain.Explain(w.Snapshot)
	const want = "the pod has the sidecar localhost/credence-sidecar:old; new pods get localhost/credence-sidecar:local; init containers that start before it have no credentials: mesh"
	if !slices.ContainsFunc(x.Findings, func(f finding.Finding) bool { return f.State == finding.OK && f.Text == want }) || !x.Healthy {
		t.Errorf("findings are %+v", x.Findings)
	}
}
