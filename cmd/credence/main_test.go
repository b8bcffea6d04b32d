package main

import (
	"path/filepath"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"
)

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){"credence": main})
}

// TestScripts runs the program as a program.
func TestScripts(t *testing.T) {
	if scripts, err := filepath.Glob("testdata/*.txt"); err != nil || len(scripts) == 0 {
		t.Fatalf("no scripts in testdata: %v", err)
	}
	testscript.Run(t, testscript.Params{
		Dir: "testdata", RequireExplicitExec: true, RequireUniqueNames: true,
		Setup: func(env *testscript.Env) error {
			env.Setenv("SETTINGS", "--broker=credence-broker.credence.svc:9443")
			env.Setenv("IMAGE", "--sidecar-image=registry.example/credence-sidecar:v1")
			return nil
		},
	})
}
