package certs

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
)

// Roots are the root certificates that a client trusts, followed on disk. Make them with [NewRoots]; the zero value trusts
// none. The methods may be called concurrently.
type Roots struct {
	files *reloader[x509.CertPool]
}

// NewRoots loads a file of PEM certificates. It returns an error if the file cannot be read, is larger than 1 MiB, has no
// certificate, or has a block that is malformed or not a certificate: a client trusts all of a bundle or nothing. Text between
// the certificates is allowed.
//
// log receives one line for each content that is loaded later and one for each bad content. If log is nil, nothing is logged.
func NewRoots(file string, log *slog.Logger) (*Roots, error) {
	if file == "" {
		return nil, errors.New("loading roots: a file of PEM certificates is required")
	}
	files, err := newReloader("roots", []string{file}, log,
		func(contents [][]byte) (*x509.CertPool, error) {
			pool, err := parsePool(contents[0])
			if err != nil {
				return nil, fmt.Errorf("parsing %s: %w", file, err)
			}
			return pool, nil
		})
	if err != nil {
		return nil, err
	}
	return &Roots{files}, nil
}

func parsePool(data []byte) (*x509.CertPool, error) {
	roots, err := ParseRoots(data)
	if err != nil {
		return nil, err
	}
	pool := x509.NewCertPool()
	for _, root := range roots {
		pool.AddCert(root)
	}
	return pool, nil
}

// ParseRoots parses a bundle of PEM certificates by the rules of [NewRoots]: at least one certificate, and nothing else except
// text between them.
func ParseRoots(data []byte) ([]*x509.Certificate, error) {
	if err := whole(data); err != nil {
		return nil, err
	}
	var roots []*x509.Certificate
	for {
		var block *pem.Block
		if block, data = pem.Decode(data); block == nil {
			break
		}
		if block.Type != "CERTIFICATE" {
			return nil, fmt.Errorf("block %d is a %s, not a CERTIFICATE", len(roots)+1, block.Type)
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("certificate %d: %w", len(roots)+1, err)
		}
		roots = append(roots, cert)
	}
	if len(roots) == 0 {
		return nil, errors.New("no PEM certificate found")
	}
	return roots, nil
}

// Err returns nil if the trusted bundle is the one that the file contains now, and otherwise the reason why it is an earlier
// one.
func (r *Roots) Err() error {
	_, stale := r.current()
	return stale
}

func (r *Roots) current() (*x509.CertPool, error) {
	if r == nil {
		return (*reloader[x509.CertPool])(nil).current()
	}
	return r.files.current()
}

// verify checks the same as crypto/tls does for a client with fixed RootCAs: the chain to a root, the validity period, the use
// as a server, and the name.
func (r *Roots) verify(cs tls.ConnectionState, name string) error {
	pool, stale := r.current()
	if pool == nil { // x509 would use the system's roots instead of a nil pool
		return stale
	}
	if name == "" {
		return errors.New("certs: no server name to verify; dial a DNS name, or pass one to ClientConfig")
	}
	if len(cs.PeerCertificates) == 0 {
		return errors.New("certs: the server presented no certificate")
	}
	opts := x509.VerifyOptions{
		Roots:         pool,
		Intermediates: x509.NewCertPool(),
		DNSName:       name,
		KeyUsages:     []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	for _, cert := range cs.PeerCertificates[1:] {
		opts.Intermediates.AddCert(cert)
	}
	if _, err := cs.PeerCertificates[0].Verify(opts); err != nil {
		// crypto/tls returns the same type, so callers need not distinguish.
		return &tls.CertificateVerificationError{UnverifiedCertificates: cs.PeerCertificates, Err: err}
	}
	return nil
}

// ClientConfig returns the TLS configuration of a client that verifies servers with the roots at the time of each handshake.
//
// serverName is the DNS name or IP address that the server's certificate must have, whatever address the client dials. If
// serverName is empty, the certificate must have the dialed name. That must be a DNS name: for an IP address crypto/tls
// provides no name to verify, and the handshake fails.
//
// The result may be passed to gRPC's credentials.NewTLS, which adds ALPN. If serverName is empty, gRPC takes the name from the
// target.
func ClientConfig(roots *Roots, serverName string) *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS13,
		ServerName: serverName,
		// tls.Config.RootCAs cannot change later, and clients have nothing like GetConfigForClient. So the built-in
		// verification is off, and VerifyConnection verifies every connection, resumed ones included.
		InsecureSkipVerify: true, //nolint:gosec // G402: replaced by VerifyConnection, see above
		VerifyConnection: func(cs tls.ConnectionState) error {
			name := serverName
			if name == "" {
				name = cs.ServerName
			}
			return roots.verify(cs, name)
		},
		// A resumed session relies on a proof of the server's key that can be seven days old (RFC 8446, section 4.6.1). A
		// full handshake is cheap enough.
		SessionTicketsDisabled: true,
	}
}
