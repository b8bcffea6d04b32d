package main

import (
	"bufio"
	"context"
	"encoding/json"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/sts"

	"github.com/credence-iam/credence/broker/assume/ststest"
)

const roleARN = "arn:aws:iam::123456789012:role/demo"

func env(pairs ...string) func(string) string {
	values := map[string]string{"AWS_ACCESS_KEY_ID": "AKIAEXAMPLE000000000", "AWS_SECRET_ACCESS_KEY": strings.Repeat("s", 40)}
	for i := 0; i < len(pairs); i += 2 {
		values[pairs[i]] = pairs[i+1]
	}
	return func(name string) string { return values[name] }
}

func TestRun(t *testing.T) {
	minio, err := ststest.Start(t.Context(), ststest.Config{})
	if err != nil {
		t.Fatal(err)
	}
	key, secret := minio.Keys()
	policies := filepath.Join(t.TempDir(), "policies.json")
	if err := os.WriteFile(policies, []byte(`{"`+roleARN+`":{"Version":"2012-10-17"}}`), 0o600); err != nil {
		t.Fatal(err)
	}

	ctx, stop := context.WithCancel(t.Context())
	reader, writer := io.Pipe()
	ended := make(chan error, 1)
	go func() {
		err := run(ctx, []string{"--session-life", "30s", "--minio-policies", policies},
			env("MINIO_ENDPOINT", minio.URL(), "MINIO_ROOT_USER", key, "MINIO_ROOT_PASSWORD", secret.Reveal()), writer)
		_ = writer.CloseWithError(err) // so that the read below returns if the start fails
		ended <- err
	}()
	out := bufio.NewReader(reader)
	first, err := out.ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	url, ok := strings.CutPrefix(strings.TrimSpace(first), "listening on ")
	if !ok {
		t.Fatalf("the first line is %q", first)
	}
	responses := make(chan *sts.AssumeRoleOutput, 1)
	go func() {
		response, err := client(url, env()("AWS_ACCESS_KEY_ID"), env()("AWS_SECRET_ACCESS_KEY"), http.DefaultClient).AssumeRole(ctx, &sts.AssumeRoleInput{RoleArn: aws.String(roleARN), RoleSessionName: aws.String("pod-1")})
		if err != nil {
			t.Error(err)
		}
		responses <- response
	}()
	line, err := out.ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	response := <-responses
	if response == nil {
		t.FailNow()
	}
	var call ststest.Call
	if err := json.Unmarshal([]byte(line), &call); err != nil {
		t.Fatalf("the second line is not JSON: %v", err)
	}
	if call.RoleARN != roleARN || call.IssuedAccessKeyID != *response.Credentials.AccessKeyId {
		t.Errorf("the line is %s", line)
	}
	if duration := response.Credentials.Expiration.Sub(call.Time); duration > 30*time.Second {
		t.Errorf("the session duration is %v, want at most 30s", duration)
	}
	if got := minio.Calls()[0]; got.Policy != `{"Version":"2012-10-17"}` || got.IssuedAccessKeyID != call.IssuedAccessKeyID {
		t.Errorf("MinIO got the call %+v", got)
	}
	stop()
	if err := <-ended; err != nil {
		t.Errorf("got %v", err)
	}
}

func TestRunRefuses(t *testing.T) {
	for name, test := range map[string]struct {
		args   []string
		getenv func(string) string
		want   string
	}{
		"no own credentials":    {nil, func(string) string { return "" }, "AWS_ACCESS_KEY_ID"},
		"account":               {[]string{"--account", "x"}, env(), "Account"},
		"address":               {[]string{"--listen", "127.0.0.1:http:x"}, env(), "--listen"},
		"policies without":      {[]string{"--minio-policies", "x"}, env(), "MINIO_ENDPOINT"},
		"policies missing":      {[]string{"--minio-policies", "does-not-exist"}, env("MINIO_ENDPOINT", "http://127.0.0.1:1"), "--minio-policies"},
		"MinIO without its key": {nil, env("MINIO_ENDPOINT", "http://127.0.0.1:1"), "MinIO.AccessKey"},
	} {
		t.Run(name, func(t *testing.T) {
			err := run(t.Context(), test.args, test.getenv, io.Discard)
			if err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("got %v, want an error that names %s", err, test.want)
			}
		})
	}
}
