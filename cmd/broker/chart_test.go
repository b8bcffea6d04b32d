package main

import (
	"flag"
	"io"
	"testing"

	"github.com/credence-iam/credence/cmd/internal/program/programtest"
)

// TestChartArguments: the broker takes what the Helm chart passes to it.
func TestChartArguments(t *testing.T) {
	t.Setenv("POD_IPS", "10.0.0.1") // which the chart takes from the pod
	for file, args := range programtest.ChartArguments(t, "broker") {
		f := flag.NewFlagSet("credence-broker", flag.ContinueOnError)
		f.SetOutput(io.Discard)
		finish := flags(f)
		err := f.Parse(args)
		if err == nil {
			_, err = finish(f.Args())
		}
		if err != nil {
			t.Errorf("%s: %v", file, err)
		}
	}
}
