//go:build unix

package siege_test

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"os"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/credence-iam/credence/integration/siege/attack"
	"github.com/credence-iam/credence/integration/stack"
)

// besiege holds as many connections from each attacker in a step as given.
func besiege(t *testing.T, address, protocol string, connections int, step string) *record {
	t.Helper()
	return siege(t, func(ctx context.Context) string {
		p, err := attack.Start(t.Context(), attack.Plan{Step: step, Address: address, ALPN: protocol, Sources: attackers, Connections: connections})
		if err != nil {
			t.Error(err)
			return ""
		}
		<-ctx.Done()
		p.Stop()
		if p.Opened() < int64(len(attackers)) {
			t.Errorf("%s: the attackers opened only %d connections", step, p.Opened())
		}
		return p.String()
	})
}

// Connections of clients without a token made a broker use more memory than its container has, or blocked pods.
func TestConnectionsToTheBroker(t *testing.T) {
	var longest time.Duration                      // the largest p99
	for step, connections := range map[string]int{ // from each address
		"large headers in 16 streams": 201,
		"silence after SETTINGS":      1024,
		"an open call":                1024,
		"everything at once":          256,
		"connecting again":            8,
		"calls by nobody":             64,
	} {
		t.Run(step, func(t *testing.T) {
			calls := besiege(t, credence.Broker.Address, "h2", connections, step)
			longest = max(longest, calls.quantile(0.99))
		})
	}
	t.Logf("broker_besieged_p99_ms=%.1f", longest.Seconds()*1000) // make bench reads it
}

// Idle connections made a webhook use more memory than its container has.
func TestConnectionsToTheWebhook(t *testing.T) {
	for name, test := range map[string]struct {
		connections    int // from each address
		protocol, step string
	}{
		"idle":             {2000, "http/1.1", "an idle connection"},
		"silent HTTP 2":    {2000, "h2", "silence after SETTINGS"},
		"body without end": {150, "http/1.1", "a body without end"},
		"head without end": {500, "http/1.1", "many headers without end"},
	} {
		t.Run(name, func(t *testing.T) {
			besiege(t, credence.Webhook.Address, test.protocol, test.connections, test.step)
		})
	}
}

// Health and metrics have no TLS, for every client that reaches the pod.
func TestConnectionsForHealthAndMetrics(t *testing.T) {
	for name, address := range map[string]string{"broker": credence.Broker.Admin, "webhook": credence.Webhook.Admin} {
		t.Run(name, func(t *testing.T) { besiege(t, address, "", 1000, "a scrape and then silence") })
	}
}

// One review of many containers killed the webhook: each container got a warning and several operations in the patch.
func TestReviewOfManyContainers(t *testing.T) {
	body := manyContainers(60_000)
	siege(t, func(ctx context.Context) string {
		reviews := attack.RepeatReviews(ctx, credence.Webhook.Address, 2, body, attackers...)
		if !strings.Contains(reviews, "200") {
			t.Error("the webhook responded to no review")
		}
		return "reviews by status: " + reviews
	})
}

// manyContainers is the admission review of a new pod with n containers.
func manyContainers(n int) []byte {
	var b bytes.Buffer
	b.WriteString(`{"apiVersion":"admission.k8s.io/v1","kind":"AdmissionReview","request":{"uid":"u","kind":{"group":"","version":"v1","kind":"Pod"},` +
		`"resource":{"group":"","version":"v1","resource":"pods"},"namespace":"default","operation":"CREATE","object":{"apiVersion":"v1","kind":"Pod",` +
		`"metadata":{"name":"many","annotations":{"` + roleKey + `":"many"}},"spec":{"containers":[`)
	for i := range n {
		if i > 0 {
			b.WriteByte(',')
		}
		fmt.Fprintf(&b, `{"name":"c%d","env":[{"name":"AWS_PROFILE","value":"x"},{"name":"AWS_ACCESS_KEY_ID"}]}`, i)
	}
	b.WriteString(`]}}}}`)
	return b.Bytes()
}

// repeatCalls calls the broker with refused tokens, over n connections from each attacker.
func repeatCalls(t *testing.T, n int, token func() string) *record {
	t.Helper()
	return siege(t, func(ctx context.Context) string {
		refused := attack.RepeatCalls(ctx, credence.Broker.Address, n, token, attackers...)
		if refused < int64(n) {
			t.Errorf("the broker refused only %d calls", refused)
		}
		return fmt.Sprintf("%d refused calls", refused)
	})
}

// Each of these expressions took 127 ms of a processor for a decision on a role of 590 characters.
var expressions = []string{`(((.*)*)*){1000}Z`, `(.*){1000}(.*){1000}Z|.*cart`}

// The expression of one namespace delayed the calls of all others.
func TestExpressionOfOneNamespace(t *testing.T) {
	for i, expression := range expressions {
		t.Run(fmt.Sprint(i), func(t *testing.T) {
			hog := namespace(t, ".*|hog")
			tokens := make([]string, 32)
			for i := range tokens {
				// The webhook would refuse such a pod later, but the annotation of its namespace can change at any time.
				role := fmt.Sprintf("arn:aws:iam::%s:role/%s/%d", stack.Account, strings.Repeat("x", 500), i)
				tokens[i] = token(t, create(t, hog, fmt.Sprintf("hog-%d", i), role))
			}
			ns, err := credence.Client.CoreV1().Namespaces().Get(t.Context(), hog, metav1.GetOptions{})
			if err != nil {
				t.Fatal(err)
			}
			ns.Annotations[permittedKey] = expression
			if _, err := credence.Client.CoreV1().Namespaces().Update(t.Context(), ns, metav1.UpdateOptions{}); err != nil {
				t.Fatal(err)
			}
			var next atomic.Int64
			repeatCalls(t, 8, func() string { return tokens[int(next.Add(1))%len(tokens)] })
		})
	}
}

// Tokens with a pod's claims and a random signature filled the queue of token reviews.
func TestGarbageTokens(t *testing.T) {
	for _, mode := range []string{"jwks", "tokenreview"} {
		t.Run(mode, func(t *testing.T) {
			if mode == "tokenreview" {
				restartBroker(t, "--token-verification="+mode)
				defer restartBroker(t)
			}
			real := token(t, create(t, namespace(t, ".*|claimed"), "claimed", "cart"))
			repeatCalls(t, 64, func() string { return garbage(real) })
		})
	}
}

// garbage returns the token with a random signature.
func garbage(token string) string {
	signature := make([]byte, 256)
	_, _ = rand.Read(signature)
	return token[:strings.LastIndexByte(token, '.')+1] + base64.RawURLEncoding.EncodeToString(signature)
}

// Calls without a token wrote so many audit lines that log rotation removed those of pods.
func TestCallsWithoutToken(t *testing.T) {
	before := auditLines(t)
	calls := repeatCalls(t, 16, func() string { return "" })
	after := auditLines(t)
	if allowed := after["allow"] - before["allow"]; allowed < len(calls.took) {
		t.Errorf("a pod made %d calls, and the broker wrote %d audit lines", len(calls.took), allowed)
	}
	// The broker writes the first denial of an address and reason at once, and then one line for each 10 s.
	windows := int(length/(10*time.Second)) + 3
	if denied := after["deny"] - before["deny"]; denied > 2*len(attackers)*windows {
		t.Errorf("the broker wrote %d audit lines for denied calls of %d addresses", denied, len(attackers))
	}
}

// auditLines counts the broker's audit lines by decision.
func auditLines(t *testing.T) map[string]int {
	t.Helper()
	log, err := os.Open(credence.Broker.Log())
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	counts := make(map[string]int)
	for lines := bufio.NewScanner(log); lines.Scan(); {
		var line struct {
			Decision string `json:"decision"`
		}
		if json.Unmarshal(lines.Bytes(), &line) == nil && line.Decision != "" {
			counts[line.Decision]++
		}
	}
	return counts
}

// restartBroker starts the broker again with further flags.
func restartBroker(t *testing.T, flags ...string) {
	t.Helper()
	credence.Broker.ShutDown()
	// The test's context has ended when this is deferred.
	if err := credence.StartBroker(context.WithoutCancel(t.Context()), flags...); err != nil {
		t.Fatal(err)
	}
}
