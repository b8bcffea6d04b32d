package assume_test

import (
	"errors"
	"fmt"
	"net/http/httptest"
	"regexp"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/credence-iam/credence/broker/assume"
	"github.com/credence-iam/credence/broker/assume/ststest"
	"github.com/credence-iam/credence/broker/credential"
)

var secretElements = regexp.MustCompile(`<(?:SecretAccessKey|SessionToken)>([^<]+)`)

// TestGarbage: an invalid response gives no session, may be retried by the caller, and is not passed on.
func TestGarbage(t *testing.T) {
	for name, fault := range map[string]*ststest.Fault{
		"a page":                 ststest.HTMLPage(),
		"cut":                    ststest.TruncatedXML(),
		"connection lost":        ststest.ShortBody(),
		"empty":                  ststest.EmptyBody(),
		"JSON":                   ststest.WrongContentType(),
		"huge":                   ststest.HugeBody(),
		"no result":              ststest.WithoutElement("AssumeRoleResult"),
		"no credentials":         ststest.WithoutElement("Credentials"),
		"no key id":              ststest.WithoutElement("AccessKeyId"),
		"no secret":              ststest.WithoutElement("SecretAccessKey"),
		"no token":               ststest.WithoutElement("SessionToken"),
		"no expiration":          ststest.WithoutElement("Expiration"),
		"empty token":            ststest.WithElement("SessionToken", ""),
		"expires tomorrow":       ststest.WithElement("Expiration", "tomorrow"),
		"expires in seconds":     ststest.WithElement("Expiration", "1767225600"),
		"year 0":                 ststest.WithElement("Expiration", "0000-01-01T00:00:00Z"),
		"expired":                ststest.WithElement("Expiration", "1999-12-31T23:59:59Z"),
		"bad gateway":            ststest.StatusPage(502),
		"forbidden by a proxy":   ststest.StatusPage(403),
		"bad request of a proxy": ststest.StatusPage(400),
		"moved":                  ststest.StatusPage(301),
		"created":                ststest.StatusPage(201),
		"no content type":        {Garble: func(a *ststest.Answer) { a.Header.Del("Content-Type"); a.Body = a.Body[10:] }},
		"secret as a name": {Garble: func(a *ststest.Answer) {
			secret := secretElements.FindSubmatch(a.Body)[1]
			a.Body = []byte("<AssumeRoleResponse><" + strings.Trim(string(secret), "=") + "></AssumeRoleResponse>")
		}},
		"secret as the time": {Garble: func(a *ststest.Answer) {
			secret := secretElements.FindSubmatch(a.Body)[1]
			a.Body = regexp.MustCompile(`<Expiration>.*</Expiration>`).ReplaceAllLiteral(a.Body, []byte("<Expiration>"+string(secret)+"</Expiration>"))
		}},
		"secret as an entity": {Garble: func(a *ststest.Answer) {
			secret := secretElements.FindSubmatch(a.Body)[1]
			a.Status, a.Body = 400, []byte("<ErrorResponse><Error><Code>&"+strings.NewReplacer("/", "", "+", "", "=", "").Replace(string(secret))+";</Code></Error></ErrorResponse>")
		}},
	} {
		t.Run(name, func(t *testing.T) {
			server, err := ststest.New(ststest.Config{Default: ststest.Behavior{Fault: fault}})
			if err != nil {
				t.Fatal(err)
			}
			id, own := server.Keys()
			isolate(t, id, own.Reveal(), "")
			// The test reads the secret before the fault changes the response.
			var secrets []string
			inner := fault.Garble
			server.SetDefault(ststest.Behavior{Fault: &ststest.Fault{Garble: func(a *ststest.Answer) {
				for _, m := range secretElements.FindAllSubmatch(a.Body, -1) {
					secrets = append(secrets, string(m[1]))
				}
				inner(a)
			}}})
			front := httptest.NewServer(server)
			defer front.Close()
			sts := newSTS(t, assume.Config{Endpoint: front.URL})
			err = call(t, sts, grant(t, nil), func() int { return server.Count("", "") })
			if len(secrets) != 2 {
				t.Fatalf("there are %d secrets to search for", len(secrets))
			}
			for _, secret := range secrets[:2] {
				secrets = append(secrets, strings.NewReplacer("/", "", "+", "", "=", "").Replace(secret), strings.Trim(secret, "="), secret[:20])
			}
			check(t, name, err, credential.ErrUnavailable, credential.ReasonSTSUnavailable, nil, append(secrets, own.Reveal())...)
			if n := server.Answered("Garbled"); n != 1 {
				t.Errorf("%d responses were changed", n)
			}
		})
	}
}

// TestResponseIsBounded: a response may have the maximum size. The rest is not read.
func TestResponseIsBounded(t *testing.T) {
	const huge = 64 << 20
	for size, fits := range map[int]bool{
		assume.MaxAnswer:        true,
		assume.MaxAnswer + 1000: false, // what comes after the result is not needed
		huge:                    false,
	} {
		// The response comes from memory and late. Over a real network, net/http may get the response before the request is
		// completely sent. It then ends the request, and the rest of the response is lost.
		synctest.Test(t, func(t *testing.T) {
			server, sts := inMemory(t, ststest.Config{}, assume.Config{})
			server.SetDefault(ststest.Behavior{Latency: time.Second, Fault: &ststest.Fault{Garble: func(a *ststest.Answer) {
				pad := strings.Repeat(" ", size-len(a.Body))
				a.Body = []byte(strings.Replace(string(a.Body), "<Credentials>", "<Credentials>"+pad, 1))
			}}})
			_, err := sts.Credential(t.Context(), grant(t, nil))
			if fits {
				if err != nil {
					t.Errorf("a response of %d bytes gives %v", size, err)
				}
				return
			}
			check(t, "too large", err, credential.ErrUnavailable, credential.ReasonSTSUnavailable, nil)
			if err == nil || !strings.Contains(err.Error(), "larger than 64 KiB") {
				t.Errorf("a response of %d bytes gives %v", size, err)
			}
		})
	}
	// The header is bounded, too, also with a valid body.
	synctest.Test(t, func(t *testing.T) {
		server, sts := inMemory(t, ststest.Config{}, assume.Config{})
		server.SetDefault(ststest.Behavior{Latency: time.Second, Fault: &ststest.Fault{Garble: func(a *ststest.Answer) {
			for i := range 1000 {
				a.Header.Set(fmt.Sprintf("X-Filler-%d", i), strings.Repeat("x", 100))
			}
		}}})
		_, err := sts.Credential(t.Context(), grant(t, nil))
		check(t, "long header", err, credential.ErrUnavailable, credential.ReasonSTSUnavailable, nil)
	})
}

// TestOutage: an outage is distinguished from a refusal, and ends without a restart.
func TestOutage(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		server, sts := inMemory(t, ststest.Config{}, assume.Config{})
		g := grant(t, nil)
		for _, outage := range []ststest.Outage{ststest.Refusing, ststest.Failing} {
			if _, err := sts.Credential(t.Context(), g); err != nil {
				t.Fatal(err)
			}
			server.SetOutage(outage)
			for range 2 { // on the connection that is open, and on a new one
				_, err := sts.Credential(t.Context(), g)
				check(t, fmt.Sprint(outage), err, credential.ErrUnavailable, credential.ReasonSTSUnavailable, []string{"is unavailable"})
			}
			server.SetOutage(ststest.NoOutage)
		}
		if _, err := sts.Credential(t.Context(), g); err != nil {
			t.Error(err)
		}

		// The outage interrupts a call in progress. A call that hangs ends after its timeout.
		server.SetRole(roleARN, ststest.Behavior{Fault: ststest.Hang()})
		began := time.Now()
		go func() {
			time.Sleep(3 * time.Second)
			server.SetOutage(ststest.Refusing)
		}()
		_, err := sts.Credential(t.Context(), g)
		check(t, "cut", err, credential.ErrUnavailable, credential.ReasonSTSUnavailable, nil)
		if d := time.Since(began); d != 3*time.Second {
			t.Errorf("the call ended after %v, not with the outage", d)
		}
		server.SetOutage(ststest.NoOutage)
		began = time.Now()
		_, err = sts.Credential(t.Context(), g)
		check(t, "hang", err, credential.ErrUnavailable, credential.ReasonSTSUnavailable, nil)
		if d := time.Since(began); d != 10*time.Second {
			t.Errorf("a hanging call was given up after %v", d)
		}
		// None of it concerns the broker's own credentials.
		if e, ok := errors.AsType[*credential.Error](err); !ok || e.RetryAfter != 0 {
			t.Errorf("got %v", err)
		}
	})
}
