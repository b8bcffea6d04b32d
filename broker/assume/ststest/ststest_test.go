package ststest_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	awshttp "github.com/aws/aws-sdk-go-v2/aws/transport/http"
	"github.com/aws/aws-sdk-go-v2/service/sts"
	"github.com/aws/aws-sdk-go-v2/service/sts/types"
	"github.com/aws/smithy-go"
	"github.com/google/go-cmp/cmp"

	"github.com/credence-iam/credence/broker/assume/ststest"
	"github.com/credence-iam/credence/broker/credential"
)

const roleARN = "arn:aws:iam::210987654321:role/apps/reader"

func start(t *testing.T, cfg ststest.Config) *ststest.Server {
	t.Helper()
	s, err := ststest.Start(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// client returns an SDK client with one attempt per call.
func client(s *ststest.Server, id, secret, token string) *sts.Client {
	return sts.New(sts.Options{
		Region:       "eu-west-1",
		BaseEndpoint: aws.String(s.URL()),
		HTTPClient:   s.Client(),
		Retryer:      aws.NopRetryer{},
		Credentials: aws.CredentialsProviderFunc(func(context.Context) (aws.Credentials, error) {
			return aws.Credentials{AccessKeyID: id, SecretAccessKey: secret, SessionToken: token}, nil
		}),
	})
}

func baseClient(s *ststest.Server) *sts.Client {
	id, secret := s.Keys()
	return client(s, id, secret.Reveal(), "")
}

func sessionClient(s *ststest.Server, c *types.Credentials) *sts.Client {
	return client(s, *c.AccessKeyId, *c.SecretAccessKey, *c.SessionToken)
}

func input(arn string) *sts.AssumeRoleInput {
	return &sts.AssumeRoleInput{RoleArn: &arn, RoleSessionName: aws.String("pod-1")}
}

func assume(t *testing.T, s *ststest.Server, in *sts.AssumeRoleInput) *sts.AssumeRoleOutput {
	t.Helper()
	out, err := baseClient(s).AssumeRole(t.Context(), in)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func identity(t *testing.T, c *sts.Client) map[string]string {
	t.Helper()
	out, err := c.GetCallerIdentity(t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	return map[string]string{"Account": *out.Account, "Arn": *out.Arn, "UserId": *out.UserId}
}

// wantError checks that the SDK parsed code and status.
func wantError(t *testing.T, err error, status int, code, message string) {
	t.Helper()
	apiErr, ok := errors.AsType[smithy.APIError](err)
	if !ok {
		t.Fatalf("got error %v, want API error %s", err, code)
	}
	resp, ok := errors.AsType[*awshttp.ResponseError](err)
	if !ok {
		t.Fatalf("error %v carries no response", err)
	}
	if apiErr.ErrorCode() != code || resp.HTTPStatusCode() != status {
		t.Errorf("got %d %s, want %d %s", resp.HTTPStatusCode(), apiErr.ErrorCode(), status, code)
	}
	if !strings.Contains(apiErr.ErrorMessage(), message) {
		t.Errorf("message %q does not contain %q", apiErr.ErrorMessage(), message)
	}
	if resp.ServiceRequestID() == "" {
		t.Error("the SDK found no request id")
	}
	wantFault := smithy.FaultClient
	if status >= 500 {
		wantFault = smithy.FaultServer
	}
	if f := apiErr.ErrorFault(); f != wantFault && f != smithy.FaultUnknown {
		t.Errorf("fault is %v, want %v", f, wantFault)
	}
}

func TestAssumeRole(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, err := ststest.StartInMemory(t.Context(), ststest.Config{})
		if err != nil {
			t.Fatal(err)
		}
		in := input(roleARN)
		in.DurationSeconds = aws.Int32(1800)
		in.Tags = []types.Tag{{Key: aws.String("team"), Value: aws.String("ä b")}}
		in.SourceIdentity = aws.String("alice")
		before := time.Now()
		out := assume(t, s, in)

		c := out.Credentials
		for name, check := range map[string]struct{ value, pattern string }{
			"AccessKeyId":     {*c.AccessKeyId, `^ASIA[A-Z2-7]{16}$`},
			"SecretAccessKey": {*c.SecretAccessKey, `^.{40}$`},
			"SessionToken":    {*c.SessionToken, `^.{100,}$`},
			"AssumedRoleId":   {*out.AssumedRoleUser.AssumedRoleId, `^AROA[A-Z2-7]{17}:pod-1$`},
		} {
			if !regexp.MustCompile(check.pattern).MatchString(check.value) {
				t.Errorf("%s has %d characters, which do not match %s", name, len(check.value), check.pattern)
			}
		}
		if want := before.Add(30 * time.Minute); !c.Expiration.Equal(want) {
			t.Errorf("Expiration is %v, want %v", c.Expiration, want)
		}
		if got := aws.ToInt32(out.PackedPolicySize); got != 1 { //nolint:staticcheck // It is deprecated, but STS sends it and clients read it.
			t.Errorf("PackedPolicySize is %d, want 1", got)
		}
		if got := aws.ToString(out.SourceIdentity); got != "alice" {
			t.Errorf("SourceIdentity is %q, want alice", got)
		}
		want := map[string]string{
			"Account": "210987654321",
			"Arn":     "arn:aws:sts::210987654321:assumed-role/reader/pod-1",
			"UserId":  *out.AssumedRoleUser.AssumedRoleId,
		}
		if diff := cmp.Diff(want, identity(t, sessionClient(s, c))); diff != "" {
			t.Errorf("identity of the session (-want +got):\n%s", diff)
		}
		if *out.AssumedRoleUser.Arn != want["Arn"] {
			t.Errorf("AssumedRoleUser.Arn is %s, want %s", *out.AssumedRoleUser.Arn, want["Arn"])
		}
	})
}

func TestIdentityOfUser(t *testing.T) {
	cfg := ststest.Config{Account: "000011112222", UserName: "op", AccessKeyID: "AKIDEXAMPLE0000001", SecretAccessKey: credential.NewSecret(strings.Repeat("k", 40))}
	s := start(t, cfg)
	got := identity(t, client(s, "AKIDEXAMPLE0000001", strings.Repeat("k", 40), ""))
	if !regexp.MustCompile(`^AIDA[A-Z2-7]{17}$`).MatchString(got["UserId"]) {
		t.Errorf("UserId is %s", got["UserId"])
	}
	delete(got, "UserId")
	want := map[string]string{"Account": "000011112222", "Arn": "arn:aws:iam::000011112222:user/op"}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("identity (-want +got):\n%s", diff)
	}
}

func TestExpiry(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, err := ststest.StartInMemory(t.Context(), ststest.Config{
			SessionDuration: func(requested time.Duration) time.Duration { return requested / 360 },
		})
		if err != nil {
			t.Fatal(err)
		}
		start := time.Now()
		c := assume(t, s, input(roleARN)).Credentials
		if got := c.Expiration.Sub(start); got != 10*time.Second {
			t.Fatalf("the session lives %v, want 10s", got)
		}
		session := sessionClient(s, c)
		time.Sleep(10*time.Second - time.Nanosecond)
		identity(t, session)
		time.Sleep(time.Nanosecond)
		_, err = session.GetCallerIdentity(t.Context(), nil)
		wantError(t, err, 403, "ExpiredToken", "expired")
		identity(t, baseClient(s))
	})
}

func TestParameters(t *testing.T) {
	s := start(t, ststest.Config{Roles: map[string]ststest.Behavior{
		"arn:aws:iam::123456789012:role/short": {MaxDuration: time.Hour},
	}})
	tags := func(n int) (list []types.Tag) {
		for i := range n {
			list = append(list, types.Tag{Key: aws.String(fmt.Sprintf("k%d", i)), Value: aws.String("v")})
		}
		return list
	}
	policyARNs := func(n int) (list []types.PolicyDescriptorType) {
		for range n {
			list = append(list, types.PolicyDescriptorType{Arn: aws.String("arn:aws:iam::aws:policy/ReadOnlyAccess")})
		}
		return list
	}
	type in = sts.AssumeRoleInput
	for name, test := range map[string]struct {
		change  func(*in)
		code    string // "" if allowed
		message string
	}{
		"shortest name":         {change: func(i *in) { i.RoleSessionName = aws.String("ab") }},
		"longest name":          {change: func(i *in) { i.RoleSessionName = aws.String(strings.Repeat("a", 64)) }},
		"short name":            {func(i *in) { i.RoleSessionName = aws.String("a") }, "ValidationError", "'roleSessionName' failed"},
		"long name":             {func(i *in) { i.RoleSessionName = aws.String(strings.Repeat("a", 65)) }, "ValidationError", "less than or equal to 64"},
		"name with a slash":     {func(i *in) { i.RoleSessionName = aws.String("ns/pod") }, "ValidationError", `[\w+=,.@-]*`},
		"name with a line feed": {func(i *in) { i.RoleSessionName = aws.String("pod\n") }, "ValidationError", "regular expression"},
		"empty name":            {func(i *in) { i.RoleSessionName = aws.String("") }, "ValidationError", "Value null at 'roleSessionName'"},
		"two errors":            {func(i *in) { i.RoleSessionName = aws.String("/"); i.RoleArn = aws.String("x") }, "ValidationError", "3 validation errors"},
		"short ARN":             {func(i *in) { i.RoleArn = aws.String("arn:aws:iam::1:role") }, "ValidationError", "equal to 20"},
		"long ARN":              {func(i *in) { i.RoleArn = aws.String(roleARN + strings.Repeat("a", 2048)) }, "ValidationError", "equal to 2048"},
		"no ARN":                {func(i *in) { i.RoleArn = aws.String("just-the-name-of-a-role") }, "ValidationError", "is invalid"},
		"ARN of a user":         {func(i *in) { i.RoleArn = aws.String("arn:aws:iam::123456789012:user/u") }, "ValidationError", "is invalid"},
		"another partition":     {change: func(i *in) { i.RoleArn = aws.String("arn:aws-us-gov:iam::123456789012:role/r") }},
		"shortest duration":     {change: func(i *in) { i.DurationSeconds = aws.Int32(900) }},
		"longest duration":      {change: func(i *in) { i.DurationSeconds = aws.Int32(43200) }},
		"short duration":        {func(i *in) { i.DurationSeconds = aws.Int32(899) }, "ValidationError", "greater than or equal to 900"},
		"long duration":         {func(i *in) { i.DurationSeconds = aws.Int32(43201) }, "ValidationError", "less than or equal to 43200"},
		"negative duration":     {func(i *in) { i.DurationSeconds = aws.Int32(-1) }, "ValidationError", "durationSeconds"},
		"over the role's": {func(i *in) {
			i.RoleArn = aws.String("arn:aws:iam::123456789012:role/short")
			i.DurationSeconds = aws.Int32(3601)
		}, "ValidationError", "MaxSessionDuration"},
		"external id":         {change: func(i *in) { i.ExternalId = aws.String("a:/@=,.+-_") }},
		"bad external id":     {func(i *in) { i.ExternalId = aws.String("a b") }, "ValidationError", "externalId"},
		"long external id":    {func(i *in) { i.ExternalId = aws.String(strings.Repeat("a", 1225)) }, "ValidationError", "1224"},
		"bad source identity": {func(i *in) { i.SourceIdentity = aws.String("a/b") }, "ValidationError", "sourceIdentity"},
		"reserved identity":   {func(i *in) { i.SourceIdentity = aws.String("aws:x") }, "ValidationError", "sourceIdentity"},
		"most tags":           {change: func(i *in) { i.Tags = tags(50) }},
		"too many tags":       {func(i *in) { i.Tags = tags(51) }, "ValidationError", "'tags' failed"},
		"empty tag value":     {change: func(i *in) { i.Tags = []types.Tag{{Key: aws.String("k"), Value: aws.String("")}} }},
		"empty tag key":       {func(i *in) { i.Tags = []types.Tag{{Key: aws.String(""), Value: aws.String("v")}} }, "ValidationError", "tags.1.member.key"},
		"bad tag value":       {func(i *in) { i.Tags = []types.Tag{{Key: aws.String("k"), Value: aws.String("a*")}} }, "ValidationError", "tags.1.member.value"},
		"long tag value": {func(i *in) {
			i.Tags = []types.Tag{{Key: aws.String("k"), Value: aws.String(strings.Repeat("ä", 257))}}
		}, "ValidationError", "256"},
		"longest tag value": {change: func(i *in) {
			i.Tags = []types.Tag{{Key: aws.String("k"), Value: aws.String(strings.Repeat("ä", 256))}}
		}},
		"reserved tag": {func(i *in) { i.Tags = []types.Tag{{Key: aws.String("AWS:k"), Value: aws.String("v")}} }, "ValidationError", "reserved"},
		"keys differ in case": {func(i *in) {
			i.Tags = []types.Tag{{Key: aws.String("k"), Value: aws.String("v")}, {Key: aws.String("K"), Value: aws.String("v")}}
		}, "ValidationError", "Duplicate"},
		"policy":               {change: func(i *in) { i.Policy = aws.String(`{"Version":"2012-10-17"}`) }},
		"policy is not JSON":   {func(i *in) { i.Policy = aws.String(`{`) }, "MalformedPolicyDocument", "invalid Json"},
		"policy is no object":  {func(i *in) { i.Policy = aws.String(`[]`) }, "MalformedPolicyDocument", "invalid Json"},
		"longest policy":       {change: func(i *in) { i.Policy = aws.String(`{"a":"` + strings.Repeat("a", 2040) + `"}`) }},
		"long policy":          {func(i *in) { i.Policy = aws.String(`{"a":"` + strings.Repeat("a", 2041) + `"}`) }, "ValidationError", "2048"},
		"too much altogether":  {func(i *in) { i.Policy = aws.String(`{"a":"` + strings.Repeat("a", 2040) + `"}`); i.Tags = tags(1) }, "PackedPolicyTooLarge", "101%"},
		"most policy ARNs":     {change: func(i *in) { i.PolicyArns = policyARNs(10) }},
		"too many policy ARNs": {func(i *in) { i.PolicyArns = policyARNs(11) }, "ValidationError", "'policyArns' failed"},
		"short policy ARN":     {func(i *in) { i.PolicyArns = []types.PolicyDescriptorType{{Arn: aws.String("arn:aws")}} }, "ValidationError", "policyArns.1.member.arn"},
	} {
		t.Run(name, func(t *testing.T) {
			in := input(roleARN)
			test.change(in)
			_, err := baseClient(s).AssumeRole(t.Context(), in)
			if test.code == "" {
				if err != nil {
					t.Fatal(err)
				}
				return
			}
			wantError(t, err, 400, test.code, test.message)
		})
	}
}

func TestTrust(t *testing.T) {
	const (
		open   = "arn:aws:iam::123456789012:role/open"
		guests = "arn:aws:iam::123456789012:role/guests"
	)
	s := start(t, ststest.Config{
		Default: ststest.Behavior{Deny: true},
		Roles:   map[string]ststest.Behavior{open: {}, guests: {ExternalID: "tenant-7"}},
	})
	ctx := t.Context()
	c := baseClient(s)
	for _, step := range []struct {
		role, externalID string
		allowed          bool
	}{
		{open, "", true},
		{open, "anything", true},
		{roleARN, "", false},
		{guests, "", false},
		{guests, "tenant-8", false},
		{guests, "tenant-7", true},
	} {
		in := input(step.role)
		if step.externalID != "" {
			in.ExternalId = &step.externalID
		}
		_, err := c.AssumeRole(ctx, in)
		if step.allowed {
			if err != nil {
				t.Errorf("%s with external id %q: %v", step.role, step.externalID, err)
			}
			continue
		}
		wantError(t, err, 403, "AccessDenied", "User: "+s.UserARN()+" is not authorized to perform: sts:AssumeRole on resource: "+step.role)
	}

	// Change both at run time.
	s.SetRole(open, ststest.Behavior{Deny: true})
	if _, err := c.AssumeRole(ctx, input(open)); err == nil {
		t.Error("a role set to Deny was assumed")
	}
	s.SetDefault(ststest.Behavior{})
	if _, err := c.AssumeRole(ctx, input(roleARN)); err != nil {
		t.Errorf("after the default was opened: %v", err)
	}
}

func TestChaining(t *testing.T) {
	s := start(t, ststest.Config{})
	session := sessionClient(s, assume(t, s, input("arn:aws:iam::123456789012:role/hop")).Credentials)
	in := input(roleARN)
	in.DurationSeconds = aws.Int32(3601)
	_, err := session.AssumeRole(t.Context(), in)
	wantError(t, err, 400, "ValidationError", "1 hour session limit for roles assumed by role chaining")
	in.DurationSeconds = nil
	out, err := session.AssumeRole(t.Context(), in)
	if err != nil {
		t.Fatal(err)
	}
	if got, want := *out.AssumedRoleUser.Arn, "arn:aws:sts::210987654321:assumed-role/reader/pod-1"; got != want {
		t.Errorf("assumed %s, want %s", got, want)
	}
}

func TestAuthentication(t *testing.T) {
	s := start(t, ststest.Config{})
	id, secret := s.Keys()
	one := assume(t, s, input(roleARN)).Credentials
	two := assume(t, s, input(roleARN)).Credentials
	for name, test := range map[string]struct {
		c       *sts.Client
		code    string
		message string
	}{
		"unknown key":         {client(s, "AKIAUNKNOWN000000000", secret.Reveal(), ""), "InvalidClientTokenId", "invalid"},
		"wrong secret":        {client(s, id, strings.Repeat("w", 40), ""), "SignatureDoesNotMatch", "does not match"},
		"wrong session key":   {client(s, *one.AccessKeyId, *two.SecretAccessKey, *one.SessionToken), "SignatureDoesNotMatch", "does not match"},
		"no token":            {client(s, *one.AccessKeyId, *one.SecretAccessKey, ""), "InvalidClientTokenId", "invalid"},
		"token of another":    {client(s, *one.AccessKeyId, *one.SecretAccessKey, *two.SessionToken), "InvalidClientTokenId", "invalid"},
		"token with user key": {client(s, id, secret.Reveal(), *two.SessionToken), "InvalidClientTokenId", "invalid"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := test.c.GetCallerIdentity(t.Context(), nil)
			wantError(t, err, 403, test.code, test.message)
			_, err = test.c.AssumeRole(t.Context(), input(roleARN))
			wantError(t, err, 403, test.code, test.message)
		})
	}
}

// tamper changes requests after the SDK has signed them.
type tamper struct {
	change func(*http.Request)
	next   http.RoundTripper
}

func (t tamper) RoundTrip(r *http.Request) (*http.Response, error) {
	t.change(r)
	return t.next.RoundTrip(r)
}

func TestSignatureCovers(t *testing.T) {
	s := start(t, ststest.Config{})
	session := assume(t, s, input(roleARN)).Credentials
	replace := func(header, old, new string) func(*http.Request) {
		return func(r *http.Request) { r.Header.Set(header, strings.Replace(r.Header.Get(header), old, new, 1)) }
	}
	for name, test := range map[string]struct {
		change  func(*http.Request)
		status  int
		code    string
		message string
	}{
		"body": {func(r *http.Request) {
			body := "Action=GetCallerIdentity&Version=2011-06-15&"
			r.Body, r.ContentLength = io.NopCloser(strings.NewReader(body)), int64(len(body))
		}, 403, "SignatureDoesNotMatch", "does not match"},
		"query":             {func(r *http.Request) { r.URL.RawQuery = "a=b" }, 403, "SignatureDoesNotMatch", "does not match"},
		"host":              {func(r *http.Request) { r.Host = "sts.example.com" }, 403, "SignatureDoesNotMatch", "does not match"},
		"content type":      {replace("Content-Type", "form", "from"), 403, "SignatureDoesNotMatch", "does not match"},
		"region":            {replace("Authorization", "/eu-west-1/", "/eu-west-2/"), 403, "SignatureDoesNotMatch", "does not match"},
		"service":           {replace("Authorization", "/sts/", "/s3/"), 403, "SignatureDoesNotMatch", "correct service: 'sts'"},
		"date of the scope": {replace("Authorization", "/2", "/3"), 403, "SignatureDoesNotMatch", "Date in Credential scope"},
		"host unsigned":     {replace("Authorization", ";host", ""), 403, "SignatureDoesNotMatch", "'host' must be a 'SignedHeader'"},
		"date unsigned":     {replace("Authorization", ";x-amz-date", ""), 403, "SignatureDoesNotMatch", "'x-amz-date' must be"},
		"token unsigned":    {replace("Authorization", ";x-amz-security-token", ""), 403, "SignatureDoesNotMatch", "'x-amz-security-token' must be"},
		"no date":           {func(r *http.Request) { r.Header.Del("X-Amz-Date") }, 400, "IncompleteSignature", "X-Amz-Date"},
		"no authorization":  {func(r *http.Request) { r.Header.Del("Authorization") }, 403, "MissingAuthenticationToken", "missing"},
		"another scheme":    {func(r *http.Request) { r.Header.Set("Authorization", "Bearer x") }, 400, "IncompleteSignature", "complete"},
		"no signature":      {replace("Authorization", "Signature=", "Signed="), 400, "IncompleteSignature", "complete"},
		"short scope":       {replace("Authorization", "/aws4_request", ""), 400, "IncompleteSignature", "complete"},
		"too many headers":  {replace("Authorization", "SignedHeaders=", "SignedHeaders="+strings.Repeat("a;", 51)), 400, "IncompleteSignature", "complete"},
	} {
		t.Run(name, func(t *testing.T) {
			c := sessionClient(s, session)
			_, err := c.GetCallerIdentity(t.Context(), nil, func(o *sts.Options) {
				o.HTTPClient = &http.Client{Transport: tamper{test.change, s.Client().Transport}}
			})
			wantError(t, err, test.status, test.code, test.message)
			for _, secret := range []string{*session.SecretAccessKey, *session.SessionToken} {
				if strings.Contains(err.Error(), secret) {
					t.Error("the error has a secret")
				}
			}
		})
	}
}

func TestSignatureTime(t *testing.T) {
	for name, test := range map[string]struct {
		change  func(*http.Request)
		message string
	}{
		"just young enough": {func(*http.Request) { time.Sleep(5 * time.Minute) }, ""},
		"too old":           {func(*http.Request) { time.Sleep(5*time.Minute + time.Second) }, "Signature expired: "},
		"from the future": {func(r *http.Request) {
			// The server checks the time before the signature, which is now wrong.
			r.Header.Set("X-Amz-Date", time.Now().Add(5*time.Minute+time.Second).UTC().Format("20060102T150405Z"))
		}, "Signature not yet current: "},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s, err := ststest.StartInMemory(t.Context(), ststest.Config{})
				if err != nil {
					t.Fatal(err)
				}
				_, err = baseClient(s).GetCallerIdentity(t.Context(), nil, func(o *sts.Options) {
					o.HTTPClient = &http.Client{Transport: tamper{test.change, s.Client().Transport}}
				})
				if test.message == "" {
					if err != nil {
						t.Fatal(err)
					}
					return
				}
				wantError(t, err, 403, "SignatureDoesNotMatch", test.message)
			})
		})
	}
}

func TestFaults(t *testing.T) {
	for name, test := range map[string]struct {
		fault   *ststest.Fault
		status  int
		code    string
		message string
	}{
		"throttling":  {ststest.Throttling(), 400, "Throttling", "Rate exceeded"},
		"unavailable": {ststest.Unavailable(), 503, "ServiceUnavailable", "temporary"},
		"any other":   {&ststest.Fault{Code: "RegionDisabledException", Message: "STS is not activated in <this> region", Status: 403}, 403, "RegionDisabledException", "<this>"},
		"no status":   {&ststest.Fault{Code: "ExpiredTokenException", Message: "100%"}, 400, "ExpiredTokenException", "100%"},
	} {
		t.Run(name, func(t *testing.T) {
			s := start(t, ststest.Config{})
			s.SetRole(roleARN, ststest.Behavior{Fault: test.fault})
			_, err := baseClient(s).AssumeRole(t.Context(), input(roleARN))
			wantError(t, err, test.status, test.code, test.message)
			if _, err := baseClient(s).AssumeRole(t.Context(), input(roleARN+"2")); err != nil {
				t.Errorf("another role: %v", err)
			}

			s.SetIdentity(ststest.Behavior{Fault: test.fault})
			_, err = baseClient(s).GetCallerIdentity(t.Context(), nil)
			wantError(t, err, test.status, test.code, test.message)
			s.SetIdentity(ststest.Behavior{})
			identity(t, baseClient(s))
		})
	}
}

func TestFaultSomeTimes(t *testing.T) {
	s := start(t, ststest.Config{})
	fault := ststest.Throttling()
	fault.Times = 2
	s.SetDefault(ststest.Behavior{Fault: fault})
	fault.Times = 0 // The server has its own copy.
	var failed []bool
	for range 4 {
		_, err := baseClient(s).AssumeRole(t.Context(), input(roleARN))
		failed = append(failed, err != nil)
	}
	if diff := cmp.Diff([]bool{true, true, false, false}, failed); diff != "" {
		t.Errorf("which calls failed (-want +got):\n%s", diff)
	}
}

func TestSDKRetriesThrottling(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fault := ststest.Throttling()
		fault.Times = 2
		s, err := ststest.StartInMemory(t.Context(), ststest.Config{Default: ststest.Behavior{Fault: fault}})
		if err != nil {
			t.Fatal(err)
		}
		id, secret := s.Keys()
		c := sts.New(sts.Options{
			Region: "eu-west-1", BaseEndpoint: aws.String(s.URL()), HTTPClient: s.Client(),
			Credentials: aws.CredentialsProviderFunc(func(context.Context) (aws.Credentials, error) {
				return aws.Credentials{AccessKeyID: id, SecretAccessKey: secret.Reveal()}, nil
			}),
		})
		if _, err := c.AssumeRole(t.Context(), input(roleARN)); err != nil {
			t.Fatal(err)
		}
		if got := s.Count("AssumeRole", roleARN); got != 3 {
			t.Errorf("the SDK made %d calls, want 3", got)
		}
	})
}

func TestLatency(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, err := ststest.StartInMemory(t.Context(), ststest.Config{Default: ststest.Behavior{Latency: 700 * time.Millisecond}})
		if err != nil {
			t.Fatal(err)
		}
		start := time.Now()
		assume(t, s, input(roleARN))
		if got := time.Since(start); got != 700*time.Millisecond {
			t.Errorf("the answer took %v, want 700ms", got)
		}
	})
}

func TestHold(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		gate := make(chan struct{})
		s, err := ststest.StartInMemory(t.Context(), ststest.Config{})
		if err != nil {
			t.Fatal(err)
		}
		s.SetRole(roleARN, ststest.Behavior{Latency: time.Second, Hold: gate})
		time.AfterFunc(time.Minute, func() { close(gate) })
		start := time.Now()
		assume(t, s, input(roleARN))
		if got := time.Since(start); got != time.Minute {
			t.Errorf("the answer took %v, want the minute until the gate is opened", got)
		}
		assume(t, s, input(roleARN))
		if got := time.Since(start); got != time.Minute+time.Second {
			t.Errorf("with the gate open, two answers took %v, want 1m1s", got)
		}
	})
}

// TestNoAnswer has the faults without a response.
func TestNoAnswer(t *testing.T) {
	for name, test := range map[string]struct {
		behavior ststest.Behavior
		end      func(cancel func(), s *ststest.Server)
	}{
		"hang until the client gives up":    {ststest.Behavior{Fault: ststest.Hang()}, func(cancel func(), _ *ststest.Server) { cancel() }},
		"hang until the server closes":      {ststest.Behavior{Fault: ststest.Hang()}, func(_ func(), s *ststest.Server) { s.Close() }},
		"latency until the client gives up": {ststest.Behavior{Latency: time.Hour}, func(cancel func(), _ *ststest.Server) { cancel() }},
		"hold until the client gives up":    {ststest.Behavior{Hold: make(chan struct{})}, func(cancel func(), _ *ststest.Server) { cancel() }},
		"hold until the server closes":      {ststest.Behavior{Hold: make(chan struct{})}, func(_ func(), s *ststest.Server) { s.Close() }},
		"drop":                              {ststest.Behavior{Fault: ststest.Drop()}, func(func(), *ststest.Server) {}},
	} {
		t.Run(name, func(t *testing.T) {
			ended := make(chan ststest.Call, 1)
			s := start(t, ststest.Config{Default: test.behavior, OnCall: func(c ststest.Call) { ended <- c }})
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			failed := make(chan error, 1)
			go func() {
				_, err := baseClient(s).AssumeRole(ctx, input(roleARN))
				failed <- err
			}()
			if err := s.AwaitCount(t.Context(), "AssumeRole", roleARN, 1); err != nil {
				t.Fatal(err)
			}
			test.end(cancel, s)
			err := <-failed
			if err == nil {
				t.Fatal("the call was answered")
			}
			if _, ok := errors.AsType[smithy.APIError](err); ok {
				t.Errorf("got API error %v, want a broken connection", err)
			}
			if c := <-ended; c.Status != 0 || c.RoleARN != roleARN {
				t.Errorf("recorded %+v, want status 0 for %s", c, roleARN)
			}
		})
	}
}

func TestAwaitCountEnds(t *testing.T) {
	s := start(t, ststest.Config{})
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := s.AwaitCount(ctx, "", "", 1); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v, want context canceled", err)
	}
}

func TestCalls(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var observed []ststest.Call
		s, err := ststest.StartInMemory(t.Context(), ststest.Config{OnCall: func(c ststest.Call) { observed = append(observed, c) }})
		if err != nil {
			t.Fatal(err)
		}
		in := input(roleARN)
		in.DurationSeconds = aws.Int32(900)
		in.ExternalId = aws.String("tenant-7")
		in.SourceIdentity = aws.String("alice")
		in.Policy = aws.String(`{}`)
		in.PolicyArns = []types.PolicyDescriptorType{{Arn: aws.String("arn:aws:iam::aws:policy/P")}}
		in.Tags = []types.Tag{{Key: aws.String("a"), Value: aws.String("1")}, {Key: aws.String("b"), Value: aws.String("")}}
		in.TransitiveTagKeys = []string{"a"}
		out := assume(t, s, in)
		s.SetIdentity(ststest.Behavior{Fault: ststest.Throttling()})
		if _, err := sessionClient(s, out.Credentials).GetCallerIdentity(t.Context(), nil); err == nil {
			t.Fatal("the fault was not met")
		}

		id, secret := s.Keys()
		want := []ststest.Call{{
			Time: time.Now(), Action: "AssumeRole", RoleARN: roleARN, SessionName: "pod-1", ExternalID: "tenant-7", SourceIdentity: "alice",
			Duration: 15 * time.Minute, Policy: `{}`, PolicyARNs: []string{"arn:aws:iam::aws:policy/P"},
			Tags: map[string]string{"a": "1", "b": ""}, TransitiveTags: []string{"a"},
			AccessKeyID: id, Status: 200, IssuedAccessKeyID: *out.Credentials.AccessKeyId,
		}, {
			Time: time.Now(), Action: "GetCallerIdentity", AccessKeyID: *out.Credentials.AccessKeyId, Status: 400, Code: "Throttling",
		}}
		calls := s.Calls()
		if diff := cmp.Diff(want, calls); diff != "" {
			t.Errorf("Calls (-want +got):\n%s", diff)
		}
		if diff := cmp.Diff(want, observed); diff != "" {
			t.Errorf("OnCall (-want +got):\n%s", diff)
		}
		calls[0].Tags["a"] = "changed"
		if s.Calls()[0].Tags["a"] != "1" {
			t.Error("a caller can change the log")
		}
		for _, c := range []struct {
			action, role string
			want         int
		}{{"", "", 2}, {"AssumeRole", "", 1}, {"", roleARN, 1}, {"AssumeRole", "other", 0}} {
			if got := s.Count(c.action, c.role); got != c.want {
				t.Errorf("Count(%q, %q) is %d, want %d", c.action, c.role, got, c.want)
			}
		}

		line, err := json.Marshal(observed)
		if err != nil {
			t.Fatal(err)
		}
		for _, s := range []string{secret.Reveal(), *out.Credentials.SecretAccessKey, *out.Credentials.SessionToken} {
			if strings.Contains(string(line), s) {
				t.Error("the call log has a secret")
			}
		}
	})
}

func TestConcurrency(t *testing.T) {
	var observed int // without a lock, because calls of OnCall are serialized
	s := start(t, ststest.Config{OnCall: func(ststest.Call) { observed++ }})
	const workers, each = 16, 10
	ids := make(chan string, workers*each)
	var wg sync.WaitGroup
	for range workers {
		wg.Go(func() {
			for range each {
				out, err := baseClient(s).AssumeRole(t.Context(), input(roleARN))
				if err != nil {
					t.Error(err)
					return
				}
				if _, err := sessionClient(s, out.Credentials).GetCallerIdentity(t.Context(), nil); err != nil {
					t.Error(err)
				}
				s.SetRole(roleARN, ststest.Behavior{Latency: time.Microsecond})
				_ = s.Calls()
				ids <- *out.Credentials.AccessKeyId
			}
		})
	}
	wg.Wait()
	close(ids)
	s.Close()
	unique := make(map[string]bool)
	for id := range ids {
		unique[id] = true
	}
	if len(unique) != workers*each || s.Count("AssumeRole", "") != workers*each {
		t.Errorf("%d access key ids from %d calls, want %d", len(unique), s.Count("AssumeRole", ""), workers*each)
	}
	if observed != 2*workers*each {
		t.Errorf("OnCall got %d calls, want %d", observed, 2*workers*each)
	}
}

// TestWire checks responses without an SDK.
func TestWire(t *testing.T) {
	s := start(t, ststest.Config{})
	post := func(path, body string) *http.Request {
		r, err := http.NewRequestWithContext(t.Context(), http.MethodPost, s.URL()+path, strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
	get := post("/", "")
	get.Method = http.MethodGet
	for name, test := range map[string]struct {
		request *http.Request
		status  int
		kind    string
		code    string
		message string
	}{
		"unsigned":        {post("/", "Action=GetCallerIdentity&Version=2011-06-15"), 403, "Sender", "MissingAuthenticationToken", "Request is missing Authentication Token"},
		"no action":       {post("/", ""), 400, "Sender", "MissingAction", "The request is missing an action"},
		"unknown action":  {post("/", "Action=GetFoo%3C&Version=2011-06-15"), 400, "Sender", "InvalidAction", "Could not find operation GetFoo&lt; for version 2011-06-15"},
		"no version":      {post("/", "Action=AssumeRole"), 400, "Sender", "InvalidAction", "Could not find operation AssumeRole for version NO_VERSION_SPECIFIED"},
		"not a form":      {post("/", "Action=%zz"), 400, "Sender", "MalformedInput", "The request is not a form"},
		"another path":    {post("/x", ""), 404, "Sender", "UnknownOperationException", "There is nothing at &#34;/x&#34;; the service is at /"},
		"not POST":        {get, 405, "Sender", "InvalidAction", "Only POST is served, not GET"},
		"larger than max": {post("/", strings.Repeat("a", 512<<10+1)), 413, "Sender", "RequestEntityTooLarge", "The request is larger than 524288 bytes"},
	} {
		t.Run(name, func(t *testing.T) {
			resp, err := s.Client().Do(test.request)
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = resp.Body.Close() }()
			body, err := io.ReadAll(resp.Body)
			if err != nil {
				t.Fatal(err)
			}
			if resp.StatusCode != test.status || resp.Header.Get("Content-Type") != "text/xml" {
				t.Errorf("got status %d, type %s; want %d, text/xml", resp.StatusCode, resp.Header.Get("Content-Type"), test.status)
			}
			want := `<ErrorResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/">
  <Error>
    <Type>` + test.kind + `</Type>
    <Code>` + test.code + `</Code>
    <Message>` + test.message + `</Message>
  </Error>
  <RequestId>` + resp.Header.Get("X-Amzn-Requestid") + `</RequestId>
</ErrorResponse>`
			if diff := cmp.Diff(want, string(body)); diff != "" {
				t.Errorf("body (-want +got):\n%s", diff)
			}
		})
	}
}

func TestNewRefuses(t *testing.T) {
	for name, test := range map[string]struct {
		cfg  ststest.Config
		want string
	}{
		"account":          {ststest.Config{Account: "12"}, "Account"},
		"user":             {ststest.Config{UserName: "a b"}, "UserName"},
		"key without":      {ststest.Config{AccessKeyID: "AKIAEXAMPLE000000000"}, "SecretAccessKey"},
		"secret without":   {ststest.Config{SecretAccessKey: credential.NewSecret("secret-of-a-user")}, "AccessKeyID"},
		"key with a slash": {ststest.Config{AccessKeyID: "AKIA/EXAMPLE00000000", SecretAccessKey: credential.NewSecret("secret-of-a-user")}, "AccessKeyID"},
		"role":             {ststest.Config{Roles: map[string]ststest.Behavior{"reader": {}}}, "Roles"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := ststest.New(test.cfg)
			if err == nil || !strings.Contains(err.Error(), test.want) {
				t.Fatalf("got %v, want an error that names %s", err, test.want)
			}
			if strings.Contains(err.Error(), "secret-of-a-user") {
				t.Error("the error has a secret")
			}
		})
	}
}

func TestSecretsDoNotShow(t *testing.T) {
	const secret = "do-not-show-this-secret"
	cfg := ststest.Config{SecretAccessKey: credential.NewSecret(secret)}
	s, err := ststest.New(ststest.Config{AccessKeyID: "AKIAEXAMPLE000000000", SecretAccessKey: cfg.SecretAccessKey})
	if err != nil {
		t.Fatal(err)
	}
	var log strings.Builder
	slog.New(slog.NewTextHandler(&log, nil)).Info("Text", "secret", cfg.SecretAccessKey)
	slog.New(slog.NewJSONHandler(&log, nil)).Info("JSON", "secret", cfg.SecretAccessKey)
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%d"} {
		fmt.Fprintf(&log, verb+verb, cfg, s)
	}
	if strings.Contains(log.String(), secret) || strings.Contains(log.String(), fmt.Sprintf("%x", secret)) {
		t.Errorf("the secret shows: %s", log.String())
	}
	if !strings.Contains(log.String(), "[redacted]") {
		t.Error("nothing was redacted")
	}
}

// TestCommandLine runs the AWS CLI, which uses botocore.
func TestCommandLine(t *testing.T) {
	if out, err := exec.CommandContext(t.Context(), "aws", "--version").CombinedOutput(); err != nil {
		t.Skipf("the AWS CLI does not run here: %v %s", err, out)
	}
	s := start(t, ststest.Config{})
	id, secret := s.Keys()
	run := func(env []string, args ...string) (string, error) {
		cmd := exec.CommandContext(t.Context(), "aws", append([]string{"--endpoint-url", s.URL(), "--output", "json", "sts"}, args...)...)
		cmd.Env = append(slices.DeleteFunc(os.Environ(), func(v string) bool { return strings.HasPrefix(v, "AWS_") }), append(env,
			"AWS_EC2_METADATA_DISABLED=true", "AWS_REGION=eu-west-1", "AWS_DEFAULT_REGION=eu-west-1", "AWS_MAX_ATTEMPTS=1", "AWS_CONFIG_FILE=/dev/null", "AWS_SHARED_CREDENTIALS_FILE=/dev/null")...)
		out, err := cmd.CombinedOutput()
		return string(out), err
	}
	base := []string{"AWS_ACCESS_KEY_ID=" + id, "AWS_SECRET_ACCESS_KEY=" + secret.Reveal()}
	assumeArgs := []string{"assume-role", "--role-arn", roleARN, "--role-session-name", "pod-1"}

	out, err := run(base, append(assumeArgs, "--tags", "Key=team,Value=a b", "Key=x,Value=")...)
	if err != nil {
		t.Fatalf("assume-role: %v\n%s", err, out)
	}
	var answer struct {
		Credentials     types.Credentials
		AssumedRoleUser types.AssumedRoleUser
	}
	if err := json.Unmarshal([]byte(out), &answer); err != nil {
		t.Fatalf("reading assume-role's output: %v", err)
	}
	c := answer.Credentials
	session := []string{"AWS_ACCESS_KEY_ID=" + *c.AccessKeyId, "AWS_SECRET_ACCESS_KEY=" + *c.SecretAccessKey, "AWS_SESSION_TOKEN=" + *c.SessionToken}
	out, err = run(session, "get-caller-identity")
	if err != nil || !strings.Contains(out, `"Arn": "arn:aws:sts::210987654321:assumed-role/reader/pod-1"`) {
		t.Errorf("get-caller-identity: %v\n%s", err, out)
	}
	if diff := cmp.Diff(map[string]string{"team": "a b", "x": ""}, s.Calls()[0].Tags); diff != "" {
		t.Errorf("tags (-want +got):\n%s", diff)
	}
	s.SetRole(roleARN, ststest.Behavior{Fault: ststest.Throttling()})
	out, err = run(base, assumeArgs...)
	if err == nil || !strings.Contains(out, "An error occurred (Throttling) when calling the AssumeRole operation") || !strings.Contains(out, "Rate exceeded") {
		t.Errorf("throttled: %v\n%s", err, out)
	}
}

// TestHandler serves a Server of New with an http.Server of its own.
func TestHandler(t *testing.T) {
	s, err := ststest.New(ststest.Config{})
	if err != nil {
		t.Fatal(err)
	}
	if s.URL() != "" || s.Client() != http.DefaultClient {
		t.Error("a Server that is not served has a URL or a client")
	}
	s.Close()
	form := url.Values{"Action": {"GetCallerIdentity"}, "Version": {"2011-06-15"}}
	r, err := http.NewRequestWithContext(t.Context(), http.MethodPost, "/", strings.NewReader(form.Encode()))
	if err != nil {
		t.Fatal(err)
	}
	w := recorder{header: make(http.Header)}
	s.ServeHTTP(&w, r)
	if w.status != 403 || !strings.Contains(w.body.String(), "MissingAuthenticationToken") {
		t.Errorf("got %d %s", w.status, w.body.String())
	}
}

type recorder struct {
	header http.Header
	status int
	body   strings.Builder
}

func (r *recorder) Header() http.Header         { return r.header }
func (r *recorder) WriteHeader(status int)      { r.status = status }
func (r *recorder) Write(p []byte) (int, error) { return r.body.Write(p) }
