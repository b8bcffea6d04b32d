package main

import (
	"bytes"
	"crypto/x509"
	"os"
	"os/exec"
	"slices"
	"testing"
)

// sees makes this test binary print whether its process trusts the root of AWS's certificates.
const sees = "CREDENCE_TEST_SEES_ROOTS"

// TestPublicRootsWithoutFiles runs in a separate process, because a process reads its roots once. The binary of this test links
// the same packages as the program.
func TestPublicRootsWithoutFiles(t *testing.T) {
	if os.Getenv(sees) != "" {
		pool, err := x509.SystemCertPool()
		if err != nil {
			t.Fatal(err)
		}
		if !slices.ContainsFunc(pool.Subjects(), func(subject []byte) bool { //nolint:staticcheck // The warning is about systems that keep their roots elsewhere: here there are none.
			return bytes.Contains(subject, []byte("Amazon Root CA 1"))
		}) {
			t.Error("the root that signs AWS's certificates is not trusted")
		}
		return
	}
	child := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^"+t.Name()+"$", "-test.count=1")
	child.Env = append(os.Environ(), sees+"=1", "SSL_CERT_FILE=/nonexistent", "SSL_CERT_DIR=/nonexistent")
	if output, err := child.CombinedOutput(); err != nil || !bytes.Contains(output, []byte("PASS")) {
		t.Errorf("on a system without roots: %v\n%s", err, output)
	}
}
