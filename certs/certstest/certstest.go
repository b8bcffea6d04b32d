// Package certstest makes certificate authorities and server certificates at run time, and writes them to disk as the kubelet
// mounts a Secret or ConfigMap. So no key is checked in.
//
//	ca := certstest.NewCA(t)
//	certFile, keyFile := ca.Leaf("broker.example").WriteTo(t.TempDir())
//	rootsFile := ca.WriteTo(t.TempDir())
//
// A second write to the same folder replaces its content like a rotation.
//
// All keys are ECDSA P-256, because those are made in microseconds. All authorities have the same subject name, like an
// authority before and after a renewal of its key. So code that identifies an authority by its name fails its test.
//
// The package is for tests and demonstrations: it writes keys to files, and revokes and renews nothing.
package certstest

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"net"
	"os"
	"path/filepath"
	"slices"
	"time"
)

// TB has the methods of testing.TB that this package calls. A program that is not a test may pass its own; Fatalf must not
// return.
type TB interface {
	Helper()
	Fatalf(format string, args ...any)
}

// CA is a certificate authority. Make it with [NewCA].
type CA struct {
	// PEM is the authority's own certificate.
	PEM []byte
	// Cert is the same, parsed.
	Cert *x509.Certificate

	tb    TB
	key   *ecdsa.PrivateKey
	root  *CA    // the end of the chain: the CA itself, unless it is an intermediate
	chain []byte // PEM of the intermediates that its leaves carry; empty for a root
}

// Leaf is a certificate with its private key.
type Leaf struct {
	// CertPEM is the certificate, followed by its intermediates, without the root.
	CertPEM []byte
	// KeyPEM is its private key in PKCS #8 form.
	KeyPEM []byte

	ca *CA
}

// NewCA returns a new self-signed root. It is valid since an hour ago, for another day.
func NewCA(tb TB) *CA {
	tb.Helper()
	return NewCAWith(tb, func(*x509.Certificate) {})
}

// NewCAWith is NewCA, but calls change with the template before it signs. So a test can set another validity period.
func NewCAWith(tb TB, change func(*x509.Certificate)) *CA {
	tb.Helper()
	ca := &CA{tb: tb}
	ca.root = ca
	ca.sign(nil, change)
	return ca
}

// Intermediate returns a new authority signed by ca. Its leaves carry its certificate, and clients that trust ca's root trust
// them.
func (ca *CA) Intermediate() *CA {
	ca.tb.Helper()
	sub := &CA{tb: ca.tb, root: ca.root}
	sub.sign(ca, func(*x509.Certificate) {})
	sub.chain = append(slices.Clone(sub.PEM), ca.chain...)
	return sub
}

// sign makes ca's key and certificate. If parent is nil, the certificate is self-signed.
func (ca *CA) sign(parent *CA, change func(*x509.Certificate)) {
	ca.tb.Helper()
	ca.key = newKey(ca.tb)
	tmpl := template()
	tmpl.Subject = pkix.Name{CommonName: "certstest CA"}
	tmpl.IsCA = true
	tmpl.BasicConstraintsValid = true
	tmpl.KeyUsage = x509.KeyUsageCertSign | x509.KeyUsageCRLSign
	change(tmpl)
	signer, by := ca.key, tmpl
	if parent != nil {
		tmpl.Subject.CommonName = "certstest intermediate"
		signer, by = parent.key, parent.Cert
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, by, ca.key.Public(), signer)
	if err != nil {
		ca.tb.Fatalf("certstest: signing an authority: %v", err)
	}
	if ca.Cert, err = x509.ParseCertificate(der); err != nil {
		ca.tb.Fatalf("certstest: parsing an authority: %v", err)
	}
	ca.PEM = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
}

// Leaf returns a certificate of a TLS server with these DNS names and IP addresses. It is valid since an hour ago, for another
// day.
func (ca *CA) Leaf(names ...string) *Leaf {
	ca.tb.Helper()
	return ca.LeafWith(func(*x509.Certificate) {}, names...)
}

// LeafWith is Leaf, but calls change with the template before it signs. So a test can set another validity period or use.
func (ca *CA) LeafWith(change func(*x509.Certificate), names ...string) *Leaf {
	ca.tb.Helper()
	tmpl := template()
	tmpl.KeyUsage = x509.KeyUsageDigitalSignature
	tmpl.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
	for _, name := range names {
		if ip := net.ParseIP(name); ip != nil {
			tmpl.IPAddresses = append(tmpl.IPAddresses, ip)
		} else {
			tmpl.DNSNames = append(tmpl.DNSNames, name)
		}
	}
	change(tmpl)

	key := newKey(ca.tb)
	der, err := x509.CreateCertificate(rand.Reader, tmpl, ca.Cert, key.Public(), ca.key)
	if err != nil {
		ca.tb.Fatalf("certstest: signing a leaf for %q: %v", names, err)
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		ca.tb.Fatalf("certstest: encoding a key: %v", err)
	}
	return &Leaf{
		CertPEM: append(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), ca.chain...),
		KeyPEM:  pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: pkcs8}),
		ca:      ca,
	}
}

// Pool returns a pool with only this authority.
func (ca *CA) Pool() *x509.CertPool {
	pool := x509.NewCertPool()
	pool.AddCert(ca.Cert)
	return pool
}

// WriteTo writes the certificates of ca and others to ca.crt in the mounted volume dir, and returns the path of that file.
func (ca *CA) WriteTo(dir string, others ...*CA) (file string) {
	ca.tb.Helper()
	bundle := slices.Clone(ca.PEM)
	for _, other := range others {
		bundle = append(bundle, other.PEM...)
	}
	WriteVolume(ca.tb, dir, map[string][]byte{"ca.crt": bundle})
	return filepath.Join(dir, "ca.crt")
}

// TLS returns the pair for use in a tls.Config.
func (l *Leaf) TLS() tls.Certificate {
	l.ca.tb.Helper()
	cert, err := tls.X509KeyPair(l.CertPEM, l.KeyPEM)
	if err != nil {
		l.ca.tb.Fatalf("certstest: pairing a leaf with its key: %v", err)
	}
	return cert
}

// WriteTo writes tls.crt and tls.key to the mounted volume dir, and the root as ca.crt, as cert-manager does. It returns the
// paths of the first two files.
func (l *Leaf) WriteTo(dir string) (certFile, keyFile string) {
	l.ca.tb.Helper()
	WriteVolume(l.ca.tb, dir, map[string][]byte{
		"tls.crt": l.CertPEM, "tls.key": l.KeyPEM, "ca.crt": l.ca.root.PEM,
	})
	return filepath.Join(dir, "tls.crt"), filepath.Join(dir, "tls.key")
}

// WriteVolume replaces the content of the folder dir by files, as the kubelet does. The files are in a folder with a new name,
// and the symbolic link dir/..data to that folder is replaced in one step. Each dir/NAME is a link to ..data/NAME that never
// changes. WriteVolume creates dir if necessary.
func WriteVolume(tb TB, dir string, files map[string][]byte) {
	tb.Helper()
	must := func(err error) {
		tb.Helper()
		if err != nil {
			tb.Fatalf("certstest: writing the volume %s: %v", dir, err)
		}
	}
	must(os.MkdirAll(dir, 0o700))
	data := filepath.Join(dir, "..data")
	old, _ := os.Readlink(data) // empty the first time

	payload, err := os.MkdirTemp(dir, "..version_")
	must(err)
	for name, content := range files {
		must(os.WriteFile(filepath.Join(payload, name), content, 0o600))
	}
	next := filepath.Join(dir, "..data_tmp")
	must(os.Symlink(filepath.Base(payload), next))
	must(os.Rename(next, data))

	for name := range files {
		link := filepath.Join(dir, name)
		if _, err := os.Lstat(link); os.IsNotExist(err) {
			must(os.Symlink(filepath.Join("..data", name), link))
		}
	}
	links, err := os.ReadDir(dir)
	must(err)
	for _, link := range links {
		if _, kept := files[link.Name()]; !kept && link.Name()[0] != '.' {
			must(os.Remove(filepath.Join(dir, link.Name())))
		}
	}
	if old != "" {
		must(os.RemoveAll(filepath.Join(dir, old)))
	}
}

func newKey(tb TB) *ecdsa.PrivateKey {
	tb.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		tb.Fatalf("certstest: making a key: %v", err)
	}
	return key
}

func template() *x509.Certificate {
	return &x509.Certificate{
		NotBefore: time.Now().Add(-time.Hour),
		NotAfter:  time.Now().Add(24 * time.Hour),
	}
}
