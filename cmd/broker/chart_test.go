package main

import (
	"flag"
	"io"
	"testing"

	"github.com/credence-iam/credence/cmd/internal/program/programtest"
)

// The broker accepts the arguments that the Helm chart passes.
func TestChartArguments(t *testing.T) {
	t.Setenv("POD_IPS", "10.0.0.1") // the chart takes it from the pod
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
