// Command go is a script of integration/sdks for the SDKs of Go. Its argument chooses one: go-v2, go-v1 or
// minio-go. It needs the environment of a pod, and the URL of STS in STS_ENDPOINT. It writes the name and the
// version of the SDK. Then it reads commands from standard input, one per line, and responds to each with a line
// of JSON:
//
//	call    calls GetCallerIdentity, always with the same session and client
//	fresh   calls GetCallerIdentity with a new session and client
//	region  looks the region up in the metadata service, by the SDK's own means
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
	// caller makes a session and a client with the SDK's defaults.
	caller(ctx context.Context) (caller, error)
	// region looks the region up. The error is errUnsupported if the SDK cannot.
	region(ctx context.Context) (string, error)
}

// caller calls GetCallerIdentity. key is the key that signed the request, or empty.
type caller func(ctx context.Context) (arn, key string, err error)

var errUnsupported = errors.New("unsupported")

// clients are the SDKs by name, with the module whose version is written.
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
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	err := run(ctx, os.Args[1:])
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "go client:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) error {
	if len(args) != 1 || clients[args[0]].client == nil {
		return fmt.Errorf("unexpected arguments %q; want one of go-v2, go-v1 and minio-go", args)
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

// obey runs one command. kept is the caller of "call".
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
		err = fmt.Errorf("unknown command %q", command)
	}
	if err != nil {
		a.Error = err.Error() // it has the code
	}
	return a
}

// version returns the version of a module that this program was built with.
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

// keyOf returns the access key ID in an Authorization header of signature version 4.
func keyOf(authorization string) string {
	if found := credentialScope.FindStringSubmatch(authorization); found != nil {
		return found[1]
	}
	return ""
}

func stsEndpoint() string { return os.Getenv("STS_ENDPOINT") }
