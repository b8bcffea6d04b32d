package main

import (
	"bufio"
	"context"
	"encoding/json"
	"io"
	"strings"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/credentials"
	"github.com/aws/aws-sdk-go-v2/service/sts"

	"github.com/credence-iam/credence/broker/assume/ststest"
)

const roleARN = "arn:aws:iam::210987654321:role/demo"

func TestRun(t *testing.T) {
	keys := map[string]string{"AWS_ACCESS_KEY_ID": "AKIAEXAMPLE000000000", "AWS_SECRET_ACCESS_KEY": strings.Repeat("s", 40)}
	ctx, cancel := context.WithCancel(t.Context())
	out, in := io.Pipe()
	ended := make(chan error)
	go func() {
		ended <- run(ctx, []string{"-account=210987654321", "-session-life=20m"}, func(name string) string { return keys[name] }, in)
	}()
	lines := bufio.NewScanner(out)
	lines.Scan()
	url, ok := strings.CutPrefix(lines.Text(), "listening on ")
	if !ok {
		t.Fatalf("the first line is %q", lines.Text())
	}
	calls := make(chan ststest.Call, 1)
	go func() {
		lines.Scan()
		var call ststest.Call
		if strings.Contains(lines.Text(), keys["AWS_SECRET_ACCESS_KEY"]) || json.Unmarshal(lines.Bytes(), &call) != nil {
			t.Error("the second line is no call, or has a secret")
		}
		calls <- call
	}()
	session, err := sts.New(sts.Options{
		BaseEndpoint: &url, Region: "eu-central-1",
		Credentials: credentials.NewStaticCredentialsProvider(keys["AWS_ACCESS_KEY_ID"], keys["AWS_SECRET_ACCESS_KEY"], ""),
	}).AssumeRole(t.Context(), &sts.AssumeRoleInput{RoleArn: aws.String(roleARN), RoleSessionName: aws.String("pod-1")})
	if err != nil {
		t.Fatal(err)
	}
	call := <-calls
	if call.Action != "AssumeRole" || call.RoleARN != roleARN || call.IssuedAccessKeyID != *session.Credentials.AccessKeyId {
		t.Errorf("the output has the call %+v", call)
	}
	// The expiration is cut to seconds.
	if life := session.Credentials.Expiration.Sub(call.Time); life > 20*time.Minute || life < 10*time.Minute {
		t.Errorf("the session lasts %v, want the 20 minutes of -session-life", life)
	}
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
	if err := run(t.Context(), nil, func(string) string { return "" }, io.Discard); err == nil || !strings.Contains(err.Error(), "AWS_ACCESS_KEY_ID") {
		t.Errorf("without keys: %v", err)
	}
}
