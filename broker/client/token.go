package client

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"

	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/broker/identity"
)

// bearer sends a token as per-call metadata.
type bearer struct {
	token  identity.UnverifiedToken
	onSend func() // called when the server is verified, before the token is sent
}

// GetRequestMetadata implements [credentials.PerRPCCredentials].
func (b bearer) GetRequestMetadata(context.Context, ...string) (map[string]string, error) {
	b.onSend()
	return map[string]string{"authorization": "Bearer " + b.token.Reveal()}, nil
}

// RequireTransportSecurity implements [credentials.PerRPCCredentials]. It makes gRPC refuse to send the token without TLS.
func (bearer) RequireTransportSecurity() bool { return true }

// readToken reads a token and removes the newline that editors and shells add. Its errors never quote the content.
func readToken(file string) (identity.UnverifiedToken, error) {
	text, err := readBounded(file, identity.MaxTokenBytes)
	if err == nil {
		text = bytes.TrimRight(text, "\r\n")
		switch {
		case len(text) == 0:
			err = fmt.Errorf("%s is empty", file)
		// Such a text is no JWT, and could break out of the header.
		case bytes.ContainsFunc(text, func(r rune) bool { return r <= ' ' || r >= 0x7f }):
			err = fmt.Errorf("%s does not contain a token", file)
		}
	}
	if err != nil {
		return identity.UnverifiedToken{}, &credential.Error{
			Kind: credential.ErrUnavailable, Reason: credential.ReasonTokenMissing,
			Message: fmt.Sprintf("cannot read the pod's token: %v", err),
		}
	}
	return identity.NewUnverifiedToken(string(text)), nil
}

func readBounded(file string, limit int) ([]byte, error) {
	f, err := os.Open(file) //nolint:gosec // G304: the file comes from the program's configuration
	if err != nil {
		return nil, err
	}
	defer f.Close()
	content, err := io.ReadAll(io.LimitReader(f, int64(limit)+1))
	if err != nil {
		return nil, err
	}
	if len(content) > limit {
		return nil, fmt.Errorf("%s is longer than %d bytes", file, limit)
	}
	return content, nil
}
