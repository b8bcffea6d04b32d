// Package contract has the names that the webhook and the sidecar share: how the webhook starts the sidecar's program,
// and where SDKs find the sidecar. A pod keeps the names of the version that injected it. So if a name changes, both
// programs must accept the old one too.
package contract

import "strings"

// The container of the sidecar.
const (
	// ContainerName is the name of the init container.
	ContainerName = "credence-sidecar"
	// Binary is the path of the program in its image.
	Binary = "/credence-sidecar"
	// ProbeArgument makes the program wait until the sidecar in the same container has credentials. It may fail earlier to
	// report why there are none.
	ProbeArgument = "probe"
	// CheckArgument makes the program request credentials as an SDK does, in a container of the application.
	CheckArgument = "check"
)

// CredentialsPath is the path of AWS_CONTAINER_CREDENTIALS_FULL_URI.
const CredentialsPath = "/v1/credentials"

// envPrefix starts the name of each environment variable that the sidecar reads.
const envPrefix = "CREDENCE_"

// Flags of the sidecar. Each can be set by the environment variable that [Env] names, which is how the webhook sets them.
const (
	// Broker is HOST:PORT of the brokers.
	Broker = "broker"
	// BrokerDNSName is the full DNS name of the brokers, with its final dot.
	BrokerDNSName = "broker-dns-name"
	// RoutingKey determines which brokers own the pod's session.
	RoutingKey = "routing-key"
	// PodUID completes the routing key of a pod whose session is not shared.
	PodUID = "pod-uid"
	// Listen is the loopback address that the sidecar serves on.
	Listen = "listen"
	// TokenFile has the pod's token for the broker.
	TokenFile = "token-file"
	// RootsFile has the root certificates of the brokers.
	RootsFile = "roots-file"
	// Authorization is the value that requests for credentials must carry.
	Authorization = "authorization"
	// Metadata is the form of the emulated instance metadata.
	Metadata = "metadata"
	// Zone is the availability zone of the pod's node.
	Zone = "zone"
	// StartTimeout limits how long the application waits for its first credentials.
	StartTimeout = "start-timeout"
	// LogLevel is the lowest level that the sidecar logs.
	LogLevel = "log-level"
)

// Env returns the name of the environment variable that sets a flag.
func Env(flag string) string {
	return envPrefix + strings.ToUpper(strings.ReplaceAll(flag, "-", "_"))
}
