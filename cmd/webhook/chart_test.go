package main

import (
	"bytes"
	"flag"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	batchv1 "k8s.io/api/batch/v1"
	"sigs.k8s.io/yaml"

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

// TestChartChecks: the command accepts the arguments of the chart's Job.
func TestChartChecks(t *testing.T) {
	t.Parallel()
	files, err := filepath.Glob("../../integration/chart/testdata/*.golden.yaml")
	if err != nil {
		t.Fatal(err)
	}
	jobs := 0
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		for document := range bytes.SplitSeq(text, []byte("\n---\n")) {
			var job batchv1.Job
			if err := yaml.Unmarshal(document, &job); err != nil || job.Kind != "Job" || job.Name != "credence-check" {
				continue // of another type, which may not parse as this one
			}
			jobs++
			c := job.Spec.Template.Spec.Containers[0]
			if !slices.Equal(c.Command, []string{"/credence-webhook"}) || !isCheck(append(c.Command, c.Args...)) {
				t.Errorf("%s runs %q %q", file, c.Command, c.Args)
			}
			f := flag.NewFlagSet("check", flag.ContinueOnError)
			finish := checkFlags(f)
			if err := f.Parse(c.Args[1:]); err != nil {
				t.Fatalf("%s: %v", file, err)
			}
			if o, err := finish(f.Args()); err != nil || o.namespace != "credence" || o.timeout != 3*time.Minute {
				t.Errorf("%s: %+v, %v", file, o, err)
			}
		}
	}
	if jobs < 3 {
		t.Errorf("found %d Jobs in %d files, want at least 3", jobs, len(files))
	}
}
