package assume

import (
	"context"
	"fmt"
	"net/http"
	"sync"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	v4 "github.com/aws/aws-sdk-go-v2/aws/signer/v4"
)

// signer signs like the SDK, with one difference. The SDK derives a signing key from a secret access key, and caches it for the
// rest of the day by the access key ID alone. If a cluster admin corrects the secret of the same key, the SDK still signs with
// the wrong one.
type signer struct {
	mu     sync.Mutex
	secret string     // guarded by mu
	signer *v4.Signer // used with this secret only; guarded by mu
}

// SignHTTP implements sts.HTTPSignerV4.
func (s *signer) SignHTTP(ctx context.Context, keys aws.Credentials, r *http.Request, payloadHash, service, region string, at time.Time, options ...func(*v4.SignerOptions)) error {
	s.mu.Lock()
	if s.signer == nil || s.secret != keys.SecretAccessKey {
		s.signer, s.secret = v4.NewSigner(), keys.SecretAccessKey
	}
	by := s.signer
	s.mu.Unlock()
	if err := by.SignHTTP(ctx, keys, r, payloadHash, service, region, at, options...); err != nil {
		return fmt.Errorf("signing a call: %w", err)
	}
	return nil
}
