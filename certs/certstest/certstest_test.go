package certstest_test

import (
	"crypto/x509"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/credence-iam/credence/certs/certstest"
)

func TestLeafVerifies(t *testing.T) {
	ca := certstest.NewCA(t)
	for what, leaf := range map[string]*certstest.Leaf{
		"root":         ca.Leaf("a.svc", "127.0.0.1"),
		"intermediate": ca.Intermediate().Intermediate().Leaf("a.svc", "127.0.0.1"),
	} {
		cert := leaf.TLS()
		chain := x509.NewCertPool()
		for _, der := range cert.Certificate[1:] {
			c, err := x509.ParseCertificate(der)
			if err != nil {
				t.Fatal(err)
			}
			chain.AddCert(c)
		}
		for _, name := range []string{"a.svc", "127.0.0.1"} {
			if _, err := cert.Leaf.Verify(x509.VerifyOptions{Roots: ca.Pool(), Intermediates: chain, DNSName: name}); err != nil {
				t.Errorf("leaf of the %s for %s: %v", what, name, err)
			}
		}
		if _, err := cert.Leaf.Verify(x509.VerifyOptions{Roots: certstest.NewCA(t).Pool(), Intermediates: chain}); err == nil {
			t.Errorf("leaf of the %s verifies against another root", what)
		}
	}
}

func TestWriteVolume(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "mnt")
	var before []string
	for _, files := range []map[string][]byte{
		{"a": []byte("1"), "b": []byte("2")},
		{"a": []byte("3"), "c": []byte("4")},
	} {
		certstest.WriteVolume(t, dir, files)
		for name, want := range files {
			if got, err := os.ReadFile(filepath.Join(dir, name)); err != nil || string(got) != string(want) {
				t.Errorf("%s contains %q, error %v; want %q", name, got, err, want)
			}
			if target, err := os.Readlink(filepath.Join(dir, name)); err != nil || target != filepath.Join("..data", name) {
				t.Errorf("%s links to %q, error %v; want a link through ..data", name, target, err)
			}
		}
		payload, err := os.Readlink(filepath.Join(dir, "..data"))
		if err != nil || slices.Contains(before, payload) {
			t.Errorf("..data links to %q, error %v; want a new folder", payload, err)
		}
		before = append(before, payload)
		entries, err := os.ReadDir(dir)
		if err != nil || len(entries) != len(files)+2 {
			t.Errorf("%d entries, error %v; want %d links, ..data and a folder", len(entries), err, len(files))
		}
	}
}
