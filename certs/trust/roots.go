package trust

import (
	"bytes"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/credence-iam/credence/certs"
)

// maxBundle bounds what is published, in bytes. It is copied into every opted-in namespace: with 10,000
// of them this much takes 640 MB of etcd, whose default quota is 2 GB. It holds some forty roots; a
// bundle of all public authorities, five times as much, is not what a broker should be known by.
const maxBundle = 64 << 10

// readRoots reads a bundle of roots from a file.
func readRoots(name string) ([]*x509.Certificate, error) {
	f, err := os.Open(name) //nolint:gosec // G304: the operator names it by a flag
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxBundle+1))
	if err != nil {
		return nil, fmt.Errorf("reading %s: %w", name, err)
	}
	if len(data) > maxBundle {
		return nil, fmt.Errorf("reading %s: longer than %d bytes, which is too much to copy into every namespace", name, maxBundle)
	}
	roots, err := certs.ParseRoots(data)
	if err != nil {
		return nil, fmt.Errorf("parsing %s: %w", name, err)
	}
	return roots, nil
}

// digest names a certificate, as the record and DropAnnotation do.
func digest(cert *x509.Certificate) string {
	sum := sha256.Sum256(cert.Raw)
	return hex.EncodeToString(sum[:])
}

// parseDigests parses the value of DropAnnotation. Colons between the bytes, and capitals, as openssl
// prints them, are good too.
func parseDigests(list string) (map[string]bool, error) {
	digests := make(map[string]bool)
	for text := range strings.FieldsFuncSeq(list, func(r rune) bool { return r == ',' || r == ' ' || r == '\n' }) {
		id := strings.ToLower(strings.ReplaceAll(text, ":", ""))
		if raw, err := hex.DecodeString(id); err != nil || len(raw) != sha256.Size {
			return nil, errors.New("annotation " + DropAnnotation + ": wants SHA-256 digests of 64 hexadecimal digits each, separated by commas; nothing is dropped")
		}
		digests[id] = true
	}
	return digests, nil
}

// encode is the bundle of these certificates.
func encode(roots []*x509.Certificate) []byte {
	var bundle bytes.Buffer
	for _, root := range roots {
		_ = pem.Encode(&bundle, &pem.Block{Type: "CERTIFICATE", Bytes: root.Raw}) // A Buffer takes all.
	}
	return bundle.Bytes()
}

// verifies reports whether leaf verifies under one of the roots at that time, as it will for a client
// that trusts them. Names are not looked at: two roots may well have the same.
func verifies(leaf *tls.Certificate, at time.Time, roots ...*x509.Certificate) bool {
	pool, intermediates := x509.NewCertPool(), x509.NewCertPool()
	for _, root := range roots {
		pool.AddCert(root)
	}
	for _, der := range leaf.Certificate[1:] {
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			return false
		}
		intermediates.AddCert(cert)
	}
	_, err := leaf.Leaf.Verify(x509.VerifyOptions{
		Roots: pool, Intermediates: intermediates, CurrentTime: at,
		KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	})
	return err == nil
}
