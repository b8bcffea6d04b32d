//go:build unix

package siege_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/tls"
	"encoding/base64"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/credence-iam/credence/integration/siege/attack"
)

// stranger is the TLS configuration of a client that does not care whom it calls.
func stranger(protocols ...string) *tls.Config {
	return &tls.Config{InsecureSkipVerify: true, MinVersion: tls.VersionTLS13, NextProtos: protocols}
}

// hold keeps that many connections from each attacker in the step, until ctx ends.
func hold(ctx context.Context, address string, config *tls.Config, connections int, step attack.Step) string {
	var count attack.Count
	var all sync.WaitGroup
	var most atomic.Int64
	all.Go(func() {
		for ctx.Err() == nil {
			most.Store(max(most.Load(), count.Held()))
			time.Sleep(pause)
		}
	})
	for _, source := range attackers {
		all.Go(func() {
			attack.Run(ctx, attack.Target{Address: address, Source: source, TLS: config}, connections, step, &count)
		})
	}
	all.Wait()
	return fmt.Sprintf("%d connections opened, %d held at most, %d MB sent", count.Opened(), most.Load(), count.Sent()/1e6)
}

// Connections of a client without a token made a broker hold more memory than its container has, or kept pods out.
func TestConnectionsToTheBroker(t *testing.T) {
	for name, test := range map[string]struct {
		connections int // from each address
		step        attack.Step
	}{
		"headers that do not end":  {201, attack.LargeHeaders(16, 17<<10)},
		"silence":                  {1024, attack.Silent},
		"calls that do not end":    {1024, attack.OpenCall},
		"all that can be held":     {256, attack.Everything(19<<10, 27<<10)},
		"handshakes without end":   {8, attack.Reconnect},
		"calls with garbage token": {64, attack.Calls("garbage")},
	} {
		t.Run(name, func(t *testing.T) {
			restart(t)
			siege(t, func(ctx context.Context) string {
				return hold(ctx, credence.BrokerAddress(), stranger("h2"), test.connections, test.step)
			})
		})
	}
}

// Connections that nobody uses made a webhook hold more memory than its container has.
func TestConnectionsToTheWebhook(t *testing.T) {
	for name, test := range map[string]struct {
		connections int // from each address
		protocol    string
		step        attack.Step
	}{
		"idle HTTP/1.1":     {2000, "http/1.1", attack.KeepAlive("/healthz")},
		"silent HTTP/2":     {2000, "h2", attack.Silent},
		"bodies in drops":   {150, "http/1.1", attack.OpenBody(4800, 6<<20, 100*time.Millisecond)},
		"heads without end": {500, "http/1.1", attack.ManyHeads(4800)},
	} {
		t.Run(name, func(t *testing.T) {
			restart(t)
			siege(t, func(ctx context.Context) string {
				return hold(ctx, credence.WebhookAddress(), stranger(test.protocol), test.connections, test.step)
			})
		})
	}
}

// Health and metrics are served without TLS, to whoever reaches the pod.
func TestConnectionsForHealthAndMetrics(t *testing.T) {
	restart(t)
	for name, address := range map[string]string{"broker": credence.BrokerAdminAddress(), "webhook": credence.WebhookAdminAddress()} {
		t.Run(name, func(t *testing.T) {
			siege(t, func(ctx context.Context) string { return hold(ctx, address, nil, 1000, attack.KeepAlive("/metrics")) })
		})
	}
}

// One review of many containers, each of which got a warning and several operations of the patch, killed the webhook.
func TestReviewOfManyContainers(t *testing.T) {
	restart(t)
	body := manyContainers(60_000)
	siege(t, func(ctx context.Context) string {
		answers, largest := attack.RepeatReviews(ctx, credence.WebhookAddress(), stranger(), 2, body, attackers...)
		return fmt.Sprintf("reviews of %d bytes by status %v, the largest answer has %d bytes", len(body), answers, largest)
	})
}

// manyContainers is a review of the creation of a pod in the namespace of the traffic's kind.
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

// expressions took 127 ms of a processor for each decision about a role of 590 characters.
var expressions = []string{`(((.*)*)*){1000}Z`, `(.*){1000}(.*){1000}Z|.*cart`}

// The expression of one namespace made the calls of all others wait.
func TestExpressionOfOneNamespace(t *testing.T) {
	for i, expression := range expressions {
		t.Run(fmt.Sprint(i), func(t *testing.T) {
			restart(t)
			hog := namespace(t, ".*|hog")
			tokens := make([]string, 32)
			for i := range tokens {
				// Admission would refuse such a pod later; the annotation of its namespace can change at any time.
				role := fmt.Sprintf("hog/%s%d", strings.Repeat("x", 500), i)
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
			siege(t, func(ctx context.Context) string {
				codes := attack.RepeatCalls(ctx, credence.BrokerAddress(), brokerTLS(t), 8, func() string {
					return tokens[int(next.Add(1))%len(tokens)]
				}, attackers...)
				return fmt.Sprintf("calls by code %v", codes)
			})
		})
	}
}

// Tokens with another pod's claims and a signature of garbage filled the queue of token reviews.
func TestGarbageTokens(t *testing.T) {
	for _, mode := range []string{"jwks", "tokenreview"} {
		t.Run(mode, func(t *testing.T) {
			restart(t, "--token-verification="+mode)
			real := token(t, create(t, namespace(t, ".*|claimed"), "claimed", "cart"))
			siege(t, func(ctx context.Context) string {
				codes := attack.RepeatCalls(ctx, credence.BrokerAddress(), brokerTLS(t), 64, func() string { return garbage(real) }, attackers...)
				return fmt.Sprintf("calls by code %v", codes)
			})
		})
	}
}

// garbage is the token with another signature, a different one each time.
func garbage(token string) string {
	signature := make([]byte, 256)
	_, _ = rand.Read(signature)
	return token[:strings.LastIndexByte(token, '.')+1] + base64.RawURLEncoding.EncodeToString(signature)
}

// Calls without a token wrote so many audit lines that those of pods were rotated out.
func TestCallsWithoutToken(t *testing.T) {
	restart(t)
	siege(t, func(ctx context.Context) string {
		codes := attack.RepeatCalls(ctx, credence.BrokerAddress(), brokerTLS(t), 16, func() string { return "" }, attackers...)
		return fmt.Sprintf("calls by code %v", codes)
	})
}
