package audit_test

import (
	"bytes"
	"context"
	"encoding/json"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/credence-iam/credence/broker/audit"
	"github.com/credence-iam/credence/broker/credential"
)

// written returns the text that l writes for e.
func written(t *testing.T, l *audit.Log, out *sink, e audit.Entry) string {
	t.Helper()
	if err := l.Record(e); err != nil {
		t.Fatal(err)
	}
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	if err := l.Run(ended); err != nil { // writes what is queued
		t.Fatal(err)
	}
	out.mu.Lock()
	defer out.mu.Unlock()
	text := out.buf.String()
	out.buf.Reset()
	return text
}

// checkLine checks that text is one line of JSON with e's fields, of at most MaxLine bytes.
func checkLine(t *testing.T, text string, e audit.Entry) {
	t.Helper()
	if len(text) > audit.MaxLine {
		t.Errorf("the line has %d bytes, want at most %d", len(text), audit.MaxLine)
	}
	line, ok := strings.CutSuffix(text, "\n")
	if !ok || strings.ContainsAny(line, "\n\r") {
		t.Fatalf("%q is not one line", text)
	}
	decoder := json.NewDecoder(strings.NewReader(line))
	decoder.DisallowUnknownFields()
	var got audit.Entry
	if err := decoder.Decode(&got); err != nil {
		t.Fatalf("decoding %q: %v", line, err)
	}
	if y := e.Time.UTC().Year(); !e.Time.IsZero() && y >= 1 && y <= 9999 && !got.Time.Equal(e.Time) {
		t.Errorf("the time is %s, want %s", got.Time, e.Time)
	}
	if y := e.Expiration.UTC().Year(); y >= 1 && y <= 9999 && !got.Expiration.Equal(e.Expiration) {
		t.Errorf("the expiration is %s, want %s", got.Expiration, e.Expiration)
	}
	want, found := reflect.ValueOf(e), reflect.ValueOf(got)
	for i := range want.NumField() {
		if want.Field(i).Kind() != reflect.String {
			continue
		}
		name, before, after := want.Type().Field(i).Name, want.Field(i).String(), found.Field(i).String()
		// encoding/json replaces each byte of invalid UTF-8 by one character.
		before = string([]rune(before))
		if before == after {
			continue
		}
		// The lowest limit is 64 bytes, and a byte takes at most six.
		if begin, was := strings.CutSuffix(after, "…[cut]"); !was || !strings.HasPrefix(before, begin) || len(before) < 10 {
			t.Errorf("%s is %q, want %q", name, after, before)
		}
	}
}

// FuzzEntry checks that every entry becomes one line of JSON with the same content.
func FuzzEntry(f *testing.F) {
	f.Add("deny", "ROLE_NOT_PERMITTED", "role \"cart\"\nis not <permitted>", "shop", "cart-1", "u-1", "cart", "arn:aws:iam::1:role/a", "credence", "ASIA", "10.0.0.1:1", int64(0), int64(0))
	f.Add("\x00", "\xff\xfe", "\u2028\u2029\u0085\r", "\xe2\x80", "\"\\", "\ufffd", "\x7f", "\xed\xa0\x80", "</script>", "…[cut]", "\t", int64(1)<<60, -int64(1)<<60)
	long := strings.Repeat("\x01", 1<<12)
	f.Add(long, long, long, long, long, long, long, long, long, long, long, int64(253402300800), int64(-62135596801))
	wide := strings.Repeat("\U0001F600é", 1<<12)
	f.Add(wide, wide, wide, wide, wide, wide, wide, wide, wide, wide, wide, int64(1), int64(2))
	var out sink
	l := newLog(f, &out, false)
	f.Fuzz(func(t *testing.T, decision, reason, message, namespace, pod, uid, account, role, session, key, peer string, at, until int64) {
		e := audit.Entry{
			Time: time.Unix(at, 0), Decision: audit.Decision(decision), Reason: credential.Reason(reason), Message: message,
			Namespace: namespace, Pod: pod, PodUID: uid, ServiceAccount: account, Role: role, SessionName: session,
			AccessKeyID: key, Expiration: time.Unix(until, 0), Peer: peer,
		}
		checkLine(t, written(t, l, &out, e), e)
	})
}

// Fields of their real maximum length are not cut, even all at once.
func TestRealFieldsAreNotCut(t *testing.T) {
	var out sink
	l := newLog(t, &out, false)
	e := audit.Entry{
		Time: time.Unix(1, 0), Decision: audit.Deny, Reason: credential.Reason(strings.Repeat("R", 63)),
		Message:   strings.Repeat("sentence ", 1400/9),
		Namespace: strings.Repeat("n", 63), Pod: strings.Repeat("p", 253), PodUID: strings.Repeat("u", 36),
		ServiceAccount: strings.Repeat("s", 253), Role: "arn:aws-us-gov:iam::123456789012:role/" + strings.Repeat("p", 511) + "/" + strings.Repeat("r", 64),
		SessionName: strings.Repeat("s", 64), AccessKeyID: strings.Repeat("A", 128), Expiration: time.Unix(2, 0),
		Peer: "[fd00:ffff:ffff:ffff:ffff:ffff:ffff:ffff%eth0]:65535",
	}
	line := written(t, l, &out, e)
	checkLine(t, line, e)
	if strings.Contains(line, "[cut]") {
		t.Errorf("a field was cut: %s", line)
	}
	e.Message = strings.Repeat("x", 100_000)
	line = written(t, l, &out, e)
	checkLine(t, line, e)
	var cut audit.Entry
	if err := json.Unmarshal([]byte(line), &cut); err != nil || len(cut.Message) != 1500 {
		t.Errorf("a message of 100 kB is cut to %d bytes, want its limit of 1500: %v", len(cut.Message), err)
	}
	if !strings.Contains(line, `x…[cut]"`) || bytes.Count([]byte(line), []byte("[cut]")) != 1 {
		t.Errorf("of a message of 100 kB, the message alone must be cut, with the mark: %.200s", line)
	}
}
