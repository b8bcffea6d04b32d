// Package policy decides which AWS session a pod may have. It names and parses the annotations that users write, and turns
// a pod, its namespace and the rules into a [Grant], or into a refusal that says what to change.
//
// It is pure: no clock, no randomness, no network. The webhook and the broker use the same code, so the broker grants what
// the webhook admits. Only [Rules] makes a Grant, and the zero Rules refuses everything.
package policy

import (
	"fmt"
	"regexp"
	"slices"
	"strings"

	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/broker/typo"
)

// DefaultPrefix is the default prefix of every key. kiam and kube2iam use it, so their manifests work unchanged.
const DefaultPrefix = "iam.amazonaws.com"

// Key is the part of a label or annotation key after the prefix and the slash.
type Key string

// Labels and annotations of namespaces.
const (
	// Inject is the label that opts a namespace in if its value is [Enabled].
	Inject Key = "inject"
	// Permitted is a regular expression on the role's ARN (kiam's form).
	Permitted Key = "permitted"
	// AllowedRoles is a JSON list of globs on the role's ARN (kube2iam's form).
	AllowedRoles Key = "allowed-roles"
	// DefaultRole is the role of annotated pods whose own [Role] is empty.
	DefaultRole Key = "default-role"
	// PermittedTags is a comma list of the keys of session tags that pods may set.
	PermittedTags Key = "permitted-tags"
)

// Enabled is the value of the label [Inject] that opts a namespace in.
const Enabled = "enabled"

// Annotations of pods.
const (
	// Role is a role's name, /path/name or ARN. It requests injection.
	Role Key = "role"
	// SessionName replaces the default RoleSessionName.
	SessionName Key = "session-name"
	// ExternalID is sent to STS, for roles whose trust policy requires one.
	ExternalID Key = "external-id"
	// SessionTags are the tags of the session, as key=value,….
	SessionTags Key = "session-tags"
	// SessionPolicy is an inline JSON policy that limits the session.
	SessionPolicy Key = "session-policy"
	// PolicyARNs is a comma list of managed policies that limit the session.
	PolicyARNs Key = "policy-arns"
	// SessionScope says which pods share a session: role, service-account or pod.
	SessionScope Key = "session-scope"
	// Duration is the session duration.
	Duration Key = "duration"
	// Region sets AWS_REGION and AWS_DEFAULT_REGION in containers that set neither.
	Region Key = "region"
	// Containers is a comma list of containers; only these get the environment.
	Containers Key = "containers"
	// SkipContainers is a comma list of containers that get no environment.
	SkipContainers Key = "skip-containers"
	// IMDS selects how the sidecar emulates instance metadata: v2, v1 or off.
	IMDS Key = "imds"
	// StartTimeout is how long the application waits for its first credentials.
	StartTimeout Key = "start-timeout"
	// SidecarMemory is the sidecar's memory request and memory limit.
	SidecarMemory Key = "sidecar-memory"
	// SidecarCPURequest is the sidecar's CPU request.
	SidecarCPURequest Key = "sidecar-cpu-request"
	// SidecarCPULimit is the sidecar's CPU limit; 0 means no limit.
	SidecarCPULimit Key = "sidecar-cpu-limit"
	// SidecarPort is the port on which the sidecar listens.
	SidecarPort Key = "sidecar-port"
	// SidecarLogLevel is the lowest level that the sidecar logs.
	SidecarLogLevel Key = "sidecar-log-level"
)

// The label and annotations that the webhook writes on pods.
const (
	// Injected is the pod label, with value "true", by which the broker finds injected pods.
	Injected Key = "injected"
	// ServiceAccount is the pod annotation that repeats spec.serviceAccountName, for prefetch. It is a hint: the token
	// decides.
	ServiceAccount Key = "service-account"
	// Warnings is the pod annotation with the webhook's warnings about credentials that outrank the annotated role, one a
	// line. Controllers that create pods show warnings to no user, so the broker writes an Event.
	Warnings Key = "warnings"
)

// byWebhook reports whether key is an annotation that the webhook writes. It requests nothing.
func byWebhook(key Key) bool { return key == ServiceAccount || key == Warnings }

// byLaterWebhooks begins the keys of annotations that later versions of the webhook may write. They request nothing, so an
// older broker or webhook ignores them. It refuses all other unknown keys, because these may limit what a pod gets.
//
// A user can write such an annotation before the version exists that knows it, and running pods keep it. So no version may
// trust it, and none may let it limit what a pod gets. It is a hint, such as [ServiceAccount].
const byLaterWebhooks = "injected-"

// ignored reports whether key is no request of the user.
func ignored(key Key) bool { return byWebhook(key) || strings.HasPrefix(string(key), byLaterWebhooks) }

var (
	podKeys = [...]Key{Role, SessionName, ExternalID, SessionTags, SessionPolicy, PolicyARNs, SessionScope,
		Duration, Region, Containers, SkipContainers, IMDS, StartTimeout,
		SidecarMemory, SidecarCPURequest, SidecarCPULimit, SidecarPort, SidecarLogLevel}
	namespaceKeys = []Key{Inject, Permitted, AllowedRoles, DefaultRole, PermittedTags}
)

// prefixForm is a DNS subdomain, which Kubernetes requires for the prefix of a label key.
var prefixForm = regexp.MustCompile(`^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$`)

// Keys makes the full keys of one prefix. The zero Keys has no prefix and recognizes no key.
type Keys struct {
	prefix string
}

// NewKeys returns the keys under prefix, which must be a DNS subdomain of at most 253 characters.
func NewKeys(prefix string) (Keys, error) {
	if len(prefix) > 253 || !prefixForm.MatchString(prefix) {
		return Keys{}, fmt.Errorf("annotation prefix %q is not a DNS subdomain such as %s", prefix, DefaultPrefix)
	}
	return Keys{prefix: prefix}, nil
}

// Prefix returns the prefix without the slash.
func (k Keys) Prefix() string { return k.prefix }

// Name returns the full label or annotation key, such as iam.amazonaws.com/role.
func (k Keys) Name(key Key) string { return k.prefix + "/" + string(key) }

// Annotated reports whether any annotation key is under the prefix, known or not, except those that the webhook writes. The
// webhook injects or refuses such a pod.
func (k Keys) Annotated(annotations map[string]string) bool {
	for name := range annotations {
		if key, ok := k.cut(name); ok && !byWebhook(key) {
			return true
		}
	}
	return false
}

// OptedIn reports whether a namespace with these labels is opted in.
func (k Keys) OptedIn(labels map[string]string) bool {
	return k.prefix != "" && labels[k.Name(Inject)] == Enabled
}

// CheckOptedIn refuses a namespace that is not opted in. The refusal says how to opt it in.
func (k Keys) CheckOptedIn(ns Namespace) error {
	if k.OptedIn(ns.Labels) {
		return nil
	}
	return credential.Errorf(credential.ErrDenied, credential.ReasonNamespaceNotOpted,
		"namespace %q is not opted in; label it %s=%s", ns.Name, k.Name(Inject), Enabled)
}

// cut splits the prefix off a full key.
func (k Keys) cut(name string) (Key, bool) {
	if k.prefix == "" {
		return "", false
	}
	at := len(k.prefix)
	if len(name) <= at || name[at] != '/' || name[:at] != k.prefix {
		return "", false
	}
	return Key(name[at+1:]), true
}

// refuseUnknown refuses pod annotations under the prefix that are unknown. It names the first by name, so that the message is
// the same each time.
func (k Keys) refuseUnknown(annotations map[string]string) error {
	var unknown []string
	for name := range annotations {
		if key, ok := k.cut(name); ok && !ignored(key) && !slices.Contains(podKeys[:], key) {
			unknown = append(unknown, name)
		}
	}
	name := slices.Min(unknown)
	key, _ := k.cut(name)
	if slices.Contains(namespaceKeys, key) {
		return credential.Errorf(credential.ErrInvalid, credential.ReasonAnnotationUnknown,
			"annotation %q has no meaning on a pod; set it on the namespace", name)
	}
	if len(key) > maxKey {
		return credential.Errorf(credential.ErrInvalid, credential.ReasonAnnotationUnknown,
			"annotation %.100q… is unknown, and longer than any known one; correct its name or remove it", name)
	}
	return credential.Errorf(credential.ErrInvalid, credential.ReasonAnnotationUnknown,
		"annotation %q is unknown; did you mean %q?", name, k.Name(typo.Nearest(key, podKeys[:])))
}

// maxKey is the maximum length that Kubernetes allows for the name of an annotation after its prefix. It checks that after
// admission, so the webhook can receive longer names.
const maxKey = 63
