package main

import (
	"context"

	"github.com/aws/aws-sdk-go/aws"
	"github.com/aws/aws-sdk-go/aws/ec2metadata"
	"github.com/aws/aws-sdk-go/aws/session"
	"github.com/aws/aws-sdk-go/service/sts"
)

// goV1 is the AWS SDK for Go, version 1, which is no longer maintained but widely used.
type goV1 struct{}

func (goV1) caller(context.Context) (caller, error) {
	s, err := session.NewSession()
	if err != nil {
		return nil, err
	}
	client := sts.New(s, aws.NewConfig().WithEndpoint(stsEndpoint()))
	return func(ctx context.Context) (arn, key string, err error) {
		request, out := client.GetCallerIdentityRequest(&sts.GetCallerIdentityInput{})
		request.SetContext(ctx)
		err = request.Send()
		key = keyOf(request.HTTPRequest.Header.Get("Authorization"))
		if err != nil {
			return "", key, err
		}
		return aws.StringValue(out.Arn), key, nil
	}, nil
}

func (goV1) region(ctx context.Context) (string, error) {
	s, err := session.NewSession()
	if err != nil {
		return "", err
	}
	return ec2metadata.New(s).RegionWithContext(ctx)
}
