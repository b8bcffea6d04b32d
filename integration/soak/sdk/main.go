// Command sdk is an application that uses the AWS SDK for Go v2 all the time, and never gives up. It knows nothing of
// Credence.
//
// Twice a second it gets its credentials as the SDK does before each request, and calls sts:GetCallerIdentity with them.
// It prints "calls N" from time to time, and a line for each error: "FAILED credentials" if the application has no valid
// credentials, and "FAILED network" if the service did not respond.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/aws/aws-sdk-go-v2/config"
	"github.com/aws/aws-sdk-go-v2/service/sts"
	"github.com/aws/smithy-go"
)

const (
	pause = 500 * time.Millisecond
	every = 10 // calls between two lines
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	cfg, err := config.LoadDefaultConfig(ctx)
	if err != nil {
		fmt.Fprintln(os.Stderr, "sdk:", err)
		os.Exit(1)
	}
	client := sts.NewFromConfig(cfg)
	for calls := 1; ctx.Err() == nil; calls++ {
		_, err := cfg.Credentials.Retrieve(ctx)
		kind := "credentials"
		if err == nil {
			_, err = client.GetCallerIdentity(ctx, &sts.GetCallerIdentityInput{})
			kind = kindOf(err)
		}
		if err != nil && ctx.Err() == nil {
			fmt.Println("FAILED", kind, strings.Join(strings.Fields(err.Error()), " "))
		}
		if calls%every == 0 {
			fmt.Println("calls", calls)
		}
		time.Sleep(pause)
	}
}

// kindOf says whose failure an error of a call is. A service that responds with an error code does not accept the
// credentials: no other error is possible for this call.
func kindOf(err error) string {
	if _, ok := errors.AsType[smithy.APIError](err); ok || err != nil && strings.Contains(err.Error(), "get credentials") {
		return "credentials"
	}
	return "network"
}
