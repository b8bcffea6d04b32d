package main

import (
	"testing"

	"github.com/credence-iam/credence/cmd/internal/program/programtest"
)

// TestChartArguments: the webhook takes what the Helm chart passes to it.
func TestChartArguments(t *testing.T) {
	for file, args := range programtest.ChartArguments(t, "webhook") {
		if _, err := parse(args); err != nil {
			t.Errorf("%s: %v", file, err)
		}
	}
}
