package certs

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
)

// Roots are the certificates that servers are verified against, followed on
// disk. Make them with [NewRoots]; the zero value trusts nobody. The methods may
// be called concurrently.
type Roots struct {
	files *reloader[x509.CertPool]
}

// NewRoots loads a file of PEM certificates. It returns an error if the file
// cannot be read, is larger than 1 MiB, holds no certificate, or holds anything
// that is not a certificate or does not parse: a bundle is trusted whole or
// not at all. Text between the certificates is allowed.
//
// log gets one record for each content that was loaded later, and one for each
// that could not be; nil discards them.
func NewRoots(file string, log *slog.Logger) (*Roots, error) {
	if file == "" {
		return nil, errors.New("loading roots: a file of PEM certificates is needed")
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

// ParseRoots parses a bundle of PEM certificates by the rules of [NewRoots]: it
// holds at least one, and nothing else but text between them.
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
		return nil, errors.New("holds no PEM certificate")
	}
	return roots, nil
}

// Err returns nil if what is trusted is what the file holds at this moment, and
// otherwise why it is an earlier bundle.
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

// verify does what crypto/tls does for a client with fixed RootCAs: chain to a
// root, validity now, use as a server, and name.
func (r *Roots) verify(cs tls.ConnectionState, name string) error {
	pool, stale := r.current()
	if pool == nil { // to x509, a nil pool means the roots of the system
		return stale
	}
	if name == "" {
		return errors.New("certs: no server name to verify: dial a DNS name, or give ClientConfig one")
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
		// The type that crypto/tls itself uses, so that callers need not care.
		return &tls.CertificateVerificationError{UnverifiedCertificates: cs.PeerCertificates, Err: err}
	}
	return nil
}

// ClientConfig returns the TLS configuration of a client that verifies servers
// against roots as they are at the time of each handshake.
//
// serverName is the DNS name, or IP address, that the server's certificate must
// be valid for, whatever address is dialled. If it is empty, the name that is
// dialled must match; that has to be a DNS name, because for an IP address
// crypto/tls tells no name to verify, and the handshake is refused.
//
// The result may be given to gRPC's credentials.NewTLS, which adds ALPN and,
// where serverName is empty, takes the name from the target.
func ClientConfig(roots *Roots, serverName string) *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS13,
		ServerName: serverName,
		// tls.Config.RootCAs is fixed when a Config is made, and clients have
		// no counterpart of GetConfigForClient. So the built-in verification is
		// off and VerifyConnection does all of it, on every connection,
		// resumed ones included.
		InsecureSkipVerify: true, //nolint:gosec // G402: replaced by VerifyConnection, see above
		VerifyConnection: func(cs tls.ConnectionState) error {
			name := serverName
			if name == "" {
				name = cs.ServerName
			}
			return roots.verify(cs, name)
		},
		// A resumed session rests on a proof of the server's key that can be
		// seven days old (RFC 8446, section 4.6.1). A full handshake is cheap
		// enough to ask for a new one.
		SessionTicketsDisabled: true,
	}
}
