package sidecar_test

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"time"

	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/broker/policy"
	"github.com/credence-iam/credence/sidecar"
	"github.com/credence-iam/credence/sidecar/contract"
)

// A sidecar serves the session of its source to the SDKs in the pod.
func Example() {
	s := must(sidecar.New(sidecar.Config{
		Source:        cart{}, // in a pod: a client of the broker
		Authorization: "the-pods-uid",
		Metadata:      policy.MetadataV2,
	}))
	listener := must(net.Listen("tcp", "127.0.0.1:0"))
	ctx, stop := context.WithCancel(context.Background())
	defer stop()
	go func() { _ = s.Run(ctx, listener) }()

	// SDKs get the URL and the header from the environment variables AWS_CONTAINER_CREDENTIALS_FULL_URI and
	// AWS_CONTAINER_AUTHORIZATION_TOKEN.
	url := "http://" + listener.Addr().String() + contract.CredentialsPath
	request := must(http.NewRequestWithContext(ctx, http.MethodGet, url, http.NoBody))
	request.Header.Set("Authorization", "the-pods-uid")
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		panic(err)
	}
	defer response.Body.Close()
	var credentials struct{ AccessKeyID, RoleArn string }
	err = json.NewDecoder(response.Body).Decode(&credentials)
	fmt.Println(credentials, err)
	// Output: {ASIAEXAMPLE arn:aws:iam::123456789012:role/cart} <nil>
}

// cart is a source of sessions of the role cart.
type cart struct{}

func (cart) Credentials(context.Context) (credential.Lease, error) {
	return credential.Lease{
		Credential: credential.Credential{
			AccessKeyID: "ASIAEXAMPLE", SecretAccessKey: credential.NewSecret("secret"), SessionToken: credential.NewSecret("token"),
			Issued: time.Now(), Expiration: time.Now().Add(time.Hour),
		},
		Role: must(credential.ParseRoleARN("arn:aws:iam::123456789012:role/cart")), RefreshAfter: 27 * time.Minute,
	}, nil
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}
