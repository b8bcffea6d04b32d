//go:build unix

package integration

import (
	"fmt"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/credence-iam/credence/broker/assume/ststest"
	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/integration/await"
	"github.com/credence-iam/credence/integration/stack"
)

func TestSDKsSeeTheAssumedRole(t *testing.T) {
	t.Parallel()
	env, _ := app(t, create(t, namespace(t, arn("shelf")), "app", role("shelf")))
	const botocore = `import botocore.session; print(botocore.session.get_session().create_client("sts").get_caller_identity()["Arn"])`
	for name, program := range map[string][]string{
		"AWS SDK for Go v2": {awsclient, "whoami"},
		"AWS CLI":           {"aws", "sts", "get-caller-identity", "--query", "Arn", "--output", "text"},
		"botocore":          {"python3", "-c", botocore},
	} {
		t.Run(name, func(t *testing.T) {
			path, err := exec.LookPath(program[0])
			if err != nil {
				t.Skipf("%s is not installed", program[0])
			}
			if name == "botocore" {
				if _, err := command(t, env, "", path, "-c", "import botocore"); err != nil {
					t.Skip("botocore is not installed for python3")
				}
			}
			if got, err := command(t, env, "", path, program[1:]...); got != assumed("shelf") {
				t.Errorf("it is %q (%v), want %q", got, err, assumed("shelf"))
			}
		})
	}
}

func TestCredentialsOpenTheBucketOfTheirRole(t *testing.T) {
	t.Parallel()
	ns := namespace(t, ".*")
	env, _ := app(t, create(t, ns, "app", role("shelf")))
	const content = "the content of an object"
	if _, err := command(t, env, content, awsclient, "put", bucket, "object"); err != nil {
		t.Fatal(err)
	}
	if got, err := command(t, env, "", awsclient, "get", bucket, "object"); got != content {
		t.Errorf("got %q (%v)", got, err)
	}
	if got, err := command(t, env, "", awsclient, "ls", bucket); !slices.Contains(strings.Fields(got), "object") {
		t.Errorf("listed %q (%v), want object", got, err)
	}
	t.Run("AWS CLI", func(t *testing.T) {
		aws, err := exec.LookPath("aws")
		if err != nil {
			t.Skip("the AWS CLI is not installed on this machine (on Debian: apt-get install awscli)")
		}
		const url = "s3://" + bucket + "/from-the-cli"
		if _, err := command(t, env, content, aws, "s3", "cp", "-", url); err != nil {
			t.Fatal(err)
		}
		if got, err := command(t, env, "", aws, "s3", "cp", url, "-"); got != content {
			t.Errorf("got %q (%v)", got, err)
		}
	})
	// The credentials of another role are valid, but do not open the bucket.
	other, _ := app(t, create(t, ns, "other", role("other")))
	if got, err := command(t, other, "", awsclient, "whoami"); got != assumed("other") {
		t.Errorf("it is %q (%v), want %q", got, err, assumed("other"))
	}
	if _, err := command(t, other, "", awsclient, "ls", bucket); err == nil || !strings.Contains(err.Error(), "AccessDenied") {
		t.Errorf("a role without rights on the bucket got %v", err)
	}
}

func TestFortyPodsOfOneRoleAreOneSTSCall(t *testing.T) {
	t.Parallel()
	ns := namespace(t, ".*")
	const pods = 40
	credence.STS.SetRole(arn("forty"), ststest.Behavior{Latency: 300 * time.Millisecond})
	tokens, keys := make([]string, pods), make([]string, pods)
	var all sync.WaitGroup
	for i := range pods {
		all.Go(func() { tokens[i] = token(t, create(t, ns, fmt.Sprintf("app-%d", i), role("forty"))) })
	}
	all.Wait()
	for i, text := range tokens {
		all.Go(func() {
			lease, err := call(t, text)
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
	if calls := credence.STS.Count("AssumeRole", arn("forty")); calls != 1 {
		t.Errorf("STS got %d calls, want one", calls)
	}
}

func TestCredentialsRenewWithoutAnSDKError(t *testing.T) {
	t.Parallel()
	env, _ := app(t, create(t, namespace(t, ".*"), "app", map[string]string{roleKey: "brief", durationKey: "15m"}))
	// The SDK requests credentials all the time, until after the first session's expiration.
	out, err := command(t, env, "", awsclient, "watch", (shortLife + 10*time.Second).String())
	if err != nil {
		t.Fatal(err)
	}
	if keys := strings.Fields(out); len(keys) < 2 {
		t.Errorf("an SDK saw sessions %q in %s, want more than one", keys, shortLife+10*time.Second)
	}
}

// TestBrokerRefuses shows that refusals reach the client with their reason, and that changes in the cluster lead to
// them. integration/kube has the table of all tokens.
func TestBrokerRefuses(t *testing.T) {
	t.Parallel()
	ns := namespace(t, ".*")
	pod := create(t, ns, "app", role("cart"))
	text := token(t, pod)
	if lease, err := call(t, text); err != nil || lease.Role.String() != arn("cart") {
		t.Fatalf("the pod's own token got %s, %v", lease.Role, err)
	}
	check := func(what, text string, reason credential.Reason) {
		t.Helper()
		await.Until(t, what+" is refused", func() error { // the broker's watch delivers changes
			lease, err := call(t, text)
			return refused(lease, err, reason)
		})
	}
	other, err := credence.Token(t.Context(), pod, "another-audience", stack.TokenSeconds)
	if err != nil {
		t.Fatal(err)
	}
	check("a token for another audience", other, credential.ReasonTokenAudience)
	credence.STS.SetRole(arn("untrusting"), ststest.Behavior{Deny: true})
	check("a role that STS denies", token(t, create(t, ns, "untrusting", role("untrusting"))), credential.ReasonSTSDenied)

	pods := credence.Client.CoreV1().Pods(ns)
	if err := pods.Delete(t.Context(), pod.Name, metav1.DeleteOptions{GracePeriodSeconds: new(int64)}); err != nil {
		t.Fatal(err)
	}
	check("a deleted pod", text, credential.ReasonPodNotFound)
	again := token(t, create(t, ns, pod.Name, role("cart")))
	check("a pod that was deleted and recreated", text, credential.ReasonPodNotFound)
	if _, err := call(t, again); err != nil {
		t.Errorf("the recreated pod got %v", err)
	}

	object, err := credence.Client.CoreV1().Namespaces().Get(t.Context(), ns, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	delete(object.Labels, injectLabel)
	if _, err := credence.Client.CoreV1().Namespaces().Update(t.Context(), object, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	check("a pod whose namespace is no longer opted in", again, credential.ReasonNamespaceNotOpted)
}
