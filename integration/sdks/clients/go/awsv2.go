package main

import (
	"context"
	"errors"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/config"
	"github.com/aws/aws-sdk-go-v2/service/sts"
	"github.com/aws/smithy-go/middleware"
	smithyhttp "github.com/aws/smithy-go/transport/http"
)

// goV2 is the AWS SDK for Go v2.
type goV2 struct{}

func (goV2) caller(ctx context.Context) (caller, error) {
	cfg, err := config.LoadDefaultConfig(ctx)
	if err != nil {
		return nil, err
	}
	return func(ctx context.Context) (arn, key string, err error) {
		client := sts.NewFromConfig(cfg, func(o *sts.Options) {
			o.BaseEndpoint = aws.String(stsEndpoint())
			o.APIOptions = append(o.APIOptions, storeKey(&key))
		})
		out, err := client.GetCallerIdentity(ctx, &sts.GetCallerIdentityInput{})
		if err != nil {
			return "", key, err
		}
		return aws.ToString(out.Arn), key, nil
	}, nil
}

// storeKey returns a middleware that stores the key of a signed request.
func storeKey(key *string) func(*middleware.Stack) error {
	return func(stack *middleware.Stack) error {
		return stack.Deserialize.Add(middleware.DeserializeMiddlewareFunc("StoreKey", func(
			ctx context.Context, in middleware.DeserializeInput, next middleware.DeserializeHandler,
		) (middleware.DeserializeOutput, middleware.Metadata, error) {
			if request, ok := in.Request.(*smithyhttp.Request); ok {
				*key = keyOf(request.Header.Get("Authorization"))
			}
			return next.HandleDeserialize(ctx, in)
		}), middleware.Before)
	}
}

// region needs this option: without it the SDK looks nothing up.
func (goV2) region(ctx context.Context) (string, error) {
	cfg, err := config.LoadDefaultConfig(ctx, config.WithEC2IMDSRegion())
	if err != nil {
		return "", err
	}
	if cfg.Region == "" {
		return "", errors.New("no region was found")
	}
	return cfg.Region, nil
}
