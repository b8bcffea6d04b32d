//go:build unix

package integration

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/credence-iam/credence/broker/assume/ststest"
	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/integration/stack"
)

// assumed is the ARN that STS knows a session of role by, with the default session name.
func assumed(role string) string {
	return "arn:aws:sts::" + stack.Account + ":assumed-role/" + role + "/credence"
}

func TestSDKsSeeTheAssumedRole(t *testing.T) {
	t.Parallel()
	ns := namespace(t, arn("shelf"))
	env := app(t, run(t, create(t, ns, "app", map[string]string{roleKey: "shelf"})))

	t.Run("AWS SDK for Go v2", func(t *testing.T) {
		if got, err := command(t, env, "", awsclient, "whoami"); got != assumed("shelf") {
			t.Errorf("is %q (%v), want %q", got, err, assumed("shelf"))
		}
	})
	t.Run("AWS CLI", func(t *testing.T) {
		aws := need(t, "aws")
		if got, err := command(t, env, "", aws, "sts", "get-caller-identity", "--query", "Arn", "--output", "text"); got != assumed("shelf") {
			t.Errorf("is %q (%v), want %q", got, err, assumed("shelf"))
		}
	})
	t.Run("botocore", func(t *testing.T) {
		python := need(t, "python3")
		if _, err := command(t, env, "", python, "-c", "import botocore"); err != nil {
			t.Skip("botocore is not installed for python3")
		}
		script := `import botocore.session; print(botocore.session.get_session().create_client("sts").get_caller_identity()["Arn"])`
		if got, err := command(t, env, "", python, "-c", script); got != assumed("shelf") {
			t.Errorf("is %q (%v), want %q", got, err, assumed("shelf"))
		}
	})
}

func TestCredentialsOpenARealObjectStore(t *testing.T) {
	t.Parallel()
	ns := namespace(t, ".*")
	env := app(t, run(t, create(t, ns, "app", map[string]string{roleKey: "shelf"})))
	const content = "what went up must come back"
	if _, err := command(t, env, content, awsclient, "put", bucket, "object"); err != nil {
		t.Fatal(err)
	}
	if got, err := command(t, env, "", awsclient, "get", bucket, "object"); got != content {
		t.Errorf("came back as %q (%v)", got, err)
	}
	if got, err := command(t, env, "", awsclient, "ls", bucket); got != "object" {
		t.Errorf("listed %q (%v)", got, err)
	}
	// Another role's credentials are real too, and do not open it.
	other := app(t, run(t, create(t, ns, "other", map[string]string{roleKey: "other"})))
	if got, err := command(t, other, "", awsclient, "whoami"); got != assumed("other") {
		t.Errorf("is %q (%v), want %q", got, err, assumed("other"))
	}
	if _, err := command(t, other, "", awsclient, "ls", bucket); err == nil || !strings.Contains(err.Error(), "AccessDenied") {
		t.Errorf("a role without rights on the bucket was answered %v", err)
	}
}

// need returns the path of a program, and skips the test where there is none.
func need(t *testing.T, program string) string {
	t.Helper()
	path, err := exec.LookPath(program)
	if err != nil {
		t.Skipf("%s is not installed", program)
	}
	return path
}

func TestFortyPodsOfOneRoleAreOneSTSCall(t *testing.T) {
	t.Parallel()
	ns := namespace(t, ".*")
	const pods = 40
	role := arn("forty")
	credence.STS.SetRole(role, ststest.Behavior{Latency: 300 * time.Millisecond})
	tokens := make([]string, pods)
	var all sync.WaitGroup
	for i := range pods {
		all.Go(func() {
			tokens[i] = token(t, create(t, ns, fmt.Sprintf("app-%d", i), map[string]string{roleKey: "forty"}))
		})
	}
	all.Wait()
	keys := make([]string, pods)
	for i, text := range tokens {
		all.Go(func() {
			lease, err := ask(t, text)
			if err != nil {
				t.Errorf("pod %d: %v", i, err)
			}
			keys[i] = lease.AccessKeyID
		})
	}
	all.Wait()
	if distinct := slices.Compact(slices.Sorted(slices.Values(keys))); len(distinct) != 1 {
		t.Errorf("%d pods got %d sessions", pods, len(distinct))
	}
	if calls := credence.STS.Count("AssumeRole", role); calls != 1 {
		t.Errorf("STS was called %d times, want once", calls)
	}
}

func TestSTSCallOutlivesTheFirstCaller(t *testing.T) {
	t.Parallel()
	ns := namespace(t, ".*")
	role := arn("slow")
	// Long enough that the first caller is there before the answer, on the most loaded machine.
	credence.STS.SetRole(role, ststest.Behavior{Latency: 5 * time.Second})
	c := dial(t, token(t, create(t, ns, "app", map[string]string{roleKey: "slow"})))
	// The deadline of an SDK: the first call gives up, and the session it began to wait for must not
	// be lost with it.
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	if _, err := c.Credentials(ctx); !errors.Is(err, credential.ErrUnavailable) {
		t.Fatalf("a caller who left was answered %v", err)
	}
	lease, err := c.Credentials(t.Context())
	if err != nil || lease.Role.String() != role {
		t.Errorf("the next caller got %s, %v", lease.Role, err)
	}
	if calls := credence.STS.Count("AssumeRole", role); calls != 1 {
		t.Errorf("STS was called %d times, want once", calls)
	}
}

func TestCredentialsRenewWithoutAnSDKError(t *testing.T) {
	t.Parallel()
	ns := namespace(t, ".*")
	env := app(t, run(t, create(t, ns, "app", map[string]string{roleKey: "brief", durationKey: "15m"})))
	// Beyond the life of the first session, asking all the time.
	out, err := command(t, env, "", awsclient, "watch", (shortLife + 10*time.Second).String())
	if err != nil {
		t.Fatal(err)
	}
	if keys := strings.Fields(out); len(keys) < 2 {
		t.Errorf("an SDK saw sessions %q in %s, want more than one", keys, shortLife+10*time.Second)
	}
}

func TestPodIsToldWhySTSRefuses(t *testing.T) {
	t.Parallel()
	ns := namespace(t, ".*")
	credence.STS.SetRole(arn("untrusting"), ststest.Behavior{Deny: true})
	lease, err := ask(t, token(t, create(t, ns, "app", map[string]string{roleKey: "untrusting"})))
	refused(t, lease, err, credential.ReasonSTSDenied)
	if err != nil && !strings.Contains(err.Error(), "trust policy") {
		t.Errorf("the message does not say what to look at: %v", err)
	}
}
