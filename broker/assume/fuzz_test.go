package assume_test

import (
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/credence-iam/credence/broker/assume"
	"github.com/credence-iam/credence/broker/credential"
)

// FuzzAnswer: any response gives a complete session or an error, and the error has no secret.
func FuzzAnswer(f *testing.F) {
	const planted, token = "planted-secret", "planted-token"
	for _, body := range []string{
		goodResponse, "", "<", "\x00\x01 planted-secret", "<html><body>planted-secret", `{"SecretAccessKey":"planted-secret"}`,
		goodResponse[:len(goodResponse)/2],
		strings.Replace(goodResponse, "2099", "1999", 1),
		strings.Replace(goodResponse, "2099-01-01T00:00:00Z", "planted-secret", 1),
		strings.Replace(goodResponse, "2099-01-01T00:00:00Z", "99999999999999", 1),
		strings.Replace(goodResponse, "AccessKeyId", "planted-secret", 1),
		strings.Replace(goodResponse, "<Credentials>", "&planted-secret;<Credentials>", 1),
		strings.Replace(goodResponse, "<SessionToken>planted-token</SessionToken>", "<SessionToken/>", 1),
		`<?xml version="1.0" encoding="planted-secret"?>` + goodResponse,
		`<!DOCTYPE a [<!ENTITY b "planted-secret">]>` + goodResponse,
		`<ErrorResponse><Error><Type>Sender</Type><Code>AccessDenied</Code><Message>no</Message></Error></ErrorResponse>`,
		`<ErrorResponse><Error><Code>ValidationError</Code><Message>too long</Message></Error></ErrorResponse>`,
		`<ErrorResponse><Error><Code>ExpiredTokenException</Code></Error></ErrorResponse>` + planted,
		`<ErrorResponse><Error><Code>PackedPolicyTooLarge</Code><Message/></Error><planted-secret></ErrorResponse>`,
	} {
		for _, status := range []uint16{200, 204, 301, 400, 403, 429, 503} {
			f.Add(status, "text/xml", "", []byte(body))
		}
	}
	f.Add(uint16(200), "application/json", "Wed, 25 Nov 2026 13:00:00 GMT", []byte(goodResponse))
	f.Add(uint16(403), "", "not a date", []byte(goodResponse))

	var answer atomic.Pointer[http.HandlerFunc]
	// isolate does not work here, because the environment of a fuzz test is set once, before its body runs.
	for _, variable := range os.Environ() {
		if name, _, _ := strings.Cut(variable, "="); strings.HasPrefix(name, "AWS_") {
			f.Setenv(name, "")
		}
	}
	f.Setenv("AWS_ACCESS_KEY_ID", "AKIAEXAMPLE")
	f.Setenv("AWS_SECRET_ACCESS_KEY", "own-secret")
	f.Setenv("AWS_CONFIG_FILE", os.DevNull)
	f.Setenv("AWS_SHARED_CREDENTIALS_FILE", os.DevNull)
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { (*answer.Load())(w, r) }))
	f.Cleanup(server.Close)
	sts, err := assume.New(f.Context(), assume.Config{Endpoint: server.URL, Region: "eu-central-1"}) // one: each has its connections
	if err != nil {
		f.Fatal(err)
	}

	f.Fuzz(func(t *testing.T, status uint16, contentType, date string, body []byte) {
		if status < 200 || status > 999 {
			t.Skip("net/http sends no such status as an answer")
		}
		handler := http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", contentType)
			if date != "" {
				w.Header().Set("Date", date)
			}
			w.WriteHeader(int(status))
			_, _ = w.Write(body)
		})
		answer.Store(&handler)
		cred, err := sts.Credential(t.Context(), grant(t, nil))
		if err == nil {
			if !cred.Valid(time.Now()) || cred.Issued.IsZero() || cred.Duration() > time.Hour+assume.MaxSkew {
				t.Errorf("got %s, issued %v", cred, cred.Issued)
			}
			return
		}
		e, ok := errors.AsType[*credential.Error](err)
		if !ok || e.Kind == nil || e.Reason == "" || e.Message == "" || cred != (credential.Credential{}) {
			t.Fatalf("got %s, %#v", cred, err)
		}
		if len(e.Message) > 2000 || len(err.Error()) > 4000 {
			t.Errorf("the message has %d bytes, with its cause %d", len(e.Message), len(err.Error()))
		}
		// The message of an AWS error document is passed on. AWS writes no secrets there.
		if strings.Contains(strings.ToLower(string(body)), "<error>") {
			return
		}
		for _, form := range []string{"%v", "%+v", "%#v", "%q"} {
			for _, secret := range []string{planted, token} {
				if strings.Contains(fmt.Sprintf(form, err), secret) {
					t.Errorf("the error has a secret: %v", err)
				}
			}
		}
	})
}
