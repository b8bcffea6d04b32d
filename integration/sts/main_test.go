//go:build unix

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	awsmiddleware "github.com/aws/aws-sdk-go-v2/aws/middleware"
	awshttp "github.com/aws/aws-sdk-go-v2/aws/transport/http"
	"github.com/aws/aws-sdk-go-v2/credentials"
	"github.com/aws/aws-sdk-go-v2/service/sts"
	"github.com/aws/smithy-go"

	"github.com/credence-iam/credence/broker/assume"
	"github.com/credence-iam/credence/broker/assume/ststest"
	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/broker/policy"
	"github.com/credence-iam/credence/integration/await"
	"github.com/credence-iam/credence/integration/minio"
	"github.com/credence-iam/credence/integration/process"
	"github.com/credence-iam/credence/integration/tools"
)

const roleARN = "arn:aws:iam::123456789012:role/demo"

// startMinIO starts MinIO and waits for its STS, which is ready a moment after S3.
func startMinIO(t *testing.T) *minio.Server {
	t.Helper()
	if testing.Short() && !tools.Built(tools.MinIO) {
		t.Skip("-short, and minio is not built (go run ./integration/tools/install minio)")
	}
	run, err := process.Open(t.Context(), process.Config{Parent: t.TempDir(), Name: "minio"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := run.Close(); err != nil {
			t.Error(err)
		}
	})
	server, err := minio.Start(t.Context(), run, run.Loopback(), os.Stderr)
	if err != nil {
		t.Fatal(err)
	}
	access, secret := server.Root()
	await.Until(t, "MinIO's STS is ready", func() error {
		_, err := client(server.Endpoint(), access, secret).AssumeRole(t.Context(), &sts.AssumeRoleInput{
			RoleArn: aws.String(roleARN), RoleSessionName: aws.String("pod-1"),
		})
		return err
	})
	return server
}

func client(endpoint, access, secret string) *sts.Client {
	return sts.New(sts.Options{
		BaseEndpoint: aws.String(endpoint), Region: "us-east-1", Retryer: aws.NopRetryer{},
		Credentials: credentials.NewStaticCredentialsProvider(access, secret, ""),
	})
}

// response is what an SDK finds in the response of an STS.
type response struct {
	status   int
	code     string        // of the error
	duration time.Duration // of the session
}

// assumeRole calls an STS, and checks that the response has all that the SDK reads.
func assumeRole(t *testing.T, endpoint, access, secret string, change func(*sts.AssumeRoleInput)) response {
	t.Helper()
	in := &sts.AssumeRoleInput{RoleArn: aws.String(roleARN), RoleSessionName: aws.String("pod-1")}
	change(in)
	out, err := client(endpoint, access, secret).AssumeRole(t.Context(), in)
	if http, ok := errors.AsType[*awshttp.ResponseError](err); ok {
		e, ok := errors.AsType[smithy.APIError](err)
		if !ok || e.ErrorMessage() == "" || http.ServiceRequestID() == "" {
			t.Errorf("%s: an error without a message or a request's ID: %v", endpoint, err)
		}
		return response{status: http.HTTPStatusCode(), code: e.ErrorCode()}
	}
	if err != nil {
		t.Fatal(err)
	}
	c := out.Credentials
	if *c.AccessKeyId == "" || *c.SecretAccessKey == "" || *c.SessionToken == "" {
		t.Errorf("%s: the SDK does not find a part of the credentials", endpoint)
	}
	date, _ := awsmiddleware.GetServerTime(out.ResultMetadata)
	return response{status: 200, duration: c.Expiration.Sub(date)}
}

// TestDoubleAgreesWithMinIO compares the responses of the STS double with those of an independent STS: keys, expiration,
// inline policy and refusals. The table has AWS's error code if MinIO's differs.
func TestDoubleAgreesWithMinIO(t *testing.T) {
	real := startMinIO(t)
	double, err := ststest.Start(t.Context(), ststest.Config{})
	if err != nil {
		t.Fatal(err)
	}
	access, secret := real.Root()
	doubleAccess, doubleSecret := double.Keys()

	const allow = `{"Version":"2012-10-17","Statement":[{"Effect":"Allow","Action":["s3:GetObject"],"Resource":["arn:aws:s3:::b/*"]}]}`
	// MinIO does not count blanks.
	pad := func(n int) *string {
		return aws.String(strings.Replace(allow, "b/*", "b/"+strings.Repeat("k", n-len(allow))+"*", 1))
	}
	for name, tt := range map[string]struct {
		change             func(*sts.AssumeRoleInput)
		wrongKey, wrongSec bool
		want               response // of the double
		minio              string   // MinIO's error code
	}{
		"default duration":  {want: response{status: 200, duration: time.Hour}},
		"shortest duration": {change: func(in *sts.AssumeRoleInput) { in.DurationSeconds = aws.Int32(900) }, want: response{status: 200, duration: 15 * time.Minute}},
		"longest duration":  {change: func(in *sts.AssumeRoleInput) { in.DurationSeconds = aws.Int32(43200) }, want: response{status: 200, duration: 12 * time.Hour}},
		"policy":            {change: func(in *sts.AssumeRoleInput) { in.Policy = aws.String(allow) }, want: response{status: 200, duration: time.Hour}},
		"longest policy":    {change: func(in *sts.AssumeRoleInput) { in.Policy = pad(2048) }, want: response{status: 200, duration: time.Hour}},
		"too short":         {change: func(in *sts.AssumeRoleInput) { in.DurationSeconds = aws.Int32(899) }, want: response{status: 400, code: "ValidationError"}, minio: "InvalidParameterValue"},
		"too long a policy": {change: func(in *sts.AssumeRoleInput) { in.Policy = pad(2049) }, want: response{status: 400, code: "ValidationError"}, minio: "InvalidParameterValue"},
		"no JSON":           {change: func(in *sts.AssumeRoleInput) { in.Policy = aws.String("{") }, want: response{status: 400, code: "MalformedPolicyDocument"}, minio: "InvalidParameterValue"},
		"unknown key":       {wrongKey: true, want: response{status: 403, code: "InvalidClientTokenId"}, minio: "AccessDenied"},
		"wrong secret":      {wrongSec: true, want: response{status: 403, code: "SignatureDoesNotMatch"}, minio: "AccessDenied"},
	} {
		t.Run(name, func(t *testing.T) {
			call := func(endpoint, access, secret string) response {
				t.Helper()
				if tt.wrongKey {
					access = "AKIAUNKNOWNUNKNOWN00"
				}
				if tt.wrongSec {
					secret += "x"
				}
				if tt.change == nil {
					tt.change = func(*sts.AssumeRoleInput) {}
				}
				got := assumeRole(t, endpoint, access, secret, tt.change)
				// The date and the expiration are cut to seconds.
				if (got.duration - tt.want.duration).Abs() <= 2*time.Second {
					got.duration = tt.want.duration
				}
				return got
			}
			if got := call(double.URL(), doubleAccess, doubleSecret.Reveal()); got != tt.want {
				t.Errorf("the double: got %+v, want %+v", got, tt.want)
			}
			want := tt.want
			want.code = tt.minio
			if got := call(real.Endpoint(), access, secret); got != want {
				t.Errorf("MinIO: got %+v, want %+v", got, want)
			}
		})
	}
}

// TestAssumeAgainstMinIO calls MinIO with the broker's code, with right and wrong keys.
func TestAssumeAgainstMinIO(t *testing.T) {
	real := startMinIO(t)
	access, secret := real.Root()
	for _, variable := range os.Environ() {
		if name, _, _ := strings.Cut(variable, "="); strings.HasPrefix(name, "AWS_") {
			t.Setenv(name, "")
		}
	}
	keys, err := policy.NewKeys(policy.DefaultPrefix)
	if err != nil {
		t.Fatal(err)
	}
	rules, err := policy.New(policy.Config{Keys: keys})
	if err != nil {
		t.Fatal(err)
	}
	grant, err := rules.Grant(
		policy.Pod{Namespace: "shop", Name: "cart-1", UID: "u-1", ServiceAccount: "cart", Request: keys.Request(map[string]string{keys.Name(policy.Role): roleARN})},
		policy.Namespace{Name: "shop", Labels: map[string]string{keys.Name(policy.Inject): policy.Enabled}, Annotations: map[string]string{keys.Name(policy.Permitted): ".*"}})
	if err != nil {
		t.Fatal(err)
	}
	call := func(access, secret string) (credential.Credential, error) {
		t.Setenv("AWS_ACCESS_KEY_ID", access)
		t.Setenv("AWS_SECRET_ACCESS_KEY", secret)
		s, err := assume.New(context.WithoutCancel(t.Context()), assume.Config{Region: "us-east-1", Endpoint: real.Endpoint()})
		if err != nil {
			t.Fatal(err)
		}
		return s.Credential(t.Context(), grant)
	}
	cred, err := call(access, secret)
	if err != nil || !cred.Valid(time.Now()) {
		t.Errorf("got %s, %v", cred, err)
	}
	for what, pair := range map[string][2]string{"unknown key": {"AKIAUNKNOWNUNKNOWN00", secret}, "wrong secret": {access, secret + "x"}} {
		_, err := call(pair[0], pair[1])
		if credential.ReasonOf(err) != credential.ReasonBrokerCredentials || strings.Contains(fmt.Sprintf("%+v", err), secret) {
			t.Errorf("%s: %v", what, err)
		}
	}
}
