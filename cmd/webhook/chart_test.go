package main

import (
	"testing"

	"github.com/credence-iam/credence/cmd/internal/program/programtest"
)

// TestChartArguments: the webhook accepts the arguments of the Helm chart.
func TestChartArguments(t *testing.T) {
	for file, args := range programtest.ChartArguments(t, "webhook") {
		if _, err := parse(args); err != nil {
			t.Errorf("%s: %v", file, err)
		}
	}
}
