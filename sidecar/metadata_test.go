package sidecar_test

import (
	"context"
	"encoding/json"
	"net/http"
	"regexp"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/broker/policy"
	"github.com/credence-iam/credence/sidecar"
)

const (
	headerToken = "X-aws-ec2-metadata-token"
	headerTTL   = "X-aws-ec2-metadata-token-ttl-seconds"

	tokenPath  = "/latest/api/token"
	rolesPath  = "/latest/meta-data/iam/security-credentials/"
	regionPath = "/latest/meta-data/placement/region"
)

// metadataToken requests a token with the TTL that most SDKs use.
func (w *world) metadataToken() string {
	w.t.Helper()
	a := w.do(http.MethodPut, tokenPath, headerTTL, "21600")
	a.want(w.t, http.StatusOK, "")
	return a.body
}

func metadataMode(mode policy.Metadata) func(*sidecar.Config) {
	return func(c *sidecar.Config) { c.Metadata = mode }
}

func TestMetadataCredentials(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := start(t, yields(t, time.Hour, 27*time.Minute)) // at midnight, when a synctest bubble begins
		time.Sleep(10 * time.Minute)
		token := w.metadataToken()
		for _, path := range []string{rolesPath, strings.TrimSuffix(rolesPath, "/")} {
			a := w.do(http.MethodGet, path, headerToken, token)
			a.want(t, http.StatusOK, "")
			if a.body != "app" || a.header.Get("Content-Type") != "text/plain" {
				t.Errorf("%s = %q of type %s, want the role's name as text", path, a.body, a.header.Get("Content-Type"))
			}
		}
		// The SDKs for Java and .NET join the endpoint, which ends in a slash, and the path, which begins with one.
		for _, path := range []string{rolesPath + "app", rolesPath + "app/", "/" + rolesPath + "app"} {
			a := w.do(http.MethodGet, path, headerToken, token)
			a.want(t, http.StatusOK, "")
			const want = `{"Code":"Success","LastUpdated":"2000-01-01T00:00:00Z","Type":"AWS-HMAC","AccessKeyId":"ASIA000000",` +
				`"SecretAccessKey":"secret/key+text=","Token":"session/token+text==","Expiration":"2000-01-01T00:55:00Z",` +
				`"RoleArn":"arn:aws:iam::123456789012:role/team/app","AccountId":"123456789012"}`
			if diff := cmp.Diff(want, a.body); diff != "" {
				t.Errorf("%s (-want +got):\n%s", path, diff)
			}
		}
		w.do(http.MethodGet, rolesPath+"other", headerToken, token).want(t, http.StatusNotFound, "ROLE_UNKNOWN")
	})
}

// If SDKs get a past expiration, they invent one that is later than the real one.
func TestMetadataExpirationIsNeverPast(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := start(t, yields(t, time.Hour, 27*time.Minute))
		synctest.Wait()
		w.broker.set(fails(errUnavailable))
		token := w.metadataToken()
		end := time.Now().Add(time.Hour)
		for time.Now().Before(end) {
			a := w.do(http.MethodGet, rolesPath+"app", headerToken, token)
			a.want(t, http.StatusOK, "")
			var body struct{ Expiration time.Time }
			if err := json.Unmarshal([]byte(a.body), &body); err != nil {
				t.Fatal(err)
			}
			early := time.Until(end) > 5*time.Minute
			if early && !body.Expiration.Equal(end.Add(-5*time.Minute)) || !early && !body.Expiration.Equal(end) {
				t.Fatalf("%v before the real expiration, the reported one is %v before it", time.Until(end), end.Sub(body.Expiration))
			}
			time.Sleep(30 * time.Second)
		}
		w.do(http.MethodGet, rolesPath+"app", headerToken, token).want(t, http.StatusServiceUnavailable, "INTERNAL")
	})
}

func TestMetadataSession(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := start(t, yields(t, time.Hour, 27*time.Minute))
		for _, ttl := range []string{"", "0", "-1", "+5", "21601", "1.5", "1e3", "0x10", "x", "18446744073709551617"} {
			w.do(http.MethodPut, tokenPath, headerTTL, ttl).want(t, http.StatusBadRequest, "TTL_INVALID")
		}
		w.do(http.MethodPut, tokenPath).want(t, http.StatusBadRequest, "TTL_INVALID")
		w.do(http.MethodPut, tokenPath, headerTTL, "60", "X-Forwarded-For", "").want(t, http.StatusForbidden, "FORWARDED")
		w.do(http.MethodPut, tokenPath, headerTTL, "60", "X-Forwarded-For", "10.0.0.1").want(t, http.StatusForbidden, "FORWARDED")

		// The SDKs for Go and Rust require the TTL in the response.
		a := w.do(http.MethodPut, tokenPath+"/", headerTTL, "300")
		a.want(t, http.StatusOK, "")
		if got := a.header.Get(headerTTL); got != "300" {
			t.Errorf("TTL in the response = %q, want 300", got)
		}
		if !regexp.MustCompile(`^[\w-]{40,100}$`).MatchString(a.body) {
			t.Errorf("token %q cannot be the value of a header", a.body)
		}
		time.Sleep(299 * time.Second)
		w.do(http.MethodGet, regionPath, headerToken, a.body).want(t, http.StatusOK, "")
		time.Sleep(time.Second)
		w.do(http.MethodGet, regionPath, headerToken, a.body).want(t, http.StatusUnauthorized, "METADATA_TOKEN_INVALID")

		good := w.metadataToken()
		flip := map[bool]string{true: "B", false: "A"}
		other := start(t, yields(t, time.Hour, 27*time.Minute))
		for name, bad := range map[string]string{
			"none": "", "other": "x", "cut": good[1:], "longer": good + "A",
			"time changed":      flip[good[0] == 'A'] + good[1:],
			"signature changed": good[:20] + flip[good[20] == 'A'] + good[21:],
			"other process":     other.metadataToken(),
		} {
			a := w.do(http.MethodGet, regionPath, headerToken, bad)
			if a.status != http.StatusUnauthorized {
				t.Errorf("%s: status %d, want 401", name, a.status)
			}
		}
	})
}

func TestMetadataV1(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := start(t, yields(t, time.Hour, 27*time.Minute), metadataMode(policy.MetadataV1))
		w.do(http.MethodGet, rolesPath).want(t, http.StatusOK, "")
		w.do(http.MethodGet, rolesPath, headerToken, w.metadataToken()).want(t, http.StatusOK, "")
		w.do(http.MethodGet, rolesPath, headerToken, "wrong").want(t, http.StatusUnauthorized, "METADATA_TOKEN_INVALID")
	})
}

// metadataPaths are all paths of the emulated metadata service.
var metadataPaths = []string{
	rolesPath, rolesPath + "app", "/latest/meta-data/iam/info", regionPath, "/latest/meta-data/placement/availability-zone",
	"/latest/dynamic/instance-identity/document", "/latest/meta-data/instance-id",
}

func TestMetadataNeedsASession(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := start(t, yields(t, time.Hour, 27*time.Minute))
		for _, path := range metadataPaths {
			w.do(http.MethodGet, path).want(t, http.StatusUnauthorized, "METADATA_TOKEN_INVALID")
		}
	})
}

func TestMetadataOff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := start(t, yields(t, time.Hour, 27*time.Minute), metadataMode(policy.MetadataOff))
		w.do(http.MethodPut, tokenPath, headerTTL, "60").want(t, http.StatusNotFound, "NOT_FOUND")
		for _, path := range metadataPaths {
			w.do(http.MethodGet, path).want(t, http.StatusNotFound, "NOT_FOUND")
		}
		w.credentials().want(t, http.StatusOK, "")
	})
}

func TestMetadataFacts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := start(t, yields(t, time.Hour, 27*time.Minute))
		token := w.metadataToken()
		for path, want := range map[string]string{
			regionPath: "eu-central-1",
			"/latest/dynamic/instance-identity/document": `{"accountId":"123456789012","region":"eu-central-1"}`,
			"/latest/meta-data/iam/info":                 `{"Code":"Success","LastUpdated":"2000-01-01T00:00:00Z"}`,
		} {
			a := w.do(http.MethodGet, path, headerToken, token)
			a.want(t, http.StatusOK, "")
			if a.body != want {
				t.Errorf("%s = %s, want %s", path, a.body, want)
			}
		}
		w.do(http.MethodGet, "/latest/meta-data/placement/availability-zone/", headerToken, token).want(t, http.StatusNotFound, "ZONE_UNKNOWN")

		id := w.do(http.MethodGet, "/latest/meta-data/instance-id", headerToken, token)
		id.want(t, http.StatusOK, "")
		if !regexp.MustCompile(`^i-[0-9a-f]{17}$`).MatchString(id.body) {
			t.Errorf("instance ID %q does not have EC2's form", id.body)
		}
		again := start(t, hangs)
		if got := again.do(http.MethodGet, "/latest/meta-data/instance-id", headerToken, again.metadataToken()); got.body != id.body {
			t.Errorf("instance ID after a restart = %q, want %q", got.body, id.body)
		}
	})
}

// The region and the role's name do not expire with the session.
func TestMetadataFactsOutliveTheLease(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := start(t, yields(t, time.Hour, 27*time.Minute))
		synctest.Wait()
		w.broker.set(fails(errUnavailable))
		time.Sleep(2 * time.Hour)
		token := w.metadataToken()
		for path, want := range map[string]string{regionPath: "eu-central-1", rolesPath: "app"} {
			if a := w.do(http.MethodGet, path, headerToken, token); a.status != http.StatusOK || a.body != want || a.took != 0 {
				t.Errorf("%s = %d %q after %v, want 200 %q immediately", path, a.status, a.body, a.took, want)
			}
		}
		w.do(http.MethodGet, rolesPath+"app", headerToken, token).want(t, http.StatusServiceUnavailable, "INTERNAL")
	})
}

// The zone is reported only if it is a region and one letter. botocore and the SDK for C++ derive the region by removing
// the letter.
func TestMetadataZone(t *testing.T) {
	const zonePath, documentPath = "/latest/meta-data/placement/availability-zone", "/latest/dynamic/instance-identity/document"
	for zone, reported := range map[string]bool{
		"eu-central-1a": true, "eu-central-1-ham-1a": false, // a local zone, from which SDKs would derive a wrong region
		"": false, "eu-central-1A": false, "eu-central-1ab": false, "eu-central-1-": false, "eu-central-10a": false, "eu-central-1": false, "us-east-1a": false, "rack-7": false, "zone-eu-central-1a": false,
	} {
		synctest.Test(t, func(t *testing.T) {
			w := start(t, yields(t, time.Hour, 27*time.Minute), func(c *sidecar.Config) { c.Zone = zone })
			token := w.metadataToken()
			document := `{"accountId":"123456789012","region":"eu-central-1"}`
			if reported {
				document = `{"accountId":"123456789012","region":"eu-central-1","availabilityZone":"` + zone + `"}`
			}
			if a := w.do(http.MethodGet, documentPath, headerToken, token); a.body != document {
				t.Errorf("zone %q: the identity document is %s", zone, a.body)
			}
			for _, path := range []string{zonePath, zonePath + "/"} {
				a := w.do(http.MethodGet, path, headerToken, token)
				if !reported {
					a.want(t, http.StatusNotFound, "ZONE_UNKNOWN")
				} else if a.want(t, http.StatusOK, ""); a.body != zone {
					t.Errorf("%s = %q, want %q", path, a.body, zone)
				}
			}
		})
	}
}

// If the broker sends no region, the sidecar reports none.
func TestMetadataUnknownRegion(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := start(t, func(ctx context.Context) (credential.Lease, error) {
			lease, err := yields(t, time.Hour, 27*time.Minute)(ctx)
			lease.Region = ""
			return lease, err
		})
		token := w.metadataToken()
		for _, path := range []string{regionPath, "/latest/dynamic/instance-identity/document"} {
			w.do(http.MethodGet, path, headerToken, token).want(t, http.StatusNotFound, "REGION_UNKNOWN")
		}
		w.do(http.MethodGet, rolesPath+"app", headerToken, token).want(t, http.StatusOK, "")
	})
}
