package sessions_test

import (
	"bytes"
	"compress/gzip"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/credence-iam/credence/broker/audit"
	"github.com/credence-iam/credence/operator/sessions"
)

const (
	first  = "ASIAFIRST00000000"
	second = "ASIASECOND0000000"
)

// line returns an audit line that gave the key to a pod.
func line(after time.Duration, key, pod, uid, peer string) string {
	text, err := json.Marshal(audit.Entry{
		Time: now.Add(after), Decision: audit.Allow, Namespace: "shop", Pod: pod, PodUID: uid, Role: cart, SessionName: "credence",
		AccessKeyID: key, Expiration: now.Add(time.Hour), Peer: peer,
	})
	if err != nil {
		panic(err)
	}
	return string(text)
}

// event returns an event of CloudTrail that was signed with the key.
func event(after time.Duration, key, name, address string) string {
	return fmt.Sprintf(`{"eventTime":%q,"eventName":%q,"eventSource":"s3.amazonaws.com","sourceIPAddress":%q,"userAgent":"aws-cli\u001b[2J","eventID":%q,"userIdentity":{"accessKeyId":%q},"responseElements":null}`,
		now.Add(after).Format(time.RFC3339), name, address, name, key)
}

// write writes a file and returns its path.
func write(t *testing.T, name, text string) string {
	t.Helper()
	var content bytes.Buffer
	content.WriteString(text)
	if strings.HasSuffix(name, ".gz") {
		content.Reset()
		zip := gzip.NewWriter(&content)
		if _, err := zip.Write([]byte(text)); err != nil {
			t.Fatal(err)
		}
		if err := zip.Close(); err != nil {
			t.Fatal(err)
		}
	}
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, content.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// gather reads files and joins them.
func gather(t *testing.T, s sessions.Search) ([]sessions.Key, sessions.Sources) {
	t.Helper()
	sources, err := s.Gather(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return sources.Keys(s.Key), sources
}

func auditLog(t *testing.T, name string) string {
	return write(t, name, strings.Join([]string{
		"I1129 something else {not JSON",
		line(0, first, "cart-1", "u1", "10.0.0.1:4000"),
		"[pod/credence-broker-x/broker] " + line(20*time.Minute, first, "cart-1", "u1", "10.0.0.1:4001"),
		line(30*time.Minute, first, "cart-2", "u2", "10.0.0.2:4000"),
		line(30*time.Minute, second, "other-1", "u3", "10.0.0.3:4000"),
		strings.Repeat("x", 100_000) + line(0, first, "too-long", "u4", ""),
		strings.Replace(line(0, first, "denied", "u5", ""), `"allow"`, `"deny"`, 1),
		line(40*time.Minute, first, "cart-1", "u6", "10.0.0.6:1"), // recreated under its name
	}, "\n"))
}

// TestKeys joins audit lines, with events in every form that they come in.
func TestKeys(t *testing.T) {
	events := []string{
		event(10*time.Minute, first, "GetObject", "198.51.100.1"), event(35*time.Minute, first, "PutObject", "10.0.0.2"), event(45*time.Minute, second, "ListBuckets", "198.51.100.1"),
		event(2*time.Hour, first, "TooLate", "198.51.100.1"), event(-time.Hour, first, "TooEarly", "198.51.100.1"), event(0, "AKIAUSER000000000", "GetUser", "198.51.100.1"),
		fmt.Sprintf(`{"eventTime":%q,"eventName":"AssumeRole","eventSource":"sts.amazonaws.com","userIdentity":{"accessKeyId":"AKIABROKER0000000"},"responseElements":{"credentials":{"accessKeyId":%q}}}`, now.Format(time.RFC3339), first),
	}
	var lookup []string
	for _, e := range events {
		quoted, err := json.Marshal(e)
		if err != nil {
			t.Fatal(err)
		}
		lookup = append(lookup, `{"EventName":"x","CloudTrailEvent":`+string(quoted)+`}`)
	}
	records := `{"Records":[` + strings.Join(events, ",") + `]}`
	for name, text := range map[string]string{
		"s3.json": records, "s3.json.gz": records, "lookup.json": `{"Events":[` + strings.Join(lookup, ",") + `]}`, "lines.json": strings.Join(events, "\n"), "two.json.gz": records[:len(records)-2] + `]}{"Records":[]}`,
	} {
		keys, sources := gather(t, sessions.Search{Key: first, AuditFiles: []string{auditLog(t, "audit.gz")}, Trails: []string{write(t, name, text)}})
		if len(keys) != 1 || len(sources.Problems) > 0 {
			t.Fatalf("%s: %+v, %+v", name, keys, sources.Problems)
		}
		k := keys[0]
		var pods, joined []string
		for _, h := range k.Pods {
			pods = append(pods, fmt.Sprint(h.Pod, " ", h.PodUID, " ", h.Times, " ", h.First.Sub(now), " ", h.Last.Sub(now), " ", h.Peers))
		}
		for _, e := range k.Events {
			joined = append(joined, fmt.Sprint(e.Name, " ", e.Pods, " ", e.Issued))
		}
		if diff := cmp.Diff([]string{"cart-1 u1 2 0s 20m0s [10.0.0.1]", "cart-2 u2 1 30m0s 30m0s [10.0.0.2]", "cart-1 u6 1 40m0s 40m0s [10.0.0.6]"}, pods); diff != "" {
			t.Errorf("%s: pods (-want +got):\n%s", name, diff)
		}
		if diff := cmp.Diff([]string{"TooEarly [] false", "AssumeRole [] true", "GetObject [shop/cart-1] false", "PutObject [shop/cart-2] false", "TooLate [] false"}, joined); diff != "" {
			t.Errorf("%s: events (-want +got):\n%s", name, diff)
		}
		if k.Role != cart || k.SessionName != "credence" || !k.Expiration.Equal(now.Add(time.Hour)) {
			t.Errorf("%s: the key is %+v", name, k)
		}
	}

	// Without a key ID, all temporary keys of the events are joined.
	keys, _ := gather(t, sessions.Search{AuditFiles: []string{auditLog(t, "audit")}, Trails: []string{write(t, "s3.json", records)}})
	if len(keys) != 2 || keys[0].AccessKeyID != first || keys[1].AccessKeyID != second || keys[1].Pods[0].Pod != "other-1" || keys[1].Events[0].Pods[0] != "shop/other-1" {
		t.Errorf("all keys: %+v", keys)
	}
}

// TestKeysOfGrants finds pods that use a key now, also those that the audit log has.
func TestKeysOfGrants(t *testing.T) {
	s := sessions.Sources{Brokers: snapshot()}
	keys := s.Keys("ASIACARTB")
	if len(keys) != 1 || keys[0].Role != cart || len(keys[0].Pods) != 2 || keys[0].Pods[1].Pod != "b" || keys[0].Pods[0].Sources[0] != "broker credence-broker-6f8d-bbbbb now" || !keys[0].Expiration.Equal(*at(50 * time.Minute)) {
		t.Errorf("the key is %+v", keys)
	}
	s.Lines = []sessions.Line{{Entry: audit.Entry{Decision: audit.Allow, AccessKeyID: "ASIACARTB", Namespace: "shop", Pod: "b", PodUID: "u"}, Source: "log"}}
	if keys := s.Keys("ASIACARTB"); len(keys[0].Pods) != 2 {
		t.Errorf("the pods are %+v", keys[0].Pods)
	}
	if keys := s.Keys("ASIAUNKNOWN"); len(keys) != 1 || len(keys[0].Pods) > 0 {
		t.Errorf("an unknown key is %+v", keys)
	}
}

func TestFilesThatAreNoTrails(t *testing.T) {
	for name, text := range map[string]string{
		"empty": "", "text": "hello", "other": `{"a":1}`, "half": `{"Records":[`, "event": `{"Events":[{"CloudTrailEvent":"x"}]}`,
	} {
		_, err := sessions.Search{Key: first, Trails: []string{write(t, name, text)}}.Gather(t.Context())
		if err == nil || !strings.Contains(err.Error(), "--cloudtrail=") || !strings.Contains(err.Error(), "as CloudTrail writes it to S3") {
			t.Errorf("%s: error %v", name, err)
		}
	}
	for _, s := range []sessions.Search{{Key: first, Trails: []string{"absent"}}, {Key: first, AuditFiles: []string{"absent"}}, {Key: first, AuditFiles: []string{write(t, "cut.gz", "x")[:0] + write(t, "cut", "\x1f\x8bxx")}}} {
		if _, err := s.Gather(t.Context()); err == nil {
			t.Errorf("%+v: no error", s)
		}
	}
}

func TestWriteKeys(t *testing.T) {
	keys, _ := gather(t, sessions.Search{Key: first, AuditFiles: []string{auditLog(t, "audit")}, Trails: []string{write(t, "t.json", event(10*time.Minute, first, "GetObject", "198.51.100.1"))}})
	var out strings.Builder
	if err := sessions.WriteKeys(&out, keys, []sessions.Problem{{Source: "log of broker x", Error: "gone\x07"}}, sessions.Table); err != nil {
		t.Fatal(err)
	}
	want := `access key ASIAFIRST00000000
role arn:aws:iam::123456789012:role/shop/cart, session credence, expires 2026-11-29T13:00:00Z
NAMESPACE POD FIRST LAST TIMES PEERS
shop cart-1 2026-11-29T12:00:00Z 2026-11-29T12:20:00Z 2 10.0.0.1
shop cart-2 2026-11-29T12:30:00Z 2026-11-29T12:30:00Z 1 10.0.0.2
shop cart-1 2026-11-29T12:40:00Z 2026-11-29T12:40:00Z 1 10.0.0.6
EVENT TIME EVENT SOURCE ADDRESS ERROR PODS USER AGENT
2026-11-29T12:10:00Z GetObject s3.amazonaws.com 198.51.100.1 - shop/cart-1 aws-cli?[2J
log of broker x: not read to its end: gone?`
	if diff := cmp.Diff(want, squeeze(out.String())); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	out.Reset()
	if err := sessions.WriteKeys(&out, keys, nil, sessions.JSON); err != nil || !json.Valid([]byte(out.String())) || !strings.Contains(out.String(), `"problems": []`) {
		t.Errorf("JSON: %v\n%s", err, out.String())
	}
}
