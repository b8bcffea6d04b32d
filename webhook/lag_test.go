package webhook_test

import (
	"context"
	"errors"
	"testing"

	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/broker/policy"
	"github.com/credence-iam/credence/webhook"
)

// lagging is a watch that has not heard yet that the namespace was annotated.
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

// A pod is refused by what its namespace permits at this moment, not by what was heard of it.
func TestNamespaceAnnotatedAMomentAgo(t *testing.T) {
	away := namespaces(func(context.Context, string) (policy.Namespace, error) { return policy.Namespace{}, errors.New("away") })
	for name, tt := range map[string]struct {
		latest  namespaces
		role    string
		allowed bool
		reason  credential.Reason
	}{
		"annotated since":     {teamA, permitted, true, ""},
		"not for that role":   {teamA, "arn:aws:iam::123456789012:role/admin", false, credential.ReasonRoleNotPermitted},
		"cannot be read":      {away, permitted, false, credential.ReasonNothingPermitted},
		"is as it was before": {(&lagging{}).Namespace, permitted, false, credential.ReasonNothingPermitted},
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
				t.Errorf("answered %s", text)
			}
			if l.reads != 1 {
				t.Errorf("the API server was read %d times, want once", l.reads)
			}
			if len(seen) != 1 || seen[0].Reason != tt.reason || seen[0].Duration <= 0 || (seen[0].PatchBytes > 0) != tt.allowed ||
				seen[0].Decision != map[bool]string{true: "injected", false: "refused"}[tt.allowed] {
				t.Errorf("observed %+v", seen)
			}
		})
	}
	t.Run("nothing is read for what is permitted", func(t *testing.T) {
		client, url := startTCP(t, func(c *webhook.Config) { c.Namespaces = onlyWatched{namespaces(teamA), t} })
		_, text := post(t, client, url+"/mutate", "application/json", review(pod(permitted, "")))
		if !decodeReview(t, text, "0b2e5d3c").Allowed {
			t.Errorf("answered %s", text)
		}
	})
}

// onlyWatched must not be read live.
type onlyWatched struct {
	namespaces
	t *testing.T
}

func (o onlyWatched) Latest(ctx context.Context, name string) (policy.Namespace, error) {
	o.t.Error("the API server was read")
	return o.namespaces(ctx, name)
}
