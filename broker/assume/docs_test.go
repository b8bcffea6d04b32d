package assume_test

import (
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/aws/aws-sdk-go-v2/aws/retry"
	"github.com/google/go-cmp/cmp"

	"github.com/credence-iam/credence/broker/assume"
)

// TestDocsListCodes: docs/aws.md has a table of this package's error codes.
func TestDocsListCodes(t *testing.T) {
	page, err := os.ReadFile(filepath.FromSlash("../../docs/aws.md"))
	if err != nil {
		t.Fatal(err)
	}
	_, table, ok := strings.Cut(string(page), "## AWS's errors and their reasons\n")
	if !ok {
		t.Fatal("docs/aws.md has no table of errors")
	}
	listed := map[string][]string{}
	for _, row := range regexp.MustCompile(`(?m)^\| (.*) \| (.*) \|$`).FindAllStringSubmatch(table, -1) {
		for _, code := range regexp.MustCompile("`([A-Za-z]+)`").FindAllStringSubmatch(row[2], -1) {
			listed[row[1]] = append(listed[row[1]], code[1])
		}
		slices.Sort(listed[row[1]])
	}
	sorted := func(codes []string) []string { return slices.Sorted(slices.Values(codes)) }
	want := map[string][]string{
		"`BROKER_CREDENTIALS`, after a second try": sorted(assume.StaleCodes),
		"`BROKER_CREDENTIALS`":                     sorted(assume.OwnCodes),
		"`STS_ACCESS_DENIED`":                      sorted(assume.DeniedCodes),
		"`STS_REJECTED`":                           sorted(assume.RejectedCodes),
	}
	// The SDK's list also has codes of other services. Each code of the page must be on it.
	for _, code := range listed["`STS_THROTTLED`"] {
		if _, ok := retry.DefaultThrottleErrorCodes[code]; !ok {
			t.Errorf("%s is not throttling", code)
		}
	}
	if len(listed["`STS_THROTTLED`"]) < 5 {
		t.Errorf("the page lists %v as throttling", listed["`STS_THROTTLED`"])
	}
	delete(listed, "`STS_THROTTLED`")
	if diff := cmp.Diff(want, listed); diff != "" {
		t.Errorf("codes on the page (-package +page):\n%s", diff)
	}
}
