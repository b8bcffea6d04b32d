package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/xml"
	"fmt"
	"io"
	"net/http"
	"os"

	"github.com/minio/minio-go/v7/pkg/credentials"
	"github.com/minio/minio-go/v7/pkg/signer"
)

// minioGo is the MinIO client for Go. It cannot call GetCallerIdentity, so this signs a call with its keys.
//
// It does not read AWS_EC2_METADATA_SERVICE_ENDPOINT. A program has to pass the endpoint, and this does so if the
// pod's environment has no container credentials.
type minioGo struct{}

func (minioGo) caller(context.Context) (caller, error) {
	endpoint := ""
	if os.Getenv("AWS_CONTAINER_CREDENTIALS_FULL_URI") == "" {
		endpoint = os.Getenv("AWS_EC2_METADATA_SERVICE_ENDPOINT")
	}
	keys := credentials.NewIAM(endpoint)
	return func(ctx context.Context) (arn, key string, err error) {
		value, err := keys.GetWithContext(nil)
		if err != nil {
			return "", "", err
		}
		arn, err = callerIdentity(ctx, value)
		return arn, value.AccessKeyID, err
	}, nil
}

func callerIdentity(ctx context.Context, keys credentials.Value) (arn string, err error) {
	body := []byte("Action=GetCallerIdentity&Version=2011-06-15")
	request, err := http.NewRequestWithContext(ctx, http.MethodPost, stsEndpoint()+"/", bytes.NewReader(body))
	if err != nil {
		return "", err
	}
	sum := sha256.Sum256(body)
	request.Header.Set("Content-Type", "application/x-www-form-urlencoded; charset=utf-8")
	request.Header.Set("X-Amz-Security-Token", keys.SessionToken)
	request.Header.Set("X-Amz-Content-Sha256", hex.EncodeToString(sum[:])) // for the signer
	request = signer.SignV4STS(*request, keys.AccessKeyID, keys.SecretAccessKey, os.Getenv("AWS_REGION"))
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		return "", err
	}
	defer response.Body.Close()
	content, err := io.ReadAll(response.Body)
	if err != nil {
		return "", err
	}
	var identity struct {
		ARN   string `xml:"GetCallerIdentityResult>Arn"`
		Error struct{ Code, Message string }
	}
	if err := xml.Unmarshal(content, &identity); err != nil {
		return "", err
	}
	if response.StatusCode != http.StatusOK {
		return "", fmt.Errorf("%s: %s", identity.Error.Code, identity.Error.Message)
	}
	return identity.ARN, nil
}

func (minioGo) region(context.Context) (string, error) { return "", errUnsupported }
