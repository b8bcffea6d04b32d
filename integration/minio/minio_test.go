//go:build unix

package minio_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/credentials"
	"github.com/aws/aws-sdk-go-v2/service/s3"

	"github.com/credence-iam/credence/integration/minio"
	"github.com/credence-iam/credence/integration/process"
	"github.com/credence-iam/credence/integration/tools"
)

// start starts MinIO in a run that ends with the test.
func start(t *testing.T) (*process.Run, *minio.Server) {
	t.Helper()
	if testing.Short() && !tools.Built(tools.MinIO) {
		t.Skip("-short, and minio is not built (go run ./integration/tools/install minio)")
	}
	run, err := process.Open(t.Context(), process.Config{
		Parent: t.TempDir(),
		Name:   "minio",
		Report: func(err error) { t.Errorf("reported: %v", err) },
	})
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
	return run, server
}

func TestRootUsesS3AndItsKeyIsNowhere(t *testing.T) {
	run, server := start(t)
	access, secret := server.Root()
	bucket := aws.String("some-bucket")
	withSecret := func(secret string) *s3.Client {
		return s3.New(s3.Options{
			BaseEndpoint: aws.String(server.Endpoint()),
			Credentials:  credentials.NewStaticCredentialsProvider(access, secret, ""),
			Region:       "us-east-1",
			UsePathStyle: true,
		})
	}
	if _, err := withSecret(secret).CreateBucket(t.Context(), &s3.CreateBucketInput{Bucket: bucket}); err != nil {
		t.Fatal(err)
	}
	if _, err := withSecret(secret).HeadBucket(t.Context(), &s3.HeadBucketInput{Bucket: bucket}); err != nil {
		t.Error(err)
	}
	if _, err := withSecret("wrong").HeadBucket(t.Context(), &s3.HeadBucketInput{Bucket: bucket}); err == nil {
		t.Error("a wrong secret was accepted")
	}

	logs, err := filepath.Glob(filepath.Join(run.Logs(), "*"))
	if err != nil || len(logs) != 1 {
		t.Fatalf("logs: %v, %v", logs, err)
	}
	log, err := os.ReadFile(logs[0])
	if err != nil {
		t.Fatal(err)
	}
	for _, text := range []string{string(log), fmt.Sprint(server), fmt.Sprintf("%+v", server)} {
		if strings.Contains(text, secret) {
			t.Error("the secret key is in a log")
		}
	}
}
