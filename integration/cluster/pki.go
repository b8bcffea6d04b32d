//go:build unix

package cluster

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"time"
)

// certificateLife is longer than any run, and short enough that a leaked key soon loses its value.
const certificateLife = 24 * time.Hour

// authority is the CA of one cluster. Its key stays in memory.
type authority struct {
	key  *ecdsa.PrivateKey
	cert *x509.Certificate
	pem  []byte
}

func newAuthority() (*authority, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("making the key of the cluster's CA: %w", err)
	}
	template := validFromNow(pkix.Name{CommonName: "kubernetes-ca"})
	template.IsCA = true
	template.BasicConstraintsValid = true
	template.KeyUsage = x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return nil, fmt.Errorf("making the cluster's CA: %w", err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("making the cluster's CA: %w", err)
	}
	return &authority{key, cert, encode("CERTIFICATE", der)}, nil
}

// validFromNow returns a template of a certificate. The API server has the same clock.
func validFromNow(subject pkix.Name) *x509.Certificate {
	now := time.Now()
	return &x509.Certificate{
		SerialNumber: new(big.Int).SetInt64(now.UnixNano()),
		Subject:      subject,
		NotBefore:    now.Add(-time.Second), // X.509 counts in seconds
		NotAfter:     now.Add(certificateLife),
	}
}

// server issues a serving certificate for names and addresses.
func (a *authority) server(name string, names []string, addresses []net.IP) (cert, key []byte, err error) {
	template := validFromNow(pkix.Name{CommonName: name})
	template.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
	template.DNSNames, template.IPAddresses = names, addresses
	return a.issue(template)
}

// client issues a certificate of a user in groups.
func (a *authority) client(user string, groups []string) (cert, key []byte, err error) {
	template := validFromNow(pkix.Name{CommonName: user, Organization: groups})
	template.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}
	return a.issue(template)
}

func (a *authority) issue(template *x509.Certificate) (cert, key []byte, err error) {
	name := template.Subject.CommonName
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, fmt.Errorf("making the key of %s: %w", name, err)
	}
	template.KeyUsage = x509.KeyUsageDigitalSignature
	der, err := x509.CreateCertificate(rand.Reader, template, a.cert, private.Public(), a.key)
	if err != nil {
		return nil, nil, fmt.Errorf("issuing the certificate of %s: %w", name, err)
	}
	key, err = encodeKey(private)
	return encode("CERTIFICATE", der), key, err
}

// newTokenKey makes the key that signs ServiceAccount tokens: an RSA key, because most clusters have RS256 tokens.
func newTokenKey() (private, public []byte, err error) {
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		return nil, nil, fmt.Errorf("making the token-signing key: %w", err)
	}
	der, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		return nil, nil, fmt.Errorf("encoding the token-signing key: %w", err)
	}
	private, err = encodeKey(key)
	return private, encode("PUBLIC KEY", der), err
}

func encodeKey(key crypto.Signer) ([]byte, error) {
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, fmt.Errorf("encoding a key: %w", err)
	}
	return encode("PRIVATE KEY", der), nil
}

func encode(kind string, der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der})
}

// Files of the components, in the run's folder, which is also their working folder.
const (
	caFile           = "ca.crt"
	serverCertFile   = "apiserver.crt"
	serverKeyFile    = "apiserver.key"
	tokenPrivateFile = "service-account.key"
	tokenPublicFile  = "service-account.pub"
	kubeconfigFile   = "admin.kubeconfig"

	kubeletClientCertFile = "kubelet-client.crt"
	kubeletClientKeyFile  = "kubelet-client.key"
)

// writePKI writes keys and certificates into the run's folder.
func (c *Cluster) writePKI() error {
	cert, key, err := c.ca.server("kube-apiserver",
		[]string{"localhost", "kubernetes", "kubernetes.default", "kubernetes.default.svc", "kubernetes.default.svc.cluster.local"},
		ips(c.host.Address(), c.families, family.kubernetes),
	)
	if err != nil {
		return err
	}
	clientCert, clientKey, err := c.ca.client("kube-apiserver-kubelet-client", []string{"system:masters"})
	if err != nil {
		return err
	}
	private, public, err := newTokenKey()
	if err != nil {
		return err
	}
	return writeFiles(c.run.Dir(), map[string][]byte{
		caFile: c.ca.pem, serverCertFile: cert, serverKeyFile: key,
		kubeletClientCertFile: clientCert, kubeletClientKeyFile: clientKey,
		tokenPrivateFile: private, tokenPublicFile: public,
	})
}

// writeFiles writes files into a folder, readable by this user alone.
func writeFiles(dir string, files map[string][]byte) error {
	for name, content := range files {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			return fmt.Errorf("making a folder of the cluster: %w", err)
		}
		if err := os.WriteFile(path, content, 0o600); err != nil {
			return fmt.Errorf("writing a file of the cluster: %w", err)
		}
	}
	return nil
}
