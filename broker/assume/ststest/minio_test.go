package ststest_test

import (
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/google/go-cmp/cmp"

	"github.com/credence-iam/credence/broker/assume/ststest"
	"github.com/credence-iam/credence/broker/credential"
)

// front returns a server in front of another one in the place of MinIO, which has the same protocol, checks signatures and
// makes keys. The integration tests use a real MinIO.
func front(t *testing.T, cfg ststest.Config, policies map[string]string) (server, minio *ststest.Server) {
	t.Helper()
	minio = start(t, ststest.Config{UserName: "minio"})
	id, secret := minio.Keys()
	cfg.MinIO = &ststest.MinIO{Endpoint: minio.URL(), AccessKey: id, SecretKey: secret, Policies: policies}
	return start(t, cfg), minio
}

func TestMinIOMints(t *testing.T) {
	s, minio := front(t, ststest.Config{}, nil)
	in := input(roleARN)
	in.DurationSeconds = aws.Int32(1800)
	in.Policy = aws.String(`{"Version":"2012-10-17"}`)
	in.ExternalId = aws.String("tenant-7")
	out := assume(t, s, in)

	want := map[string]string{
		"Account": "210987654321",
		"Arn":     "arn:aws:sts::210987654321:assumed-role/reader/pod-1",
		"UserId":  *out.AssumedRoleUser.AssumedRoleId,
	}
	if diff := cmp.Diff(want, identity(t, sessionClient(s, out.Credentials))); diff != "" {
		t.Errorf("identity (-want +got):\n%s", diff)
	}
	// The keys are MinIO's: it knows them.
	identity(t, sessionClient(minio, out.Credentials))
	call := minio.Calls()[0]
	if call.IssuedAccessKeyID != *out.Credentials.AccessKeyId || call.Duration != 30*time.Minute || call.Policy != *in.Policy {
		t.Errorf("MinIO was called %+v", call)
	}
	if got := minio.Count("GetCallerIdentity", ""); got != 1 {
		t.Errorf("MinIO was called for %d identities, want only this test's own", got)
	}
}

func TestMinIOExpiration(t *testing.T) {
	life := time.Minute
	s, _ := front(t, ststest.Config{SessionDuration: func(time.Duration) time.Duration { return life }}, nil)
	short := assume(t, s, input(roleARN)).Credentials.Expiration
	life = 100 * time.Hour
	long := assume(t, s, input(roleARN)).Credentials.Expiration
	// MinIO's own expiration, after an hour, limits the stated expiration. The sessions were made one after the other, so the
	// difference is at least 59 minutes, minus up to a second of truncation.
	if got := long.Sub(*short); got < 59*time.Minute-time.Second || got > 99*time.Hour {
		t.Errorf("the sessions end %v apart, want about 59m", got)
	}
}

func TestMinIOPolicies(t *testing.T) {
	const (
		reader = `{"Version":"2012-10-17","Statement":[]}`
		other  = "arn:aws:iam::210987654321:role/other"
	)
	s, minio := front(t, ststest.Config{}, map[string]string{roleARN: reader})
	assume(t, s, input(roleARN))
	assume(t, s, input(other))
	calls := minio.Calls()
	if calls[0].Policy != reader {
		t.Errorf("MinIO got policy %s for a role with one, want %s", calls[0].Policy, reader)
	}
	if !strings.Contains(calls[1].Policy, `"Effect":"Deny","Action":["s3:*"]`) {
		t.Errorf("MinIO got policy %s for a role without one, want all denied", calls[1].Policy)
	}

	in := input(roleARN)
	in.Policy = aws.String(`{}`)
	_, err := baseClient(s).AssumeRole(t.Context(), in)
	wantError(t, err, 400, "ValidationError", "cannot narrow it")
	if got := minio.Count("AssumeRole", ""); got != 2 {
		t.Errorf("MinIO was called %d times, want 2", got)
	}
}

func TestMinIORefused(t *testing.T) {
	s, minio := front(t, ststest.Config{Default: ststest.Behavior{Deny: true}}, nil)
	_, err := baseClient(s).AssumeRole(t.Context(), input(roleARN))
	wantError(t, err, 403, "AccessDenied", "not authorized")
	if got := minio.Count("", ""); got != 0 {
		t.Errorf("MinIO was called %d times for a session that is denied", got)
	}
}

func TestMinIOFails(t *testing.T) {
	for name, test := range map[string]struct {
		fault   *ststest.Fault
		status  int
		code    string
		message string
	}{
		"a bad request is the caller's": {&ststest.Fault{Code: "InvalidParameterValue", Message: "invalid policy"}, 400, "InvalidParameterValue", "invalid policy"},
		"a refusal is not":              {&ststest.Fault{Code: "AccessDenied", Message: "key details", Status: 403}, 503, "ServiceUnavailable", "status 403 AccessDenied"},
		"unavailable for a moment":      {ststest.Unavailable(), 503, "ServiceUnavailable", "status 503"},
		"connection lost":               {ststest.Drop(), 503, "ServiceUnavailable", "cannot be reached"},
	} {
		t.Run(name, func(t *testing.T) {
			s, minio := front(t, ststest.Config{}, nil)
			minio.SetDefault(ststest.Behavior{Fault: test.fault})
			_, err := baseClient(s).AssumeRole(t.Context(), input(roleARN))
			wantError(t, err, test.status, test.code, test.message)
			if strings.Contains(err.Error(), "key details") {
				t.Error("MinIO's message about its own keys reached the caller")
			}
		})
	}
}

// TestMinIOAnswers has responses that are not MinIO's.
func TestMinIOAnswers(t *testing.T) {
	const good = `<AssumeRoleResponse><AssumeRoleResult><Credentials><AccessKeyId>a</AccessKeyId><SecretAccessKey>b</SecretAccessKey>` +
		`<SessionToken>c</SessionToken><Expiration>2026-01-01T00:00:00Z</Expiration></Credentials></AssumeRoleResult>`
	for name, test := range map[string]struct {
		status        int
		body, message string
	}{
		"another document": {200, `<html></html>`, "not an AssumeRoleResponse"},
		"no keys":          {200, `<AssumeRoleResponse><AssumeRoleResult><Credentials><Expiration>2026-01-01T00:00:00Z</Expiration></Credentials></AssumeRoleResult></AssumeRoleResponse>`, "lacks keys"},
		"no expiration":    {200, `<AssumeRoleResponse><AssumeRoleResult><Credentials><AccessKeyId>a</AccessKeyId><SecretAccessKey>b</SecretAccessKey><SessionToken>c</SessionToken></Credentials></AssumeRoleResult></AssumeRoleResponse>`, "lacks keys or their expiration"},
		"not XML":          {502, `bad gateway`, "status 502"},
		"too long":         {200, good + strings.Repeat(" ", 64<<10) + `</AssumeRoleResponse>`, "not an AssumeRoleResponse"},
	} {
		t.Run(name, func(t *testing.T) {
			other := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
				w.WriteHeader(test.status)
				_, _ = w.Write([]byte(test.body))
			}))
			defer other.Close()
			s := start(t, ststest.Config{MinIO: &ststest.MinIO{Endpoint: other.URL, AccessKey: "root", SecretKey: credential.NewSecret("secret")}})
			_, err := baseClient(s).AssumeRole(t.Context(), input(roleARN))
			wantError(t, err, 503, "ServiceUnavailable", test.message)
		})
	}
}
