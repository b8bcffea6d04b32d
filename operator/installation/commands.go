package installation

import (
	"cmp"
	"context"
	"fmt"

	authenticationv1 "k8s.io/api/authentication/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/credence-iam/credence/broker/debugapi"
)

// tokenSeconds is the lifetime of a token for commands, the minimum of the API server.
const tokenSeconds = 600

// CommandToken returns the token that the brokers require with a command, "" if they require none. It creates the token, for
// which its user needs the right to create tokens of the ServiceAccount of commands.
func (c *Client) CommandToken(ctx context.Context, i *Installation) (string, error) {
	account := Arg(i.BrokerArgs(), "command-account")
	if account == "" {
		return "", nil
	}
	seconds := int64(tokenSeconds)
	audience := cmp.Or(Arg(i.BrokerArgs(), "audience"), "credence-broker") + debugapi.CommandAudience
	request, err := c.Kube.CoreV1().ServiceAccounts(i.Namespace).CreateToken(ctx, account, &authenticationv1.TokenRequest{
		Spec: authenticationv1.TokenRequestSpec{Audiences: []string{audience}, ExpirationSeconds: &seconds},
	}, metav1.CreateOptions{})
	if err != nil {
		right := fmt.Sprintf("create serviceaccounts/token %s in namespace %s", account, i.Namespace)
		return "", fmt.Errorf("getting the token that brokers require with a command: %w", forbidden(err, right))
	}
	return request.Status.Token, nil
}
