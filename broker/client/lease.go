package client

import (
	"errors"
	"fmt"
	"regexp"
	"time"

	"github.com/credence-iam/credence/broker/brokerpb"
	"github.com/credence-iam/credence/broker/credential"
)

// A wrong refresh_after must neither make sidecars storm nor silence them for longer than a
// session of the default length.
const (
	minRefreshAfter = 30 * time.Second
	maxRefreshAfter = time.Hour
)

// accessKeyForm is accessKeyIdType of the STS API reference, because the ID enters logs.
var accessKeyForm = regexp.MustCompile(`^\w{1,128}$`)

// leaseOf checks an answer whose size gRPC has bounded already. Its errors quote nothing but times
// and the role.
func leaseOf(answer *brokerpb.GetCredentialsResponse, began time.Time) (credential.Lease, error) {
	if !accessKeyForm.MatchString(answer.GetAccessKeyId()) {
		return credential.Lease{}, errors.New("it has no access key id of 1 to 128 letters, digits and underscores")
	}
	if answer.GetSecretAccessKey() == "" || answer.GetSessionToken() == "" {
		return credential.Lease{}, errors.New("it lacks the secret access key or the session token")
	}
	if !brokerpb.ValidRegion(answer.GetRegion()) {
		return credential.Lease{}, errors.New("its region is not of the form eu-central-1")
	}
	role, err := credential.ParseRoleARN(answer.GetRoleArn())
	if err != nil {
		return credential.Lease{}, fmt.Errorf("parsing its role: %w", err)
	}
	if answer.GetAccountId() != role.Account() {
		return credential.Lease{}, fmt.Errorf("its account is not that of the role %s", role)
	}
	if err := answer.GetExpiration().CheckValid(); err != nil {
		return credential.Lease{}, errors.New("it has no expiration")
	}
	expiration := answer.GetExpiration().AsTime()
	if now := time.Now(); !now.Before(expiration) {
		return credential.Lease{}, fmt.Errorf("it expired at %s, and it is %s here: compare the clocks of this node and of the broker's",
			expiration.Format(time.RFC3339), now.UTC().Format(time.RFC3339))
	}
	return credential.Lease{
		Credential: credential.Credential{
			AccessKeyID:     answer.GetAccessKeyId(),
			SecretAccessKey: credential.NewSecret(answer.GetSecretAccessKey()),
			SessionToken:    credential.NewSecret(answer.GetSessionToken()),
			Issued:          began,
			Expiration:      expiration,
		},
		Role:         role,
		Region:       answer.GetRegion(),
		RefreshAfter: min(max(answer.GetRefreshAfter().AsDuration(), minRefreshAfter), maxRefreshAfter),
	}, nil
}
