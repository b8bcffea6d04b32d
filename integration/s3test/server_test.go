package s3test_test

import (
	"bytes"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	v4 "github.com/aws/aws-sdk-go-v2/aws/signer/v4"
	awshttp "github.com/aws/aws-sdk-go-v2/aws/transport/http"
	"github.com/aws/aws-sdk-go-v2/credentials"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	"github.com/aws/aws-sdk-go-v2/service/sts"
	"github.com/aws/smithy-go"

	"github.com/credence-iam/credence/broker/assume/ststest"
	"github.com/credence-iam/credence/integration/s3test"
)

const (
	region  = "eu-central-1"
	account = "arn:aws:iam::123456789012:role/"
)

// start starts an STS and an S3 with the buckets "shelf" and "other". Sessions that are requested for the minimum of 15
// minutes are expired from the beginning.
func start(t *testing.T) (*ststest.Server, *s3test.Server) {
	t.Helper()
	doubleSTS, err := ststest.Start(t.Context(), ststest.Config{SessionDuration: func(requested time.Duration) time.Duration {
		if requested == 15*time.Minute {
			return -time.Minute
		}
		return requested
	}})
	if err != nil {
		t.Fatal(err)
	}
	l, err := new(net.ListenConfig).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	return doubleSTS, s3test.Start(t.Context(), l, doubleSTS, "shelf", "other")
}

// session returns credentials of a role.
func session(t *testing.T, server *ststest.Server, role string, seconds int32) aws.Credentials {
	t.Helper()
	id, secret := server.Keys()
	out, err := sts.New(sts.Options{
		BaseEndpoint: aws.String(server.URL()), Region: region,
		Credentials: credentials.NewStaticCredentialsProvider(id, secret.Reveal(), ""),
	}).AssumeRole(t.Context(), &sts.AssumeRoleInput{RoleArn: &role, RoleSessionName: aws.String("pod"), DurationSeconds: &seconds})
	if err != nil {
		t.Fatal(err)
	}
	c := out.Credentials
	return aws.Credentials{AccessKeyID: *c.AccessKeyId, SecretAccessKey: *c.SecretAccessKey, SessionToken: *c.SessionToken}
}

// client is an SDK for Go with these credentials.
func client(server *s3test.Server, c aws.Credentials, change ...func(*s3.Options)) *s3.Client {
	return s3.New(s3.Options{
		BaseEndpoint: aws.String(server.URL()), Region: region, UsePathStyle: true, Retryer: aws.NopRetryer{},
		// The defaults of an SDK that loads its configuration.
		RequestChecksumCalculation: aws.RequestChecksumCalculationWhenSupported,
		ResponseChecksumValidation: aws.ResponseChecksumValidationWhenSupported,
		Credentials:                credentials.NewStaticCredentialsProvider(c.AccessKeyID, c.SecretAccessKey, c.SessionToken),
	}, change...)
}

const text = "the content of an object\n"

// keys have characters that signatures and URLs encode.
var keys = []string{"a b+c=d/ü~.txt", "object"}

func TestGoSDK(t *testing.T) {
	server, store := start(t)
	c := client(store, session(t, server, account+"shelf", 3600))
	for _, key := range keys {
		if _, err := c.PutObject(t.Context(), &s3.PutObjectInput{Bucket: aws.String("shelf"), Key: &key, Body: strings.NewReader(text)}); err != nil {
			t.Fatal(err)
		}
		out, err := c.GetObject(t.Context(), &s3.GetObjectInput{Bucket: aws.String("shelf"), Key: &key})
		if err != nil {
			t.Fatal(err)
		}
		if body, err := io.ReadAll(out.Body); string(body) != text { // the SDK verifies the checksum
			t.Errorf("got %q (%v)", body, err)
		}
		if aws.ToString(out.ChecksumCRC32) == "" {
			t.Error("the response has no checksum")
		}
		head, err := c.HeadObject(t.Context(), &s3.HeadObjectInput{Bucket: aws.String("shelf"), Key: &key})
		if err != nil || *head.ContentLength != int64(len(text)) || *head.ETag != *out.ETag {
			t.Errorf("HeadObject: %+v, %v", head, err)
		}
		part, err := c.GetObject(t.Context(), &s3.GetObjectInput{Bucket: aws.String("shelf"), Key: &key, Range: aws.String("bytes=4-10")})
		if err != nil {
			t.Fatal(err)
		}
		if body, err := io.ReadAll(part.Body); string(body) != "content" {
			t.Errorf("got %q of a range (%v)", body, err)
		}
	}
	for prefix, want := range map[string][]string{"": keys, "obj": keys[1:], "none": nil} {
		list, err := c.ListObjectsV2(t.Context(), &s3.ListObjectsV2Input{Bucket: aws.String("shelf"), Prefix: &prefix})
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		for _, o := range list.Contents {
			got = append(got, *o.Key)
			if *o.Size != int64(len(text)) || time.Since(*o.LastModified).Abs() > time.Hour {
				t.Errorf("object %s has %d bytes, modified %v", *o.Key, *o.Size, o.LastModified)
			}
		}
		if strings.Join(got, "|") != strings.Join(want, "|") || *list.KeyCount != int32(len(want)) || *list.IsTruncated {
			t.Errorf("with prefix %q the list has %q, want %q", prefix, got, want)
		}
	}
	if _, err := c.HeadBucket(t.Context(), &s3.HeadBucketInput{Bucket: aws.String("shelf")}); err != nil {
		t.Error(err)
	}
}

func TestRefusals(t *testing.T) {
	server, store := start(t)
	valid := session(t, server, account+"shelf", 3600)
	foreign := session(t, server, "arn:aws:iam::210987654321:role/shelf", 3600)
	expired := session(t, server, account+"shelf", 900)
	id, secret := server.Keys()
	list := func(bucket string) func(*s3.Client) error {
		return func(c *s3.Client) error {
			_, err := c.ListObjectsV2(t.Context(), &s3.ListObjectsV2Input{Bucket: &bucket})
			return err
		}
	}
	with := func(change func(*aws.Credentials)) aws.Credentials {
		c := valid
		change(&c)
		return c
	}
	tampered := func(change func(*http.Request)) func(*s3.Client) error {
		return func(c *s3.Client) error {
			_, err := client(store, valid, func(o *s3.Options) {
				o.HTTPClient = doer(func(r *http.Request) (*http.Response, error) {
					change(r)
					return http.DefaultClient.Do(r)
				})
			}).PutObject(t.Context(), &s3.PutObjectInput{Bucket: aws.String("shelf"), Key: aws.String("k"), Body: strings.NewReader(text)})
			return err
		}
	}
	for name, tt := range map[string]struct {
		credentials aws.Credentials
		call        func(*s3.Client) error
		status      int
		code        string
	}{
		"wrong secret":           {with(func(c *aws.Credentials) { c.SecretAccessKey += "x" }), list("shelf"), 403, "SignatureDoesNotMatch"},
		"unknown key":            {with(func(c *aws.Credentials) { c.AccessKeyID = "ASIAUNKNOWN000000000" }), list("shelf"), 403, "InvalidAccessKeyId"},
		"no token":               {with(func(c *aws.Credentials) { c.SessionToken = "" }), list("shelf"), 403, "InvalidAccessKeyId"},
		"token of another":       {with(func(c *aws.Credentials) { c.SessionToken = foreign.SessionToken }), list("shelf"), 403, "InvalidAccessKeyId"},
		"expired session":        {expired, list("shelf"), 400, "ExpiredToken"},
		"another role's bucket":  {valid, list("other"), 403, "AccessDenied"},
		"another account's role": {foreign, list("shelf"), 403, "AccessDenied"},
		"a user":                 {aws.Credentials{AccessKeyID: id, SecretAccessKey: secret.Reveal()}, list("shelf"), 403, "AccessDenied"},
		"no such bucket":         {valid, list("none"), 404, "NoSuchBucket"},
		"no such key": {valid, func(c *s3.Client) error {
			_, err := c.GetObject(t.Context(), &s3.GetObjectInput{Bucket: aws.String("shelf"), Key: aws.String("none")})
			return err
		}, 404, "NoSuchKey"},
		"a put in another bucket": {valid, func(c *s3.Client) error {
			_, err := c.PutObject(t.Context(), &s3.PutObjectInput{Bucket: aws.String("other"), Key: aws.String("k"), Body: strings.NewReader(text)})
			return err
		}, 403, "AccessDenied"},
		"too large": {valid, func(c *s3.Client) error {
			_, err := c.PutObject(t.Context(), &s3.PutObjectInput{Bucket: aws.String("shelf"), Key: aws.String("k"), Body: bytes.NewReader(make([]byte, 1<<20+1))})
			return err
		}, 400, "EntityTooLarge"},
		"a long list": {valid, func(c *s3.Client) error {
			_, err := c.ListObjectsV2(t.Context(), &s3.ListObjectsV2Input{Bucket: aws.String("shelf"), Delimiter: aws.String("/")})
			return err
		}, 501, "NotImplemented"},
		"a deletion": {valid, func(c *s3.Client) error {
			_, err := c.DeleteObject(t.Context(), &s3.DeleteObjectInput{Bucket: aws.String("shelf"), Key: aws.String("k")})
			return err
		}, 501, "NotImplemented"},
		"unsigned":     {valid, tampered(func(r *http.Request) { r.Header.Del("Authorization") }), 403, "AccessDenied"},
		"half signed":  {valid, tampered(func(r *http.Request) { r.Header.Set("Authorization", "AWS4-HMAC-SHA256 Credential=a") }), 400, "AuthorizationHeaderMalformed"},
		"another key":  {valid, tampered(func(r *http.Request) { r.URL.Path += "x" }), 403, "SignatureDoesNotMatch"},
		"another body": {valid, tampered(func(r *http.Request) { r.Body = io.NopCloser(strings.NewReader(strings.ToUpper(text))) }), 400, "XAmzContentSHA256Mismatch"},
		"another hash": {valid, tampered(func(r *http.Request) { r.Header.Set("X-Amz-Content-Sha256", "UNSIGNED-PAYLOAD") }), 403, "SignatureDoesNotMatch"},
	} {
		t.Run(name, func(t *testing.T) {
			err := tt.call(client(store, tt.credentials))
			response, ok := errors.AsType[*awshttp.ResponseError](err)
			api, ok2 := errors.AsType[smithy.APIError](err)
			if !ok || !ok2 || response.HTTPStatusCode() != tt.status || api.ErrorCode() != tt.code || api.ErrorMessage() == "" {
				t.Fatalf("got %v, want %d %s", err, tt.status, tt.code)
			}
			if strings.Contains(err.Error(), valid.SecretAccessKey) || strings.Contains(err.Error(), valid.SessionToken) {
				t.Error("the error has a secret")
			}
		})
	}
	if got, err := client(store, valid).ListObjectsV2(t.Context(), &s3.ListObjectsV2Input{Bucket: aws.String("shelf")}); err != nil || len(got.Contents) > 0 {
		t.Errorf("refused requests stored %+v (%v)", got, err)
	}
}

type doer func(*http.Request) (*http.Response, error)

func (d doer) Do(r *http.Request) (*http.Response, error) { return d(r) }

// TestSignedChunks uploads in signed chunks, as minio-go does over plain HTTP.
func TestSignedChunks(t *testing.T) {
	server, store := start(t)
	c := session(t, server, account+"shelf", 3600)
	const (
		hash      = "STREAMING-AWS4-HMAC-SHA256-PAYLOAD"
		signature = ";chunk-signature=" // and 64 digits, which nothing verifies
	)
	for body, want := range map[string]int{
		"5" + signature + "a\r\nhello\r\n6" + signature + "b\r\n there\r\n0" + signature + "c\r\n\r\n": http.StatusOK,
		"5" + signature + "a\r\nhel": http.StatusBadRequest, // cut
		"hello":                      http.StatusBadRequest,
	} {
		r, err := http.NewRequestWithContext(t.Context(), http.MethodPut, store.URL()+"/shelf/chunks", strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		r.Header.Set("X-Amz-Content-Sha256", hash)
		r.Header.Set("Content-Encoding", "aws-chunked")
		if err := v4.NewSigner().SignHTTP(t.Context(), c, r, hash, "s3", region, time.Now()); err != nil {
			t.Fatal(err)
		}
		response, err := http.DefaultClient.Do(r)
		if err != nil {
			t.Fatal(err)
		}
		if err := response.Body.Close(); err != nil || response.StatusCode != want {
			t.Errorf("%q: got %s (%v), want %d", body, response.Status, err, want)
		}
	}
	out, err := client(store, c).GetObject(t.Context(), &s3.GetObjectInput{Bucket: aws.String("shelf"), Key: aws.String("chunks")})
	if err != nil {
		t.Fatal(err)
	}
	if body, err := io.ReadAll(out.Body); string(body) != "hello there" {
		t.Errorf("got %q (%v)", body, err)
	}
}

// TestInstalledClients runs the AWS CLI and botocore, which the CLI uses.
func TestInstalledClients(t *testing.T) {
	server, store := start(t)
	c := session(t, server, account+"shelf", 3600)
	const botocore = `
import sys, botocore.session
from botocore.exceptions import ClientError
s3 = botocore.session.get_session().create_client("s3")
key = "from botocore+ü"
s3.put_object(Bucket="shelf", Key=key, Body=sys.stdin.buffer.read())
print(s3.get_object(Bucket="shelf", Key=key)["Body"].read().decode(), end="")
print(key in [o["Key"] for o in s3.list_objects_v2(Bucket="shelf")["Contents"]])
try: s3.get_object(Bucket="other", Key=key)
except ClientError as e: print(e.response["Error"]["Code"])
`
	for name, tt := range map[string]struct {
		runs, command []string
		want          string
	}{
		"AWS CLI": {
			[]string{"aws", "--version"},
			[]string{"sh", "-c", `aws s3 cp - s3://shelf/cli && aws s3 cp s3://shelf/cli - && aws s3api list-objects-v2 --bucket shelf --prefix cli --query 'Contents[].Key' --output text; aws s3api head-bucket --bucket other 2>&1 | grep -o Forbidden`},
			text + "cli\nForbidden\n",
		},
		"botocore": {[]string{"python3", "-c", "import botocore"}, []string{"python3", "-c", botocore}, text + "True\nAccessDenied\n"},
	} {
		t.Run(name, func(t *testing.T) {
			if out, err := exec.CommandContext(t.Context(), tt.runs[0], tt.runs[1:]...).CombinedOutput(); err != nil {
				t.Skipf("%s is not installed: %v %s", name, err, out)
			}
			cmd := exec.CommandContext(t.Context(), tt.command[0], tt.command[1:]...)
			cmd.Stdin = strings.NewReader(text)
			cmd.Env = []string{
				"PATH=" + os.Getenv("PATH"), "HOME=" + t.TempDir(), "LANG=C.UTF-8", "AWS_DEFAULT_REGION=" + region, "AWS_MAX_ATTEMPTS=1",
				"AWS_ACCESS_KEY_ID=" + c.AccessKeyID, "AWS_SECRET_ACCESS_KEY=" + c.SecretAccessKey, "AWS_SESSION_TOKEN=" + c.SessionToken,
				"AWS_ENDPOINT_URL_S3=" + store.URL(), "AWS_ENDPOINT_URL=" + store.URL(),
			}
			out, err := cmd.CombinedOutput()
			if string(out) != tt.want {
				t.Errorf("got %q (%v), want %q", out, err, tt.want)
			}
		})
	}
}
