//go:build unix

package minio_test

import (
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/credentials"
	"github.com/aws/aws-sdk-go-v2/service/s3"

	"github.com/credence-iam/credence/integration/minio"
	"github.com/credence-iam/credence/integration/process"
	"github.com/credence-iam/credence/integration/tools"
)

// TestOnlyTheRightSecretIsAccepted guards tests that show access to a bucket.
func TestOnlyTheRightSecretIsAccepted(t *testing.T) {
	if testing.Short() && !tools.Built(tools.MinIO) {
		t.Skip("-short, and minio is not built (go run ./integration/tools/install minio)")
	}
	run, err := process.Open(t.Context(), process.Config{Parent: t.TempDir(), Name: "minio"})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := run.Close(); err != nil {
			t.Error(err)
		}
	}()
	server, err := minio.Start(t.Context(), run, run.Loopback(), os.Stderr)
	if err != nil {
		t.Fatal(err)
	}
	access, secret := server.Root()
	create := func(secret string) error {
		_, err := s3.New(s3.Options{
			BaseEndpoint: aws.String(server.Endpoint()),
			Credentials:  credentials.NewStaticCredentialsProvider(access, secret, ""),
			Region:       "us-east-1",
			UsePathStyle: true,
		}).CreateBucket(t.Context(), &s3.CreateBucketInput{Bucket: aws.String("some-bucket")})
		return err
	}
	if create("wrong") == nil {
		t.Error("a wrong secret is accepted")
	}
	if err := create(secret); err != nil {
		t.Error(err)
	}
	if strings.Contains(fmt.Sprintf("%s %+v", server, server), secret) {
		t.Error("a log of the server has its secret")
	}
}
