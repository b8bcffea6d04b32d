//go:build unix

package stack

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/aws/aws-sdk-go-v2/aws"
	awscredentials "github.com/aws/aws-sdk-go-v2/credentials"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/yaml"

	"github.com/credence-iam/credence/broker/assume/ststest"
	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/integration/minio"
)

// RoleARN is the ARN of a role of the broker's account.
func RoleARN(role string) string { return "arn:aws:iam::" + Account + ":role/" + role }

// FillStore makes buckets in store, each with one object, and returns the configuration of an STS whose sessions open
// them: the role of a bucket's name may do everything in it, and other roles may do nothing.
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

// Chart returns the folder of the chart, in the checkout around the working folder.
func Chart() (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", fmt.Errorf("finding the chart: %w", err)
	}
	for ; ; dir = filepath.Dir(dir) {
		path := filepath.Join(dir, "charts", "credence")
		if _, err := os.Stat(filepath.Join(path, "Chart.yaml")); err == nil {
			return path, nil
		}
		if dir == filepath.Dir(dir) {
			return "", errors.New("finding the chart: no charts/credence at or above the working folder; run this within the checkout")
		}
	}
}

// ChartMemory returns the memory limits of the broker and the webhook in the chart, in bytes.
func ChartMemory() (broker, webhook int64, err error) {
	chart, err := Chart()
	if err != nil {
		return 0, 0, err
	}
	text, err := os.ReadFile(filepath.Join(chart, "values.yaml"))
	if err != nil {
		return 0, 0, fmt.Errorf("reading the chart's values: %w", err)
	}
	type component struct {
		Resources corev1.ResourceRequirements `json:"resources"`
	}
	var values struct {
		Broker  component `json:"broker"`
		Webhook component `json:"webhook"`
	}
	if err := yaml.Unmarshal(text, &values); err != nil {
		return 0, 0, fmt.Errorf("decoding the chart's values: %w", err)
	}
	broker, webhook = values.Broker.Resources.Limits.Memory().Value(), values.Webhook.Resources.Limits.Memory().Value()
	if broker <= 0 || webhook <= 0 {
		return 0, 0, errors.New("the chart has no memory limit for the broker or the webhook")
	}
	return broker, webhook, nil
}
