package webhook_test

import (
	"context"
	"errors"
	"testing"

	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/broker/policy"
	"github.com/credence-iam/credence/webhook"
)

// lagging has a watch cache from before the namespace was annotated.
type lagging struct {
	latest namespaces
	reads  int
}

func (l *lagging) Namespace(_ context.Context, name string) (policy.Namespace, error) {
	return policy.Namespace{Name: name, Labels: map[string]string{"iam.amazonaws.com/inject": "enabled"}}, nil
}

func (l *lagging) Latest(ctx context.Context, name string) (policy.Namespace, error) {
	l.reads++
	return l.latest(ctx, name)
}

// TestRecentlyAnnotatedNamespace: the webhook refuses a pod only after a live read of its namespace.
func TestRecentlyAnnotatedNamespace(t *testing.T) {
	unavailable := namespaces(func(context.Context, string) (policy.Namespace, error) {
		return policy.Namespace{}, errors.New("connection refused")
	})
	for name, tt := range map[string]struct {
		latest  namespaces
		role    string
		allowed bool
		reason  credential.Reason
	}{
		"now annotated":    {teamA, permitted, true, ""},
		"not for the role": {teamA, "arn:aws:iam::123456789012:role/admin", false, credential.ReasonRoleNotPermitted},
		"unavailable":      {unavailable, permitted, false, credential.ReasonNothingPermitted},
		"unchanged":        {(&lagging{}).Namespace, permitted, false, credential.ReasonNothingPermitted},
	} {
		t.Run(name, func(t *testing.T) {
			l := &lagging{latest: tt.latest}
			var seen []webhook.Observation
			client, url := startTCP(t, func(c *webhook.Config) {
				c.Namespaces = l
				c.Observe = func(o webhook.Observation) { seen = append(seen, o) }
			})
			_, text := post(t, client, url+"/mutate", "application/json", review(pod(tt.role, "")))
			if got := decodeReview(t, text, "0b2e5d3c"); got.Allowed != tt.allowed {
				t.Errorf("response is %s", text)
			}
			if l.reads != 1 {
				t.Errorf("%d live reads, want 1", l.reads)
			}
			if len(seen) != 1 || seen[0].Reason != tt.reason || seen[0].Duration <= 0 || (seen[0].PatchBytes > 0) != tt.allowed ||
				seen[0].Decision != map[bool]string{true: "injected", false: "refused"}[tt.allowed] {
				t.Errorf("observations are %+v", seen)
			}
		})
	}
	t.Run("no live read for a permitted role", func(t *testing.T) {
		client, url := startTCP(t, func(c *webhook.Config) { c.Namespaces = onlyWatched{namespaces(teamA), t} })
		_, text := post(t, client, url+"/mutate", "application/json", review(pod(permitted, "")))
		if !decodeReview(t, text, "0b2e5d3c").Allowed {
			t.Errorf("response is %s", text)
		}
	})
}

// onlyWatched fails the test on a live read.
type onlyWatched struct {
	namespaces
	t *testing.T
}

func (o onlyWatched) Latest(ctx context.Context, name string) (policy.Namespace, error) {
	o.t.Error("live read of the namespace")
	return o.namespaces(ctx, name)
}
