package main

import (
	"flag"
	"io"
	"testing"

	"github.com/credence-iam/credence/cmd/internal/program/programtest"
)

// TestChartArguments: the broker takes what the Helm chart passes to it.
func TestChartArguments(t *testing.T) {
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
