package client

import (
	"errors"
	"fmt"
	"regexp"
	"time"

	"github.com/credence-iam/credence/broker/brokerpb"
	"github.com/credence-iam/credence/broker/credential"
)

// These limits apply to refresh_after. A wrong value must not flood the brokers with calls, nor silence a sidecar for
// longer than a session of the default duration.
const (
	minRefreshAfter = 30 * time.Second
	maxRefreshAfter = time.Hour
)

// accessKeyForm is accessKeyIdType in the STS API reference. The ID enters logs, so it is checked.
var accessKeyForm = regexp.MustCompile(`^\w{1,128}$`)

// leaseOf validates a response, whose size gRPC has limited already. Its errors quote only times and the role.
func leaseOf(response *brokerpb.GetCredentialsResponse, began time.Time) (credential.Lease, error) {
	if !accessKeyForm.MatchString(response.GetAccessKeyId()) {
		return credential.Lease{}, errors.New("no access key ID of 1 to 128 letters, digits and underscores")
	}
	if response.GetSecretAccessKey() == "" || response.GetSessionToken() == "" {
		return credential.Lease{}, errors.New("no secret access key or no session token")
	}
	if !brokerpb.ValidRegion(response.GetRegion()) {
		return credential.Lease{}, errors.New("its region does not have the form eu-central-1")
	}
	role, err := credential.ParseRoleARN(response.GetRoleArn())
	if err != nil {
		return credential.Lease{}, fmt.Errorf("parsing its role: %w", err)
	}
	if response.GetAccountId() != role.Account() {
		return credential.Lease{}, fmt.Errorf("its account is not the account of role %s", role)
	}
	if err := response.GetExpiration().CheckValid(); err != nil {
		return credential.Lease{}, errors.New("no expiration")
	}
	expiration := response.GetExpiration().AsTime()
	if now := time.Now(); !now.Before(expiration) {
		return credential.Lease{}, fmt.Errorf("it expired at %s, but it is %s here; compare the clocks of this node and the broker's node",
			expiration.Format(time.RFC3339), now.UTC().Format(time.RFC3339))
	}
	return credential.Lease{
		Credential: credential.Credential{
			AccessKeyID:     response.GetAccessKeyId(),
			SecretAccessKey: credential.NewSecret(response.GetSecretAccessKey()),
			SessionToken:    credential.NewSecret(response.GetSessionToken()),
			Issued:          began,
			Expiration:      expiration,
		},
		Role:         role,
		Region:       response.GetRegion(),
		RefreshAfter: min(max(response.GetRefreshAfter().AsDuration(), minRefreshAfter), maxRefreshAfter),
	}, nil
}
