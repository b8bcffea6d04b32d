// Command go is a driver of integration/sdks for the SDKs of Go. Its argument says which: go-v2, go-v1 or
// minio-go. It is started with the environment of a pod and with STS_ENDPOINT, the URL of the STS to ask. It
// writes the name and the version of the SDK, then reads commands from standard input, one per line, until it
// ends, and answers each with a line of JSON:
//
//	call    asks STS who it is, with a client that is kept
//	fresh   the same with all made for this call
//	region  the region that the SDK's own look-up in the metadata service finds
//
// It never writes a secret key or a session token.
package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"regexp"
	"runtime/debug"
)

// client is one SDK.
type client interface {
	// caller makes a session and a client with the SDK's defaults, and returns what asks STS who it is.
	caller(ctx context.Context) (caller, error)
	// region looks the region up. The error is errUnsupported where the SDK has no such look-up.
	region(ctx context.Context) (string, error)
	// code is the error code that err offers to programs; empty if it offers none.
	code(err error) string
}

// caller asks STS who it is, and tells the key that signed the request, empty if there was none.
type caller func(ctx context.Context) (arn, key string, err error)

var errUnsupported = errors.New("unsupported")

// clients are the SDKs by name, with the modules whose versions are told.
var clients = map[string]struct {
	client
	module string
}{
	"go-v2":    {goV2{}, "github.com/aws/aws-sdk-go-v2"},
	"go-v1":    {goV1{}, "github.com/aws/aws-sdk-go"},
	"minio-go": {minioGo{}, "github.com/minio/minio-go/v7"},
}

// answer is a line of output.
type answer struct {
	ARN    string `json:"arn,omitempty"`
	Key    string `json:"access_key_id,omitempty"`
	Region string `json:"region,omitempty"`
	Error  string `json:"error"`
	Code   string `json:"code,omitempty"`
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	err := run(ctx, os.Args[1:])
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "go driver:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) error {
	if len(args) != 1 || clients[args[0]].client == nil {
		return fmt.Errorf("want one of go-v2, go-v1 and minio-go as the only argument, not %q", args)
	}
	c := clients[args[0]]
	out := json.NewEncoder(os.Stdout)
	if err := out.Encode(map[string]string{"client": args[0], "version": version(c.module)}); err != nil {
		return err
	}
	var kept caller
	in := bufio.NewScanner(os.Stdin)
	for in.Scan() {
		if err := out.Encode(obey(ctx, c.client, &kept, in.Text())); err != nil {
			return err
		}
	}
	return in.Err()
}

// obey carries out one command. kept is the caller of "call", once it could be made.
func obey(ctx context.Context, c client, kept *caller, command string) answer {
	var a answer
	var err error
	switch command {
	case "call":
		if *kept == nil {
			*kept, err = c.caller(ctx)
		}
		if err == nil {
			a.ARN, a.Key, err = (*kept)(ctx)
		}
	case "fresh":
		var fresh caller
		if fresh, err = c.caller(ctx); err == nil {
			a.ARN, a.Key, err = fresh(ctx)
		}
	case "region":
		a.Region, err = c.region(ctx)
	default:
		err = fmt.Errorf("no such command: %s", command)
	}
	if err != nil {
		a.Error, a.Code = err.Error(), c.code(err)
	}
	return a
}

// version is that of a module that this program was built with.
func version(module string) string {
	if info, ok := debug.ReadBuildInfo(); ok {
		for _, dep := range info.Deps {
			if dep.Path == module {
				return dep.Version
			}
		}
	}
	return "unknown"
}

var credentialScope = regexp.MustCompile(`Credential=([^/]+)/`)

// keyOf returns the access key id of an Authorization header of signature version 4.
func keyOf(authorization string) string {
	if found := credentialScope.FindStringSubmatch(authorization); found != nil {
		return found[1]
	}
	return ""
}

// stsEndpoint is the STS to ask.
func stsEndpoint() string { return os.Getenv("STS_ENDPOINT") }
