// Command awsclient is an ordinary application: it uses the AWS SDK for Go v2 with its default
// configuration, and nothing of Credence. Tests and the demonstration run it with a pod's environment.
//
//	awsclient whoami               prints the caller's ARN
//	awsclient ls BUCKET            lists a bucket
//	awsclient put BUCKET KEY       stores standard input
//	awsclient get BUCKET KEY       prints an object
//	awsclient watch DURATION       calls GetCallerIdentity four times a second and prints each new
//	                               access key; fails at the first error
package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"os/signal"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/config"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	"github.com/aws/aws-sdk-go-v2/service/sts"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := run(ctx, os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "awsclient:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) error {
	cfg, err := config.LoadDefaultConfig(ctx)
	if err != nil {
		return err
	}
	// Stores outside AWS often have one host name for all buckets.
	store := s3.NewFromConfig(cfg, func(o *s3.Options) { o.UsePathStyle = true })
	switch {
	case len(args) == 1 && args[0] == "whoami":
		return whoami(ctx, cfg)
	case len(args) == 2 && args[0] == "ls":
		return list(ctx, store, args[1])
	case len(args) == 3 && args[0] == "put":
		body, err := io.ReadAll(os.Stdin)
		if err != nil {
			return err
		}
		_, err = store.PutObject(ctx, &s3.PutObjectInput{Bucket: &args[1], Key: &args[2], Body: bytes.NewReader(body)})
		return err
	case len(args) == 3 && args[0] == "get":
		out, err := store.GetObject(ctx, &s3.GetObjectInput{Bucket: &args[1], Key: &args[2]})
		if err != nil {
			return err
		}
		defer func() { _ = out.Body.Close() }()
		_, err = io.Copy(os.Stdout, out.Body)
		return err
	case len(args) == 2 && args[0] == "watch":
		d, err := time.ParseDuration(args[1])
		if err != nil {
			return err
		}
		return watch(ctx, cfg, d)
	}
	return fmt.Errorf("unknown command %q; want whoami, ls BUCKET, put BUCKET KEY, get BUCKET KEY or watch DURATION", args)
}

func whoami(ctx context.Context, cfg aws.Config) error {
	out, err := sts.NewFromConfig(cfg).GetCallerIdentity(ctx, &sts.GetCallerIdentityInput{})
	if err != nil {
		return err
	}
	fmt.Println(aws.ToString(out.Arn))
	return nil
}

func list(ctx context.Context, store *s3.Client, bucket string) error {
	pages := s3.NewListObjectsV2Paginator(store, &s3.ListObjectsV2Input{Bucket: &bucket})
	for pages.HasMorePages() {
		page, err := pages.NextPage(ctx)
		if err != nil {
			return err
		}
		for _, object := range page.Contents {
			fmt.Println(aws.ToString(object.Key))
		}
	}
	return nil
}

// watchPause is the time between two calls: short, so that a gap between two sessions is noticed.
const watchPause = 250 * time.Millisecond

func watch(ctx context.Context, cfg aws.Config, d time.Duration) error {
	client := sts.NewFromConfig(cfg)
	key := ""
	for end := time.Now().Add(d); time.Now().Before(end); time.Sleep(watchPause) {
		if _, err := client.GetCallerIdentity(ctx, &sts.GetCallerIdentityInput{}); err != nil {
			return err
		}
		keys, err := cfg.Credentials.Retrieve(ctx)
		if err != nil {
			return err
		}
		if keys.AccessKeyID != key {
			key = keys.AccessKeyID
			fmt.Println(key)
		}
	}
	return nil
}
