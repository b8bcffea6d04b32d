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

// maxBundle bounds the published roots, in bytes. Every opted-in namespace has a copy: in 10,000 namespaces they take 640 MB of
// etcd, whose default quota is 2 GB. The limit is enough for about forty roots. A bundle of all public authorities has five times
// the size, and a broker's certificate should not come from any of them.
const maxBundle = 64 << 10

// readRoots reads a bundle of roots from a file.
func readRoots(name string) ([]*x509.Certificate, error) {
	f, err := os.Open(name) //nolint:gosec // G304: a flag names the file
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxBundle+1))
	if err != nil {
		return nil, fmt.Errorf("reading %s: %w", name, err)
	}
	if len(data) > maxBundle {
		return nil, fmt.Errorf("reading %s: longer than %d bytes, too much for a copy in every namespace", name, maxBundle)
	}
	roots, err := certs.ParseRoots(data)
	if err != nil {
		return nil, fmt.Errorf("parsing %s: %w", name, err)
	}
	return roots, nil
}

// digest returns the digest that identifies a certificate in the record and in dropAnnotation.
func digest(cert *x509.Certificate) string {
	sum := sha256.Sum256(cert.Raw)
	return hex.EncodeToString(sum[:])
}

// parseDigests parses the value of dropAnnotation. It accepts colons between the bytes and capital letters, as openssl prints
// them.
func parseDigests(list string) (map[string]bool, error) {
	digests := make(map[string]bool)
	for text := range strings.FieldsFuncSeq(list, func(r rune) bool { return r == ',' || r == ' ' || r == '\n' }) {
		id := strings.ToLower(strings.ReplaceAll(text, ":", ""))
		if raw, err := hex.DecodeString(id); err != nil || len(raw) != sha256.Size {
			return nil, errors.New("annotation " + dropAnnotation + ": not a list of SHA-256 digests, so no root is dropped; write 64 hexadecimal digits for each, separated by commas")
		}
		digests[id] = true
	}
	return digests, nil
}

// encode returns the certificates as a PEM bundle.
func encode(roots []*x509.Certificate) []byte {
	var bundle bytes.Buffer
	for _, root := range roots {
		_ = pem.Encode(&bundle, &pem.Block{Type: "CERTIFICATE", Bytes: root.Raw}) // A Buffer returns no error.
	}
	return bundle.Bytes()
}

// verifies reports whether a client that trusts roots can verify leaf at that time. It does not compare names, because two roots
// can have the same name.
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
