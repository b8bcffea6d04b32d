//go:build unix

package stack

import (
	"context"
	"fmt"
	"strings"

	"github.com/aws/aws-sdk-go-v2/aws"
	awscredentials "github.com/aws/aws-sdk-go-v2/credentials"
	"github.com/aws/aws-sdk-go-v2/service/s3"

	"github.com/credence-iam/credence/broker/assume/ststest"
	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/integration/minio"
)

// RoleARN is the ARN of a role of the broker's account.
func RoleARN(role string) string { return "arn:aws:iam::" + Account + ":role/" + role }

// FillStore makes buckets in store, each with one object, and returns the configuration of an STS whose sessions open
// them. The role of a bucket's name may do everything in it. Other roles may do nothing.
func FillStore(ctx context.Context, store *minio.Server, buckets ...string) (*ststest.MinIO, error) {
	accessKey, secretKey := store.Root()
	root := s3.New(s3.Options{
		Region: Region, BaseEndpoint: aws.String(store.Endpoint()), UsePathStyle: true, HTTPClient: store.Client(),
		Credentials: awscredentials.NewStaticCredentialsProvider(accessKey, secretKey, ""),
	})
	policies := make(map[string]string)
	for _, bucket := range buckets {
		if _, err := root.CreateBucket(ctx, &s3.CreateBucketInput{Bucket: &bucket}); err != nil {
			return nil, fmt.Errorf("making bucket %s: %w", bucket, err)
		}
		key, body := "only-for-"+bucket+".txt", strings.NewReader("hello "+bucket+"\n")
		if _, err := root.PutObject(ctx, &s3.PutObjectInput{Bucket: &bucket, Key: &key, Body: body}); err != nil {
			return nil, fmt.Errorf("filling bucket %s: %w", bucket, err)
		}
		policies[RoleARN(bucket)] = fmt.Sprintf(`{"Version":"2012-10-17","Statement":[`+
			`{"Effect":"Allow","Action":["s3:*"],"Resource":["arn:aws:s3:::%[1]s","arn:aws:s3:::%[1]s/*"]}]}`, bucket)
	}
	return &ststest.MinIO{
		Endpoint: store.Endpoint(), AccessKey: accessKey, SecretKey: credential.NewSecret(secretKey), Policies: policies, Client: store.Client(),
	}, nil
}
