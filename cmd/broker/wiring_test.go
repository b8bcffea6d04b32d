package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	eventsv1 "k8s.io/api/events/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/credence-iam/credence/broker/assume/ststest"
	"github.com/credence-iam/credence/broker/client"
	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/broker/kube/apitest"
	"github.com/credence-iam/credence/broker/placement"
	"github.com/credence-iam/credence/broker/policy"
	"github.com/credence-iam/credence/broker/tracing/otlptest"
	"github.com/credence-iam/credence/certs"
	"github.com/credence-iam/credence/certs/certstest"
	"github.com/credence-iam/credence/certs/trust"
	"github.com/credence-iam/credence/cmd/internal/program/processtest"
)

func TestMain(m *testing.M) {
	processtest.Main(main)
	os.Exit(m.Run())
}

// wiring has one or several rows for each flag. Each row runs the program with doubles of the API server and of STS, and checks
// from outside what the flag changes. So a row fails if the program parses a flag and then ignores it. A new flag needs a row
// here.
var wiring = []struct {
	flag, shows string
	run         func(w *world)
}{
	{"listen", "the broker serves gRPC on it", func(w *world) {
		address := processtest.FreeAddress(w)
		b := w.start("--listen=" + address)
		if b.address != address {
			w.Errorf("the broker serves on %s, want %s", b.address, address)
		}
		b.mustServe(w.pod("cart-1", "cart"))
	}},
	{"admin-listen", "the broker serves health, readiness and metrics on it", func(w *world) {
		address := processtest.FreeAddress(w)
		b := w.start("--admin-listen=" + address)
		if b.admin != address || b.metric("ready") != 1 {
			w.Errorf("the admin pages are on %s, want %s; ready is %v", b.admin, address, b.metric("ready"))
		}
		if code, _ := b.get(address, "/healthz"); code != http.StatusOK {
			w.Errorf("/healthz returns %d", code)
		}
	}},
	{"debug-listen", "the broker shows its grants on it", func(w *world) {
		address := processtest.FreeAddress(w)
		b := w.start("--debug-listen=" + address)
		b.mustServe(w.pod("cart-1", "cart"))
		if code, text := b.get(address, "/debug/grants"); code != http.StatusOK || !strings.Contains(text, roleARN("cart")) {
			w.Errorf("/debug/grants returns %d: %s", code, text)
		}
	}},
	{"command-account", "the broker carries out commands only with a token of that account", func(w *world) {
		account := &corev1.ServiceAccount{}
		account.Namespace, account.Name = w.pod("commander", "cart").Namespace, "commander"
		w.api.Put(account)
		holder := &corev1.Pod{Spec: corev1.PodSpec{ServiceAccountName: account.Name}}
		holder.Namespace, holder.Name = account.Namespace, "holder"
		w.api.Put(holder)
		address := processtest.FreeAddress(w)
		w.start("--debug-listen="+address, "--command-account="+account.Name, "--namespace="+account.Namespace)
		for token, want := range map[string]int{
			"":                                      http.StatusUnauthorized,
			w.api.Token(w, holder, apitest.Token{}): http.StatusUnauthorized,
			w.api.Token(w, holder, apitest.Token{Audience: "credence-broker-commands"}): http.StatusOK,
		} {
			r, err := http.NewRequestWithContext(w.Context(), http.MethodPost, "http://"+address+"/debug/grants/renew?role="+roleARN("cart"), nil)
			processtest.Must(w, err)
			r.Header.Set("Authorization", "Bearer "+token)
			response, err := http.DefaultClient.Do(r)
			processtest.Must(w, err)
			if _ = response.Body.Close(); response.StatusCode != want {
				w.Errorf("a command with a token of %d bytes has status %s, want %d", len(token), response.Status, want)
			}
		}
	}},
	{"trace-endpoint", "the broker traces calls, from the server to STS", func(w *world) {
		collector := otlptest.Start(w)
		b := w.start("--trace-endpoint="+collector.Endpoint(), "--trace-ratio=1")
		b.mustServe(w.pod("cart-1", "cart"))
		b.end()
		var names []string
		for _, span := range collector.Spans() {
			names = append(names, span.Name+" "+span.Attributes["credence.role"])
		}
		for _, want := range []string{"GetCredentials " + roleARN("cart"), "AssumeRole " + roleARN("cart")} {
			if !slices.Contains(names, want) {
				w.Errorf("the spans are %q, want %q among them", names, want)
			}
		}
	}},
	{"trace-ratio", "with 0, no trace is recorded", func(w *world) {
		collector := otlptest.Start(w)
		b := w.start("--trace-endpoint="+collector.Endpoint(), "--trace-ratio=0")
		b.mustServe(w.pod("cart-1", "cart"))
		b.end()
		if n := len(collector.Spans()); n > 0 {
			w.Errorf("%d spans were recorded", n)
		}
	}},
	{"tls-cert", "the broker serves the certificate in that file, and one that replaces it", func(w *world) {
		dir := w.TempDir()
		leaf := w.ca.Leaf(brokerName)
		certFile, keyFile := leaf.WriteTo(dir)
		b := w.start("--tls-cert="+certFile, "--tls-key="+keyFile, "--roots-file=")
		if got := b.serial(); got != serialOf(leaf) {
			w.Errorf("the broker serves another certificate than that in the file")
		}
		next := w.ca.Leaf(brokerName)
		next.WriteTo(dir)
		b.Await(w.T, "the replaced certificate is served", func() bool { return b.serial() == serialOf(next) })
	}},
	{"tls-key", "the broker reads the key from that file", func(w *world) {
		leaf, file := w.ca.Leaf(brokerName), filepath.Join(w.TempDir(), "key.pem")
		certFile, _ := w.ca.Leaf(brokerName).WriteTo(w.TempDir()) // with another key
		certstest.WriteVolume(w, filepath.Dir(certFile), map[string][]byte{"tls.crt": leaf.CertPEM, "tls.key": w.ca.Leaf(brokerName).KeyPEM})
		processtest.Must(w, os.WriteFile(file, leaf.KeyPEM, 0o600))
		b := w.start("--tls-cert="+certFile, "--tls-key="+file, "--roots-file=")
		b.mustServe(w.pod("cart-1", "cart"))
	}},
	{"kubeconfig", "the broker watches the pods, namespaces and service accounts of that API server", func(w *world) {
		w.start()
		for _, resource := range []string{"pods", "namespaces", "serviceaccounts"} {
			if w.api.Requests(http.MethodGet, resource, "") == 0 {
				w.Errorf("the broker has not listed %s", resource)
			}
		}
	}},
	{"annotation-prefix", "annotation keys have that prefix, and no other", func(w *world) {
		w.api.Put(&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{
			Name: "new", Labels: map[string]string{"aws.example.com/inject": "enabled"}, Annotations: map[string]string{"aws.example.com/permitted": ".*"},
		}})
		w.api.Put(&corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Namespace: "new", Name: "default"}})
		pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{
			Namespace: "new", Name: "cart-1", Labels: map[string]string{"aws.example.com/injected": "true"}, Annotations: map[string]string{"aws.example.com/role": "cart"},
		}, Spec: corev1.PodSpec{ServiceAccountName: "default"}}
		w.api.Put(pod)
		b := w.start("--annotation-prefix=aws.example.com", "--roots-file="+w.rootsFile, "--trust-propagation=0")
		b.mustServe(pod)
		b.mustRefuse(w.pod("old-1", "cart"), credential.ReasonNamespaceNotOpted)
		b.Await(w.T, "roots are published in the namespace that is opted in by that prefix", func() bool { return w.roots("new", "credence-trust") != "" })
		if w.roots("shop", "credence-trust") != "" {
			w.Error("the broker publishes roots in a namespace that is opted in by another prefix")
		}
	}},
	{"audience", "tokens for another audience are refused", func(w *world) {
		b := w.start("--audience=credentials.example")
		pod := w.pod("cart-1", "cart")
		b.mustServe(pod, apitest.Token{Audience: "credentials.example"})
		b.mustRefuse(pod, credential.ReasonTokenAudience)
	}},
	{"audience", "the API server reviews tokens for it", func(w *world) {
		b := w.start("--audience=credentials.example", "--token-verification=tokenreview")
		pod := w.pod("cart-1", "cart")
		b.mustServe(pod, apitest.Token{Audience: "credentials.example"})
		b.mustRefuse(pod, credential.ReasonTokenAudience)
	}},
	{"issuer", "tokens of any other issuer are refused, also of the API server", func(w *world) {
		b := w.start("--issuer=https://one.example,https://two.example")
		pod := w.pod("cart-1", "cart")
		b.mustServe(pod, apitest.Token{Issuer: "https://two.example"})
		b.mustRefuse(pod, credential.ReasonTokenIssuer)
	}},
	{"issuer", "the same with token review", func(w *world) {
		b := w.start("--issuer=https://one.example,https://two.example", "--token-verification=tokenreview")
		pod := w.pod("cart-1", "cart")
		b.mustServe(pod, apitest.Token{Issuer: "https://one.example"})
		b.mustRefuse(pod, credential.ReasonTokenIssuer)
	}},
	{"token-verification", "jwks creates no TokenReview", func(w *world) {
		b := w.start("--token-verification=jwks")
		b.mustServe(w.pod("cart-1", "cart"))
		if n := w.api.Requests(http.MethodPost, "tokenreviews", ""); n > 0 {
			w.Errorf("the broker has created %d TokenReviews", n)
		}
	}},
	{"token-verification", "tokenreview sends the token to the API server", func(w *world) {
		b := w.start("--token-verification=tokenreview")
		before := w.api.Requests(http.MethodPost, "tokenreviews", "")
		b.mustServe(w.pod("cart-1", "cart"))
		if after := w.api.Requests(http.MethodPost, "tokenreviews", ""); before == 0 || after != before+1 {
			w.Errorf("the broker has created %d TokenReviews to start and %d after a call", before, after)
		}
	}},
	{"base-arn", "it completes the names of roles", func(w *world) {
		b := w.start("--base-arn=arn:aws:iam::999999999999:role/team/")
		if role := b.mustServe(w.pod("cart-1", "cart")).Role.String(); role != "arn:aws:iam::999999999999:role/team/cart" {
			w.Errorf("the role is %s", role)
		}
	}},
	{"cluster-name", "sessions are named after the cluster", func(w *world) {
		b := w.start("--cluster-name=blue")
		b.mustServe(w.pod("cart-1", "cart"))
		for _, call := range w.calls("cart") {
			if !strings.HasPrefix(call.SessionName, "blue") {
				w.Errorf("the session name is %s", call.SessionName)
			}
		}
	}},
	{"region", "responses have that region", func(w *world) {
		b := w.start("--region=ap-southeast-2")
		if lease := b.mustServe(w.pod("cart-1", "cart")); lease.Region != "ap-southeast-2" {
			w.Errorf("the region is %q", lease.Region)
		}
	}},
	{"sts-endpoint", "the broker calls STS at that URL", func(w *world) {
		b := w.start("--sts-endpoint=" + w.sts.URL())
		b.mustServe(w.pod("cart-1", "cart"))
		if len(w.calls("cart")) == 0 {
			w.Error("the role was not assumed at that endpoint")
		}
	}},
	{"assume-role", "that role is assumed first, and its session assumes the pod's role", func(w *world) {
		b := w.start("--assume-role=" + roleARN("hop"))
		b.mustServe(w.pod("cart-1", "cart"))
		own, _ := w.sts.Keys()
		hops, calls := w.calls("hop"), w.calls("cart")
		if len(hops) == 0 || len(calls) == 0 || hops[0].AccessKeyID != own || calls[0].AccessKeyID != hops[0].IssuedAccessKeyID {
			w.Errorf("the broker's own keys are %s, the calls for the first role %+v, those for the pod's %+v", own, hops, calls)
		}
		long := w.pod("long-1", "long")
		long.Annotations["iam.amazonaws.com/duration"] = "2h"
		w.api.Put(long)
		b.mustRefuse(long, credential.ReasonAnnotationInvalid) // AWS does not allow it with role chaining
	}},
	{"sts-rate", "the brokers share that rate", func(w *world) {
		w.brokers("10.0.0.1", "10.0.0.2", "10.0.0.3", "10.0.0.4")
		b := w.start("--sts-rate=100", "--service=credence-broker", "--pod-ips=10.0.0.1")
		if share := b.metric("fetch_rate_share"); share != 25 {
			w.Errorf("one of four brokers may make %v calls per second", share)
		}
	}},
	{"sts-concurrency", "the broker makes no more STS calls at a time", func(w *world) {
		hold := make(chan struct{})
		w.sts.SetDefault(ststest.Behavior{Hold: hold})
		cart, till := w.pod("cart-1", "cart"), w.pod("till-1", "till")
		b := w.launch("--sts-concurrency=1")
		b.Await(w.T, "one call is made, and another one waits", func() bool {
			return b.metric("fetches_in_flight") == 1 && b.metric(`fetches_queued{kind="ahead"}`) == 1
		})
		if n := w.sts.Count("AssumeRole", ""); n != 1 {
			w.Errorf("STS has received %d calls", n)
		}
		close(hold)
		b.mustServe(cart)
		b.mustServe(till)
	}},
	{"max-token-life", "tokens with a longer lifetime are refused", func(w *world) { w.limitsLife() }},
	{"max-token-life", "the same with token review", func(w *world) { w.limitsLife("--token-verification=tokenreview") }},
	{"max-grants-per-namespace", "further sessions of a namespace are refused", func(w *world) {
		pods := []*corev1.Pod{w.pod("cart-1", "cart"), w.pod("till-1", "till")}
		b := w.start("--max-grants-per-namespace=1")
		refused := 0
		for _, pod := range pods {
			if _, err := b.credentials(pod); err != nil {
				refused++
				if reason := credential.ReasonOf(err); reason != credential.ReasonTooManyGrants {
					w.Errorf("%s is refused with %v", pod.Name, err)
				}
			}
		}
		if refused != 1 {
			w.Errorf("%d of two sessions are refused", refused)
		}
	}},
	{"service", "a broker fetches the sessions that it owns, and others when brokers leave", func(w *world) {
		pods := w.pods(24)
		ready := w.brokers("10.0.0.1", "10.0.0.2", "10.0.0.3", "10.0.0.4", "10.0.0.5")
		w.slice("another-service", "10.0.0.1")
		b := w.start("--service=credence-broker", "--pod-ips=10.0.0.1", "--settle-time=1h", "--sts-rate=50")
		w.mustFetch(b, owned(w, pods, ready, "10.0.0.1", 1))
		w.brokers("10.0.0.1")
		w.mustFetch(b, owned(w, pods, ready[:1], "10.0.0.1", 1))
		b.Await(w.T, "the broker takes the others' share of the rate", func() bool { return b.metric("fetch_rate_share") == 50 })
	}},
	{"pod-ips", "it selects which of the brokers this one is", func(w *world) {
		pods := w.pods(24)
		ready := w.brokers("10.0.0.1", "10.0.0.2", "10.0.0.3", "10.0.0.4", "10.0.0.5")
		b := w.start("--service=credence-broker", "--pod-ips=fd00::4,10.0.0.4", "--settle-time=1h")
		w.mustFetch(b, owned(w, pods, ready, "10.0.0.4", 1))
	}},
	{"settle-time", "after that time, a broker fetches the sessions of which it is the second owner", func(w *world) {
		pods := w.pods(24)
		ready := w.brokers("10.0.0.1", "10.0.0.2", "10.0.0.3", "10.0.0.4", "10.0.0.5")
		b := w.start("--service=credence-broker", "--pod-ips=10.0.0.1", "--settle-time=1ms")
		w.mustFetch(b, owned(w, pods, ready, "10.0.0.1", placement.Owners))
	}},
	{"audit", "required refuses a call whose line would be lost", func(w *world) {
		w.stdout = w.unwritable()
		b := w.start("--audit=required")
		pod := w.pod("cart-1", "cart")
		b.Await(w.T, "a call is refused", func() bool {
			_, err := b.credentials(pod)
			return credential.ReasonOf(err) == credential.ReasonAuditUnavailable
		})
	}},
	{"audit", "best-effort counts lines that are lost, and the broker continues", func(w *world) {
		w.stdout = w.unwritable()
		b := w.start("--audit=best-effort")
		pod := w.pod("cart-1", "cart")
		b.mustServe(pod)
		b.Await(w.T, "a lost line is counted", func() bool { return b.metric("audit_lines_lost_total") >= 1 })
		b.mustServe(pod)
	}},
	{"rules-file", "it limits pods, also after a change, and allowed sessions are still renewed", func(w *world) {
		w.sts = w.startSTS(ststest.Config{SessionDuration: func(time.Duration) time.Duration { return 4 * time.Second }})
		file := filepath.Join(w.TempDir(), "rules.yaml")
		rules := func(roles ...string) {
			text := fmt.Sprintf("namespaces: [{match: [shop], accounts: ['*'], roles: %q}]", roles)
			processtest.Must(w, os.WriteFile(file, []byte(strings.ReplaceAll(text, `" "`, `", "`)), 0o600))
		}
		rules(roleARN("cart"), roleARN("till"))
		cart, till, other := w.pod("cart-1", "cart"), w.pod("till-1", "till"), w.pod("other-1", "other")
		b := w.start("--rules-file=" + file)
		b.mustServe(cart)
		b.mustServe(till)
		b.mustRefuse(other, credential.ReasonRulesRole)
		if kept := b.metric("sessions_kept"); kept != 2 || b.metric("rules_file_ok") != 1 {
			w.Errorf("%v sessions are active, rules_file_ok is %v", kept, b.metric("rules_file_ok"))
		}
		rules(roleARN("cart"))
		b.Await(w.T, "a role that is not permitted any more is refused", func() bool {
			_, err := b.credentials(till)
			return credential.ReasonOf(err) == credential.ReasonRulesRole
		})
		b.Await(w.T, "its session is no longer active", func() bool { return b.metric("sessions_kept") == 1 })
		renewed := len(w.calls("cart"))
		b.Await(w.T, "the session that is permitted is renewed", func() bool { return len(w.calls("cart")) > renewed })
		b.mustServe(cart)
	}},
	{"roots-file", "the broker publishes its roots in opted-in namespaces and in its own", func(w *world) {
		w.api.Put(&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "elsewhere"}})
		b := w.start("--roots-file=" + w.rootsFile)
		for _, namespace := range []string{"shop", "credence"} {
			b.Await(w.T, "roots are published in "+namespace, func() bool { return w.roots(namespace, "credence-trust") == string(w.ca.PEM) })
		}
		if w.roots("elsewhere", "credence-trust") != "" {
			w.Error("the broker publishes roots in a namespace that is not opted in")
		}
	}},
	{"roots-file", "without one, the broker publishes nothing and does not request the Lease", func(w *world) {
		b := w.start("--roots-file=")
		b.mustServe(w.pod("cart-1", "cart"))
		if n := w.api.Requests("", "leases", "") + w.api.Requests("", "configmaps", ""); n > 0 {
			w.Errorf("%d requests are about Leases and ConfigMaps", n)
		}
	}},
	{"namespace", "it has the Lease, the trust record and the brokers' endpoints", func(w *world) {
		w.namespace = "iam-system"
		w.brokers("10.0.0.1", "10.0.0.2")
		b := w.start("--namespace=iam-system", "--roots-file="+w.rootsFile, "--service=credence-broker", "--pod-ips=10.0.0.1", "--sts-rate=10")
		b.Await(w.T, "the broker leads", func() bool { return w.leader("iam-system") != "" })
		b.Await(w.T, "the record of roots is there", func() bool { return w.configMap("iam-system", "credence-trust").Data[trust.RecordKey] != "" })
		if share := b.metric("fetch_rate_share"); share != 5 {
			w.Errorf("one of two brokers may make %v calls per second", share)
		}
	}},
	{"trust-config-map", "the ConfigMaps have that name", func(w *world) {
		b := w.start("--roots-file="+w.rootsFile, "--trust-config-map=brokers-roots")
		b.Await(w.T, "roots are published", func() bool { return w.roots("shop", "brokers-roots") == string(w.ca.PEM) })
		b.Await(w.T, "the metrics show it", func() bool { return b.metric("trust_ok") == 1 })
	}},
	{"trust-owner", "that ClusterRole owns the ConfigMaps", func(w *world) {
		owner := &rbacv1.ClusterRole{ObjectMeta: metav1.ObjectMeta{Name: "credence-owner"}}
		w.api.Put(owner)
		b := w.start("--roots-file="+w.rootsFile, "--trust-owner=credence-owner")
		b.Await(w.T, "roots are published", func() bool { return w.roots("shop", "credence-trust") != "" })
		owners := w.configMap("shop", "credence-trust").OwnerReferences
		if len(owners) != 1 || owners[0].Name != owner.Name || owners[0].UID != owner.UID {
			w.Errorf("the owners are %+v, want %s with UID %s", owners, owner.Name, owner.UID)
		}
	}},
	{"trust-propagation", "the broker does not serve a certificate under a new root for that time", func(w *world) {
		w.stage("1h", func(b *running, next *certstest.Leaf) {
			b.Await(w.T, "the new root is published, and said to be", func() bool {
				return strings.Count(w.configMap("credence", "credence-trust").Data[trust.RecordKey], `"published":`) == 2
			})
			if b.serial() == serialOf(next) {
				w.Error("the broker serves the new certificate immediately")
			}
		})
	}},
	{"trust-propagation", "0 serves it immediately", func(w *world) {
		w.stage("0", func(b *running, next *certstest.Leaf) {
			b.Await(w.T, "the new certificate is served", func() bool { return b.serial() == serialOf(next) })
		})
	}},
	{"log-level", "error logs errors only", func(w *world) {
		b := &running{w: w, admin: processtest.FreeAddress(w)}
		b.Process = w.process("--log-level=error", "--admin-listen="+b.admin)
		b.Await(w.T, "the broker is ready", b.ready)
		if len(b.Stderr.Lines("level", "INFO")) > 0 || len(b.Stderr.Lines("level", "WARN")) > 0 {
			w.Errorf("the log is %s", b.Stderr)
		}
	}},
	{"log-level", "debug logs why a session is not prefetched", func(w *world) {
		pod := w.pod("cart-1", "cart")
		pod.Annotations["iam.amazonaws.com/duration"] = "soon"
		w.api.Put(pod)
		b := w.start("--log-level=debug")
		if record := b.Logged(w.T, "Skipped the prefetch of a session"); record["level"] != "DEBUG" || record["pod"] != "shop/cart-1" {
			w.Errorf("the record is %v", record)
		}
	}},
}

// exempt are the flags without a row, with the reason.
var exempt = map[string]string{}

// TestFlagsAreWired runs the rows.
func TestFlagsAreWired(t *testing.T) {
	t.Parallel()
	var rows []string
	for _, row := range wiring {
		rows = append(rows, row.flag)
		t.Run(row.flag+": "+row.shows, func(t *testing.T) {
			t.Parallel()
			row.run(newWorld(t))
		})
	}
	processtest.CheckFlags(t, flags, rows, exempt)
}

// The program reads the variables that the chart sets instead of flags.
func TestEnvironmentIsWired(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.env = append(w.env, "POD_NAMESPACE=iam-system", "POD_IPS=10.0.0.2", "AWS_REGION=ap-southeast-2")
	w.namespace = "iam-system"
	pods := w.pods(12)
	ready := w.brokers("10.0.0.1", "10.0.0.2", "10.0.0.3", "10.0.0.4", "10.0.0.5")
	b := w.start("--namespace=", "--region=", "--service=credence-broker", "--settle-time=1h", "--roots-file="+w.rootsFile)
	w.mustFetch(b, owned(w, pods, ready, "10.0.0.2", 1))
	b.Await(t, "the broker leads", func() bool { return w.leader("iam-system") != "" })
	if lease := b.mustServe(pods[0]); lease.Region != "ap-southeast-2" {
		t.Errorf("the region is %q", lease.Region)
	}
}

// Each response has a line in the audit log and is counted. A refusal that a user must fix has an Event on its pod.
func TestResponsesAreRecorded(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	b := w.start()
	cart, wrong := w.pod("cart-1", "cart"), w.pod("wrong-1", "wrong")
	wrong.Annotations["iam.amazonaws.com/duration"] = "soon"
	w.api.Put(wrong)
	b.mustServe(cart)
	b.mustRefuse(wrong, credential.ReasonAnnotationInvalid)
	for pod, decision := range map[string]string{"cart-1": "allow", "wrong-1": "deny"} {
		b.Await(t, "the audit log has "+decision+" for "+pod, func() bool {
			lines := b.Stdout.Lines("pod", pod)
			return len(lines) == 1 && lines[0]["decision"] == decision
		})
	}
	b.Await(t, "there is an Event on the refused pod, and on no other", func() bool {
		names := w.api.Names(&eventsv1.Event{ObjectMeta: metav1.ObjectMeta{Namespace: "shop"}})
		return len(names) == 1 && strings.HasPrefix(names[0], "wrong-1.")
	})
	if n := b.metric(`refusals_total{reason="ANNOTATION_INVALID"}`); n != 1 {
		t.Errorf("the metrics count %v refusals", n)
	}
	if n := b.metric(`sts_calls_total{action="AssumeRole",outcome="ok"}`); n < 1 {
		t.Errorf("the metrics count %v STS calls", n)
	}
}

// A broker with all its features in use exports every metric of docs/metrics.md.
func TestMetricsAreWired(t *testing.T) {
	t.Parallel()
	page, err := os.ReadFile("../../docs/metrics.md")
	processtest.Must(t, err)
	documented := regexp.MustCompile("(?m)^\\| `(credence_broker_[a-z_]+)` \\|").FindAllSubmatch(page, -1)
	if len(documented) == 0 {
		t.Fatal("docs/metrics.md has no metric of the broker")
	}
	w := newWorld(t)
	rules := filepath.Join(t.TempDir(), "rules.yaml")
	processtest.Must(t, os.WriteFile(rules, []byte("namespaces: [{match: ['*'], accounts: ['*'], roles: ['*']}]"), 0o600))
	w.brokers("10.0.0.1")
	b := w.start("--rules-file="+rules, "--token-verification=tokenreview", "--assume-role="+roleARN("hop"), "--trace-endpoint="+otlptest.Start(t).Endpoint(),
		"--roots-file="+w.rootsFile, "--service=credence-broker", "--pod-ips=10.0.0.1")
	b.mustServe(w.pod("cart-1", "cart"))
	b.Await(t, "the session is warm", func() bool { return b.metric("sessions_warm") == 1 })
	_, text := b.get(b.admin, "/metrics")
	for _, metric := range documented {
		if name := string(metric[1]); !regexp.MustCompile(`(?m)^` + name + `(_count)?[ {]`).MatchString(text) {
			t.Errorf("the broker does not export %s", name)
		}
	}
}

// The broker prefetches the sessions of new pods.
func TestPodsAreFollowed(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	b := w.start()
	pod := w.pod("cart-1", "cart")
	b.Await(t, "the session is warm", func() bool { return b.metric("sessions_warm") == 1 })
	w.api.Delete(pod)
	b.Await(t, "the session is no longer active", func() bool { return b.metric("sessions_kept") == 0 })
}

// A broker that shuts down gives up the lead before it drains, so that another broker leads meanwhile.
func TestLeadIsGivenUpWhileDraining(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	b := w.start("--roots-file=" + w.rootsFile)
	b.Await(t, "the broker leads", func() bool { return w.leader("credence") != "" })

	hold := make(chan struct{})
	w.sts.SetDefault(ststest.Behavior{Hold: hold})
	pod := w.pod("cart-1", "cart")
	answered := make(chan error, 1)
	go func() {
		_, err := b.credentials(pod)
		answered <- err
	}()
	b.Await(t, "a caller waits for STS", func() bool { return b.metric(`lookups_total{outcome="miss"}`) == 1 })
	b.Terminate()
	b.Await(t, "the broker gives the lead up", func() bool { return w.leader("credence") == "" })
	if code, text := b.get(b.admin, "/readyz"); code == http.StatusOK {
		t.Errorf("a broker that shuts down is ready: %s", text)
	}
	select {
	case err := <-answered:
		t.Fatalf("the call ended with %v before the broker gave up the lead", err)
	default:
	}
	close(hold)
	if err := <-answered; err != nil {
		t.Errorf("the running call failed: %v", err)
	}
	b.end()
	if lines := b.Stdout.Lines("pod", "cart-1"); len(lines) != 1 || lines[0]["decision"] != "allow" {
		t.Errorf("the audit log has %v for the running call", lines)
	}
	if holder := w.leader("credence"); holder != "" {
		t.Errorf("%s leads again", holder)
	}
}

// A broker that does not know its account is alive, not ready, and shuts down on SIGTERM.
func TestAliveWithoutSTS(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.sts.SetIdentity(ststest.Behavior{Fault: ststest.Hang()})
	b := &running{w: w, admin: processtest.FreeAddress(w)}
	b.Process = w.process("--admin-listen=" + b.admin)
	b.Await(t, "the broker is alive", func() bool { code, _ := b.get(b.admin, "/healthz"); return code == http.StatusOK })
	processtest.Must(t, w.sts.AwaitCount(t.Context(), "GetCallerIdentity", "", 1))
	if b.ready() {
		t.Error("the broker is ready")
	}
	b.end()
}

// An invalid file stops the start before STS has responded, with an error that names the flag.
func TestWrongFilesStopTheStart(t *testing.T) {
	t.Parallel()
	missing := filepath.Join(t.TempDir(), "missing")
	for flag, args := range map[string][]string{
		"--rules-file": nil, "--roots-file": nil, "--tls-cert": nil, "--tls-key": nil, "--kubeconfig": nil,
		"--service": {"--service=credence-broker", "--pod-ips=10.0.0.1", "--namespace="},
	} {
		t.Run(flag, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			w.sts.SetIdentity(ststest.Behavior{Fault: ststest.Hang()})
			if args == nil {
				args = []string{flag + "=" + missing}
			}
			w.process(args...).MustFail(t, 1, flag)
		})
	}
}

// brokerName is the name in the brokers' certificates.
const brokerName = "credence-broker.credence.svc"

// world is the environment of a broker.
type world struct {
	*testing.T
	api       *apitest.Server
	sts       *ststest.Server
	ca        *certstest.CA
	rootsFile string
	namespace string // of the brokers
	args, env []string
	stdout    *os.File // nil: captured
}

// newWorld returns a world with the opted-in namespace shop, which permits all roles.
func newWorld(t *testing.T) *world {
	t.Helper()
	w := &world{T: t, api: apitest.Start(t), ca: certstest.NewCA(t), namespace: "credence"}
	w.api.Put(
		&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{
			Name: "shop", Labels: map[string]string{"iam.amazonaws.com/inject": "enabled"}, Annotations: map[string]string{"iam.amazonaws.com/permitted": ".*"},
		}},
		&corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "default"}},
	)
	certFile, keyFile := w.ca.Leaf(brokerName).WriteTo(t.TempDir())
	w.rootsFile = filepath.Join(filepath.Dir(certFile), "ca.crt")
	w.args = []string{
		"--listen=127.0.0.1:0", "--admin-listen=127.0.0.1:0", "--debug-listen=", "--tls-cert=" + certFile, "--tls-key=" + keyFile, "--roots-file=",
		"--kubeconfig=" + w.api.Kubeconfig(t), "--region=eu-central-1", "--namespace=credence",
	}
	w.sts = w.startSTS(ststest.Config{})
	return w
}

func (w *world) startSTS(cfg ststest.Config) *ststest.Server {
	w.Helper()
	// It must live until the broker has ended, in a cleanup.
	sts, err := ststest.Start(context.WithoutCancel(w.Context()), cfg)
	processtest.Must(w, err)
	w.Cleanup(sts.Close)
	return sts
}

// pod makes an injected pod of shop with that role.
func (w *world) pod(name, role string) *corev1.Pod {
	pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{
		Namespace: "shop", Name: name, Labels: map[string]string{"iam.amazonaws.com/injected": "true"},
		Annotations: map[string]string{"iam.amazonaws.com/role": role, "iam.amazonaws.com/service-account": "default"},
	}, Spec: corev1.PodSpec{ServiceAccountName: "default"}}
	w.api.Put(pod)
	return pod
}

// pods makes n pods, each with its own role.
func (w *world) pods(n int) (pods []*corev1.Pod) {
	for i := range n {
		pods = append(pods, w.pod(fmt.Sprintf("pod-%d", i), fmt.Sprintf("role-%d", i)))
	}
	return pods
}

// brokers sets the ready endpoints of the brokers' Service.
func (w *world) brokers(addresses ...string) (ready []netip.Addr) {
	w.slice("credence-broker", addresses...)
	for _, address := range addresses {
		ready = append(ready, netip.MustParseAddr(address))
	}
	return ready
}

func (w *world) slice(service string, addresses ...string) {
	slice := &discoveryv1.EndpointSlice{
		ObjectMeta:  metav1.ObjectMeta{Namespace: w.namespace, Name: service, Labels: map[string]string{discoveryv1.LabelServiceName: service}},
		AddressType: discoveryv1.AddressTypeIPv4,
	}
	for _, address := range addresses {
		slice.Endpoints = append(slice.Endpoints, discoveryv1.Endpoint{Addresses: []string{address}})
	}
	w.api.Put(slice)
}

// owned returns the roles of the pods for which self is among the first owners of the ready brokers.
func owned(w *world, pods []*corev1.Pod, ready []netip.Addr, self string, owners int) (roles []string) {
	keys, err := policy.NewKeys(policy.DefaultPrefix)
	processtest.Must(w, err)
	for _, pod := range pods {
		key, err := policy.Pod{
			Namespace: pod.Namespace, Name: pod.Name, UID: string(pod.UID), ServiceAccount: "default", Request: keys.Request(pod.Annotations),
		}.RoutingKey()
		processtest.Must(w, err)
		rank := placement.Rank(string(key), ready)
		if slices.Contains(rank[:min(owners, len(rank))], netip.MustParseAddr(self)) {
			roles = append(roles, roleARN(pod.Annotations["iam.amazonaws.com/role"]))
		}
	}
	if slices.Sort(roles); len(roles) == 0 {
		w.Fatal("the broker owns no session: more pods are needed")
	}
	return roles
}

// limitsLife checks the maximum of a row of --max-token-life.
func (w *world) limitsLife(args ...string) {
	pod := w.pod("cart-1", "cart")
	b := w.start(append(args, "--max-token-life=3h")...)
	b.mustServe(pod, apitest.Token{Life: 2 * time.Hour})
	if _, err := b.credentials(pod, apitest.Token{Life: 4 * time.Hour}); !errors.Is(err, credential.ErrUnauthenticated) {
		w.Errorf("a token that lives longer: %v", err)
	}
}

// mustFetch waits until the broker has fetched the sessions of these roles, and no others.
func (w *world) mustFetch(b *running, roles []string) {
	w.Helper()
	b.Await(w.T, fmt.Sprintf("the broker has %d active sessions", len(roles)), func() bool {
		return b.metric("sessions_kept") == float64(len(roles)) && b.metric("sessions_warm") == float64(len(roles))
	})
	fetched := make(map[string]bool)
	for _, call := range w.sts.Calls() {
		if call.Action == "AssumeRole" {
			fetched[call.RoleARN] = true
		}
	}
	if got := slices.Sorted(maps.Keys(fetched)); !slices.Equal(got, roles) {
		w.Errorf("the roles assumed are\n%q, want\n%q", got, roles)
	}
}

// calls returns the AssumeRole calls for a role that have ended.
func (w *world) calls(role string) (calls []ststest.Call) {
	for _, call := range w.sts.Calls() {
		if call.Action == "AssumeRole" && call.RoleARN == roleARN(role) && call.Status != 0 {
			calls = append(calls, call)
		}
	}
	return calls
}

func roleARN(name string) string { return "arn:aws:iam::123456789012:role/" + name }

// configMap returns the ConfigMap of that name; without data if there is none.
func (w *world) configMap(namespace, name string) *corev1.ConfigMap {
	m := &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name}}
	w.api.Load(m)
	return m
}

// roots returns the roots that are published in a namespace.
func (w *world) roots(namespace, name string) string {
	return w.configMap(namespace, name).Data[trust.RootsKey]
}

// leader returns the holder of the Lease; empty if there is none.
func (w *world) leader(namespace string) string {
	lease := &coordinationv1.Lease{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: trust.Lease}}
	if !w.api.Load(lease) || lease.Spec.HolderIdentity == nil {
		return ""
	}
	return *lease.Spec.HolderIdentity
}

// stage runs a broker whose roots are published, replaces its certificate by one under a new root, and calls check.
func (w *world) stage(propagation string, check func(b *running, next *certstest.Leaf)) {
	dir := w.TempDir()
	certFile, keyFile := w.ca.Leaf(brokerName).WriteTo(dir)
	rootsFile := filepath.Join(dir, "ca.crt")
	b := w.start("--tls-cert="+certFile, "--tls-key="+keyFile, "--roots-file="+rootsFile, "--trust-propagation="+propagation)
	b.Await(w.T, "the first root is published", func() bool { return w.roots("shop", "credence-trust") == string(w.ca.PEM) })
	before := b.serial()
	next := certstest.NewCA(w).Leaf(brokerName)
	next.WriteTo(dir)
	if serialOf(next) == before {
		w.Fatal("the two certificates have the same serial number")
	}
	check(b, next)
}

// unwritable returns a file to which every write fails.
func (w *world) unwritable() *os.File {
	f, err := os.OpenFile("/dev/full", os.O_WRONLY, 0) // Linux: a full disk
	if err != nil {
		f, err = os.Open(os.DevNull)
	}
	processtest.Must(w, err)
	w.Cleanup(func() { _ = f.Close() })
	return f
}

// process starts the program with more flags; the last of one name counts.
func (w *world) process(args ...string) *processtest.Process {
	w.Helper()
	id, secret := w.sts.Keys()
	return processtest.Start(w.T, processtest.Command{
		Args: slices.Concat(w.args, []string{"--sts-endpoint=" + w.sts.URL()}, args), Stdout: w.stdout,
		Env: append([]string{"AWS_ACCESS_KEY_ID=" + id, "AWS_SECRET_ACCESS_KEY=" + secret.Reveal(), "AWS_EC2_METADATA_DISABLED=true"}, w.env...),
	})
}

// launch is start for a broker that may not be ready.
func (w *world) launch(args ...string) *running {
	w.Helper()
	b := &running{Process: w.process(args...), w: w}
	serving := b.Logged(w.T, "Serving")
	b.address, b.admin = fmt.Sprint(serving["address"]), fmt.Sprint(serving["admin"])
	return b
}

// start starts a broker with more flags, and waits until it is ready.
func (w *world) start(args ...string) *running {
	w.Helper()
	b := w.launch(args...)
	b.Await(w.T, "the broker is ready", b.ready)
	return b
}

// running is a running broker.
type running struct {
	*processtest.Process
	w              *world
	address, admin string
}

func (b *running) ready() bool {
	code, _ := b.get(b.admin, "/readyz")
	return code == http.StatusOK
}

// get makes a request over plain HTTP. Its status is 0 if there is no response.
func (b *running) get(address, path string) (status int, body string) {
	// Not on the test's context, which does not end before the test's goroutines do.
	request, err := http.NewRequestWithContext(context.Background(), http.MethodGet, "http://"+address+path, nil)
	if err != nil {
		return 0, err.Error()
	}
	response, err := (&http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: processtest.Patience}).Do(request)
	if err != nil {
		return 0, err.Error()
	}
	defer response.Body.Close()
	text, err := io.ReadAll(io.LimitReader(response.Body, 4<<20))
	if err != nil {
		return 0, err.Error()
	}
	return response.StatusCode, string(text)
}

// metric returns the value of a metric, named without the prefix of the broker's metrics; -1 if there is none.
func (b *running) metric(name string) float64 {
	_, text := b.get(b.admin, "/metrics")
	found := regexp.MustCompile(`(?m)^credence_broker_` + regexp.QuoteMeta(name) + ` (\S+)$`).FindStringSubmatch(text)
	if found == nil {
		return -1
	}
	value, err := strconv.ParseFloat(found[1], 64)
	if err != nil {
		return -1
	}
	return value
}

// credentials calls the broker as the sidecar of the pod does.
func (b *running) credentials(pod *corev1.Pod, token ...apitest.Token) (credential.Lease, error) {
	file := filepath.Join(b.w.TempDir(), "token")
	if err := os.WriteFile(file, []byte(b.w.api.Token(b.w, pod, append(token, apitest.Token{})[0])), 0o600); err != nil {
		return credential.Lease{}, err
	}
	roots, err := certs.NewRoots(b.w.rootsFile, nil)
	if err != nil {
		return credential.Lease{}, err
	}
	c, err := client.New(client.Config{Target: b.address, TLS: certs.ClientConfig(roots, brokerName), TokenFile: file})
	if err != nil {
		return credential.Lease{}, err
	}
	return c.Credentials(context.WithoutCancel(b.w.Context())) // the client limits the call
}

func (b *running) mustServe(pod *corev1.Pod, token ...apitest.Token) credential.Lease {
	b.w.Helper()
	lease, err := b.credentials(pod, token...)
	if err != nil {
		b.w.Fatalf("pod %s gets no credentials: %v", pod.Name, err)
	}
	return lease
}

func (b *running) mustRefuse(pod *corev1.Pod, reason credential.Reason) {
	b.w.Helper()
	if _, err := b.credentials(pod); credential.ReasonOf(err) != reason {
		b.w.Errorf("pod %s: %v, want a refusal with %s", pod.Name, err, reason)
	}
}

// serial returns the serial number of the certificate that the broker serves; empty if there is none.
func (b *running) serial() string {
	dialer := tls.Dialer{Config: &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h2"}}} // it only reads the certificate
	conn, err := dialer.DialContext(b.w.Context(), "tcp", b.address)
	if err != nil {
		return ""
	}
	defer conn.Close()
	return conn.(*tls.Conn).ConnectionState().PeerCertificates[0].SerialNumber.String()
}

func serialOf(l *certstest.Leaf) string { return l.TLS().Leaf.SerialNumber.String() }

// end shuts the broker down, which must succeed.
func (b *running) end() {
	b.w.Helper()
	b.Terminate()
	if err := b.Wait(); err != nil {
		b.w.Fatalf("the broker ended with %v", err)
	}
}
