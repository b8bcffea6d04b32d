// Package certstest makes certificate authorities and server certificates at
// run time, and writes them the way the kubelet mounts a Secret or ConfigMap.
// No key is ever checked in.
//
//	ca := certstest.NewCA(t)
//	certFile, keyFile := ca.Leaf("broker.example").WriteTo(t.TempDir())
//	rootsFile := ca.WriteTo(t.TempDir())
//
// Writing to the same folder again replaces what it holds as a rotation does.
//
// All keys are ECDSA P-256, which are made in microseconds. All authorities
// carry the same subject name, as an authority does whose key was renewed, so a
// test that mixes them up by name fails.
//
// It is for tests and demonstrations: keys lie in files readable by their
// owner, and nothing is revoked or renewed.
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

// TB is what this package needs of testing.TB. A program that is not a test may
// pass its own; Fatalf must not return.
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
	root  *CA    // where the chain ends; itself, but for an intermediate
	chain []byte // what its leaves are served with: PEM, but for a root
}

// Leaf is a certificate with its private key.
type Leaf struct {
	// CertPEM is the certificate, followed by its intermediates, without root.
	CertPEM []byte
	// KeyPEM is its private key in PKCS #8 form.
	KeyPEM []byte

	ca *CA
}

// NewCA returns a new self-signed root, valid from an hour ago to a day ahead.
func NewCA(tb TB) *CA {
	tb.Helper()
	return NewCAWith(tb, func(*x509.Certificate) {})
}

// NewCAWith is NewCA, with change applied to the template before it is signed: to make one that lives
// longer, or has expired.
func NewCAWith(tb TB, change func(*x509.Certificate)) *CA {
	tb.Helper()
	ca := &CA{tb: tb}
	ca.root = ca
	ca.sign(nil, change)
	return ca
}

// Intermediate returns a new authority that is signed by ca. Its leaves carry
// it along, and are trusted where ca's root is.
func (ca *CA) Intermediate() *CA {
	ca.tb.Helper()
	sub := &CA{tb: ca.tb, root: ca.root}
	sub.sign(ca, func(*x509.Certificate) {})
	sub.chain = append(slices.Clone(sub.PEM), ca.chain...)
	return sub
}

// sign makes ca's key and certificate; by a nil parent, it is self-signed.
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

// Leaf returns a certificate for a TLS server known by the given DNS names and
// IP addresses, valid from an hour ago to a day ahead.
func (ca *CA) Leaf(names ...string) *Leaf {
	ca.tb.Helper()
	return ca.LeafWith(func(*x509.Certificate) {}, names...)
}

// LeafWith is Leaf, with change applied to the template before it is signed: to
// make one that has expired, or is good for another use.
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

// Pool returns a pool of this authority alone.
func (ca *CA) Pool() *x509.CertPool {
	pool := x509.NewCertPool()
	pool.AddCert(ca.Cert)
	return pool
}

// WriteTo writes the certificate of ca, and those of others after it, to ca.crt in the
// mounted volume dir, and returns the path of that file.
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

// WriteTo writes tls.crt, tls.key and, as cert-manager does, the root as ca.crt to the
// mounted volume dir, and returns the paths of the first two.
func (l *Leaf) WriteTo(dir string) (certFile, keyFile string) {
	l.ca.tb.Helper()
	WriteVolume(l.ca.tb, dir, map[string][]byte{
		"tls.crt": l.CertPEM, "tls.key": l.KeyPEM, "ca.crt": l.ca.root.PEM,
	})
	return filepath.Join(dir, "tls.crt"), filepath.Join(dir, "tls.key")
}

// WriteVolume makes files all that the folder dir holds, in the way of the
// kubelet: the content lies in a folder with a new name, dir/..data is a
// symbolic link to it that is replaced in one step, and each dir/NAME is a
// link to ..data/NAME that never changes. dir is made if it is not there.
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
