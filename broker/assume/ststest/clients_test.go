package ststest_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/aws/aws-sdk-go-v2/service/sts/types"
	"github.com/google/go-cmp/cmp"

	"github.com/credence-iam/credence/broker/assume/ststest"
)

// answers are the errors of STS and the common errors, each for a role of its own.
var answers = []ststest.Fault{
	{Status: 400, Code: "Throttling", Message: "Rate exceeded"},
	{Status: 400, Code: "ThrottlingException", Message: "Rate exceeded"},
	{Status: 503, Code: "RequestLimitExceeded", Message: "Request limit exceeded."},
	{Status: 503, Code: "ServiceUnavailable", Message: "The request has failed due to a temporary failure of the server"},
	{Status: 500, Code: "InternalFailure", Message: "The request processing has failed"},
	{Status: 400, Code: "IDPCommunicationError", Message: "Couldn't reach the provider"},
	{Status: 400, Code: "InvalidIdentityToken", Message: "No OpenIDConnect provider found in your account"},
	{Status: 403, Code: "IDPRejectedClaim", Message: "The claim was rejected"},
	{Status: 400, Code: "ExpiredTokenException", Message: "Token expired: current date/time must be before the expiration"},
	{Status: 403, Code: "ExpiredToken", Message: "The security token included in the request is expired"},
	{Status: 403, Code: "InvalidClientTokenId", Message: "The security token included in the request is invalid."},
	{Status: 403, Code: "SignatureDoesNotMatch", Message: "Signature expired: 1 is now earlier than 2 (3 - 5 min.)"},
	{Status: 400, Code: "RequestExpired", Message: "Request has expired."},
	{Status: 403, Code: "AccessDenied", Message: "User: u is not authorized to perform: sts:AssumeRole on resource: <r> & \"s\""},
	{Status: 400, Code: "ValidationError", Message: "1 validation error detected: Value 'ä' at 'x' failed"},
	{Status: 400, Code: "MalformedPolicyDocument", Message: "Syntax errors in policy."},
	{Status: 400, Code: "PackedPolicyTooLarge", Message: "Packed policy consumes 110% of allotted space"},
	{Status: 403, Code: "RegionDisabledException", Message: "STS is not activated in this region for account:1"},
}

// serveAnswers returns a server whose role number i has the error answers[i].
func serveAnswers(t *testing.T) (s *ststest.Server, roles []string) {
	t.Helper()
	s = start(t, ststest.Config{})
	for i := range answers {
		roles = append(roles, fmt.Sprintf("%s%d", roleARN, i))
		s.SetRole(roles[i], ststest.Behavior{Fault: &answers[i]})
	}
	return s, roles
}

// cleanEnv returns the environment without the variables that would configure an AWS client.
func cleanEnv(more ...string) []string {
	return append(slices.DeleteFunc(os.Environ(), func(v string) bool { return strings.HasPrefix(v, "AWS_") }), append(more,
		"AWS_EC2_METADATA_DISABLED=true", "AWS_REGION=eu-west-1", "AWS_DEFAULT_REGION=eu-west-1", "AWS_MAX_ATTEMPTS=1",
		"AWS_CONFIG_FILE=/dev/null", "AWS_SHARED_CREDENTIALS_FILE=/dev/null", "PYTHONIOENCODING=utf-8")...)
}

func TestGoSDKReadsErrors(t *testing.T) {
	s, roles := serveAnswers(t)
	for i, role := range roles {
		_, err := baseClient(s).AssumeRole(t.Context(), input(role))
		wantError(t, err, answers[i].Status, answers[i].Code, answers[i].Message)
	}
	// The SDK still has types for some errors of the service.
	for role, target := range map[int]any{8: new(*types.ExpiredTokenException), 15: new(*types.MalformedPolicyDocumentException), 16: new(*types.PackedPolicyTooLargeException), 17: new(*types.RegionDisabledException)} {
		_, err := baseClient(s).AssumeRole(t.Context(), input(roles[role]))
		if !errors.As(err, target) {
			t.Errorf("%s is no %T", answers[role].Code, target)
		}
	}
}

// TestBotocoreReads runs botocore in one process for all cases, because a start takes half a second.
const botocoreScript = `
import json, sys, datetime
import botocore, botocore.session
from botocore.config import Config
from botocore.exceptions import ClientError, BotoCoreError
ask = json.load(sys.stdin)
session = botocore.session.get_session()
config = Config(retries={"total_max_attempts": 1}, read_timeout=20)
sts = session.create_client("sts", endpoint_url=ask["url"], config=config)
out = []
def call(what, **args):
    try:
        answer = getattr(sts, what)(**args)
        meta = answer.pop("ResponseMetadata")
        out.append({"status": meta["HTTPStatusCode"], "request": bool(meta.get("RequestId")), "answer": json.loads(json.dumps(answer, default=lambda v: v.isoformat()))})
    except ClientError as e:
        meta = e.response["ResponseMetadata"]
        error = e.response["Error"]
        out.append({"status": meta["HTTPStatusCode"], "request": bool(meta.get("RequestId")), "type": error.get("Type"), "code": error.get("Code"), "message": error.get("Message")})
    except BotoCoreError as e:
        out.append({"status": 0, "code": type(e).__name__})
    except Exception as e:
        out.append({"status": -1, "code": type(e).__name__})
for role in ask["roles"]:
    call("assume_role", RoleArn=role, RoleSessionName="pod-1")
call("assume_role", RoleArn=ask["role"], RoleSessionName="pod-1", SourceIdentity="alice", Tags=[{"Key": "a", "Value": "b"}], TransitiveTagKeys=["a"], DurationSeconds=900)
call("get_caller_identity")
call("assume_role_with_web_identity", RoleArn=ask["role"], RoleSessionName="pod-1", WebIdentityToken="some-token")
json.dump(out, sys.stdout)
`

func TestBotocoreReads(t *testing.T) {
	version, err := exec.CommandContext(t.Context(), "python3", "-c", "import botocore; print(botocore.__version__)").CombinedOutput()
	if err != nil {
		t.Skipf("python3 has no botocore here: %v %s", err, version)
	}
	s, roles := serveAnswers(t)
	garbage := []*ststest.Fault{ststest.HTMLPage(), ststest.TruncatedXML(), ststest.StatusPage(502), ststest.WithElement("Expiration", "tomorrow"), ststest.Drop()}
	for i, fault := range garbage {
		roles = append(roles, fmt.Sprintf("%s-garbage-%d", roleARN, i))
		s.SetRole(roles[len(roles)-1], ststest.Behavior{Fault: fault})
	}
	id, secret := s.Keys()
	ask, err := json.Marshal(map[string]any{"url": s.URL(), "roles": roles, "role": roleARN})
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), "python3", "-c", botocoreScript)
	cmd.Env = cleanEnv("AWS_ACCESS_KEY_ID="+id, "AWS_SECRET_ACCESS_KEY="+secret.Reveal())
	cmd.Stdin = strings.NewReader(string(ask))
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("botocore %s: %v\n%s", version, err, &stderr)
	}
	type result struct {
		Status              int
		Request             bool
		Type, Code, Message string
		Answer              map[string]any
	}
	var got []result
	if err := json.Unmarshal(out, &got); err != nil || len(got) != len(roles)+3 {
		t.Fatalf("botocore wrote %d results (%v): %s", len(got), err, out)
	}
	for i, a := range answers {
		want := result{Status: a.Status, Request: true, Type: "Sender", Code: a.Code, Message: a.Message}
		if a.Status >= 500 {
			want.Type = "Receiver"
		}
		if diff := cmp.Diff(want, got[i]); diff != "" {
			t.Errorf("botocore reads %s as (-want +got):\n%s", a.Code, diff)
		}
	}
	for i := range garbage {
		if r := got[len(answers)+i]; r.Answer != nil && r.Answer["Credentials"] != nil {
			t.Errorf("botocore accepts garbage %d as a session: %+v", i, r)
		}
	}
	session, who, web := got[len(roles)], got[len(roles)+1], got[len(roles)+2]
	for what, r := range map[string]result{"assume_role": session, "get_caller_identity": who, "assume_role_with_web_identity": web} {
		if r.Status != 200 || !r.Request {
			t.Errorf("%s: %+v", what, r)
		}
	}
	keys := func(m any) (names []string) {
		object, _ := m.(map[string]any)
		for name, value := range object {
			if value != "" {
				names = append(names, name)
			}
		}
		slices.Sort(names)
		return names
	}
	for _, c := range []struct {
		got  any
		want string
	}{
		{session.Answer, "AssumedRoleUser Credentials PackedPolicySize SourceIdentity"},
		{session.Answer["Credentials"], "AccessKeyId Expiration SecretAccessKey SessionToken"},
		{session.Answer["AssumedRoleUser"], "Arn AssumedRoleId"},
		{who.Answer, "Account Arn UserId"},
		{web.Answer, "AssumedRoleUser Audience Credentials PackedPolicySize Provider SubjectFromWebIdentityToken"},
	} {
		if got := strings.Join(keys(c.got), " "); got != c.want && got != strings.Replace(c.want, " PackedPolicySize", "", 1) {
			t.Errorf("botocore reads the members %s, want %s", got, c.want)
		}
	}
}

// TestCommandLineReadsErrors runs the AWS CLI for one error of each kind: a start takes a second, and it uses botocore, which has all cases.
func TestCommandLineReadsErrors(t *testing.T) {
	t.Parallel() // Most of its time is the start of Python.
	if out, err := exec.CommandContext(t.Context(), "aws", "--version").CombinedOutput(); err != nil {
		t.Skipf("the AWS CLI does not run here: %v %s", err, out)
	}
	s, roles := serveAnswers(t)
	id, secret := s.Keys()
	for i, a := range answers {
		if !slices.Contains([]string{"Throttling", "ServiceUnavailable", "ExpiredTokenException", "AccessDenied", "ValidationError", "PackedPolicyTooLarge"}, a.Code) {
			continue
		}
		cmd := exec.CommandContext(t.Context(), "aws", "--endpoint-url", s.URL(), "sts", "assume-role", "--role-arn", roles[i], "--role-session-name", "pod-1")
		cmd.Env = cleanEnv("AWS_ACCESS_KEY_ID="+id, "AWS_SECRET_ACCESS_KEY="+secret.Reveal())
		out, err := cmd.CombinedOutput()
		want := regexp.MustCompile(`An error occurred \(` + a.Code + `\) when calling the AssumeRole operation(?: \(reached max retries: 0\))?: ` + regexp.QuoteMeta(a.Message))
		if err == nil || !want.Match(out) {
			t.Errorf("%s: %v\n%s", a.Code, err, out)
		}
		if exit, ok := errors.AsType[*exec.ExitError](err); !ok || exit.ExitCode() < 1 {
			t.Errorf("%s: ended with %v", a.Code, err)
		}
	}
}
