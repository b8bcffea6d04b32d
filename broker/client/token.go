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

// bearer presents a token as per-call metadata.
type bearer struct {
	token identity.UnverifiedToken
	shown func() // is called when the server has been verified, and is about to be shown the token
}

// GetRequestMetadata implements [credentials.PerRPCCredentials].
func (b bearer) GetRequestMetadata(context.Context, ...string) (map[string]string, error) {
	b.shown()
	return map[string]string{"authorization": "Bearer " + b.token.Reveal()}, nil
}

// RequireTransportSecurity implements [credentials.PerRPCCredentials]: gRPC refuses to send the
// token over anything but TLS.
func (bearer) RequireTransportSecurity() bool { return true }

// readToken reads a token and drops the newline that editors and shells leave at its end. Its errors
// never quote the content.
func readToken(file string) (identity.UnverifiedToken, error) {
	text, err := readBounded(file, identity.MaxTokenBytes)
	if err == nil {
		text = bytes.TrimRight(text, "\r\n")
		switch {
		case len(text) == 0:
			err = fmt.Errorf("%s is empty", file)
		// What is no JWT anyway could break out of the header.
		case bytes.ContainsFunc(text, func(r rune) bool { return r <= ' ' || r >= 0x7f }):
			err = fmt.Errorf("%s holds something else", file)
		}
	}
	if err != nil {
		return identity.UnverifiedToken{}, &credential.Error{
			Kind: credential.ErrUnavailable, Reason: credential.ReasonTokenMissing,
			Message: fmt.Sprintf("the pod's token cannot be read: %v", err),
		}
	}
	return identity.NewUnverifiedToken(string(text)), nil
}

func readBounded(file string, most int) ([]byte, error) {
	f, err := os.Open(file) //nolint:gosec // G304: the file that the program was told
	if err != nil {
		return nil, err
	}
	defer f.Close()
	content, err := io.ReadAll(io.LimitReader(f, int64(most)+1))
	if err != nil {
		return nil, err
	}
	if len(content) > most {
		return nil, fmt.Errorf("%s is longer than %d bytes", file, most)
	}
	return content, nil
}
