// Package policy decides which AWS session a pod may have. It names and parses the annotations
// that users write, and turns (pod, namespace, rules) into a [Grant] or into a refusal that says
// what to change.
//
// It is pure: no clock, no randomness, no network. The webhook and the broker use the same code, so
// what admission accepts the broker grants. Only [Rules] makes a Grant, and the zero Rules
// refuses everything.
package policy

import (
	"fmt"
	"regexp"
	"slices"

	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/broker/typo"
)

// DefaultPrefix is the prefix of every key: the one kiam and kube2iam use, so that their manifests
// work unchanged.
const DefaultPrefix = "iam.amazonaws.com"

// Key is the part of a label or annotation key behind the prefix and the slash.
type Key string

// Labels and annotations of namespaces.
const (
	// Inject is the namespace label that opts a namespace in, when its value is [Enabled].
	Inject Key = "inject"
	// Permitted is a regular expression on the role's ARN (kiam's form).
	Permitted Key = "permitted"
	// AllowedRoles is a JSON list of globs on the role's ARN (kube2iam's form).
	AllowedRoles Key = "allowed-roles"
	// DefaultRole is the role of annotated pods whose own role is empty.
	DefaultRole Key = "default-role"
	// PermittedTags is a comma list of the session tag keys that pods may set.
	PermittedTags Key = "permitted-tags"
)

// Enabled is the value of the [Inject] label that opts in.
const Enabled = "enabled"

// Annotations of pods.
const (
	// Role is a role's name, /path/name or ARN; it asks for injection.
	Role Key = "role"
	// SessionName is the RoleSessionName, instead of the default one.
	SessionName Key = "session-name"
	// ExternalID is sent to STS for roles whose trust policy asks for one.
	ExternalID Key = "external-id"
	// SessionTags is key=value,… to put on the session.
	SessionTags Key = "session-tags"
	// SessionPolicy is an inline JSON policy that scopes the session down.
	SessionPolicy Key = "session-policy"
	// PolicyARNs is a comma list of managed policies that scope the session down.
	PolicyARNs Key = "policy-arns"
	// SessionScope says which pods share a session: role, service-account or pod.
	SessionScope Key = "session-scope"
	// Duration is the length of the session.
	Duration Key = "duration"
	// Region sets AWS_REGION and AWS_DEFAULT_REGION where unset.
	Region Key = "region"
	// Containers is a comma list of the only containers that get the environment.
	Containers Key = "containers"
	// SkipContainers is a comma list of containers that do not get the environment.
	SkipContainers Key = "skip-containers"
	// IMDS says how the sidecar emulates instance metadata: v2, v1 or off.
	IMDS Key = "imds"
	// StartTimeout is how long the application waits for first credentials.
	StartTimeout Key = "start-timeout"
	// SidecarMemory is the sidecar's memory, request and limit.
	SidecarMemory Key = "sidecar-memory"
	// SidecarCPURequest is the sidecar's CPU request.
	SidecarCPURequest Key = "sidecar-cpu-request"
	// SidecarCPULimit is the sidecar's CPU limit; 0 is none.
	SidecarCPULimit Key = "sidecar-cpu-limit"
	// SidecarPort is where the sidecar listens.
	SidecarPort Key = "sidecar-port"
	// SidecarLogLevel is the least level that the sidecar logs.
	SidecarLogLevel Key = "sidecar-log-level"
)

// What the webhook writes on pods.
const (
	// Injected is the pod label, with value "true", by which the broker finds injected pods.
	Injected Key = "injected"
	// ServiceAccount is the pod annotation that repeats spec.serviceAccountName, for prefetch. It
	// is a hint: the token decides.
	ServiceAccount Key = "service-account"
	// Warnings is the pod annotation with the webhook's warnings about credentials that outrank the annotated role, a
	// line each. Controllers that create pods show warnings to nobody; the broker makes an Event of it.
	Warnings Key = "warnings"
)

// written reports whether key is an annotation that the webhook writes, and that asks for nothing.
func written(key Key) bool { return key == ServiceAccount || key == Warnings }

var (
	podKeys = [...]Key{Role, SessionName, ExternalID, SessionTags, SessionPolicy, PolicyARNs, SessionScope,
		Duration, Region, Containers, SkipContainers, IMDS, StartTimeout,
		SidecarMemory, SidecarCPURequest, SidecarCPULimit, SidecarPort, SidecarLogLevel}
	namespaceKeys = []Key{Inject, Permitted, AllowedRoles, DefaultRole, PermittedTags}
)

// prefixForm is a DNS subdomain, as Kubernetes asks of the prefix of a label key.
var prefixForm = regexp.MustCompile(`^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$`)

// Keys makes full keys of one prefix. The zero Keys has no prefix and recognizes nothing.
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

// Annotated reports whether any annotation key is under the prefix, known or not: such a pod asks
// for something of ours and is never let through unseen.
func (k Keys) Annotated(annotations map[string]string) bool {
	for name := range annotations {
		if key, ok := k.cut(name); ok && !written(key) {
			return true
		}
	}
	return false
}

// OptedIn reports whether a namespace with these labels is opted in.
func (k Keys) OptedIn(labels map[string]string) bool {
	return k.prefix != "" && labels[k.Name(Inject)] == Enabled
}

// CheckOptedIn refuses a namespace that is not opted in, with what to do about it.
func (k Keys) CheckOptedIn(ns Namespace) error {
	if k.OptedIn(ns.Labels) {
		return nil
	}
	return credential.Errorf(credential.ErrDenied, credential.ReasonNamespaceNotOpted,
		"namespace %q is not opted in: label it %s=%s", ns.Name, k.Name(Inject), Enabled)
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

// refuseUnknown refuses pod annotations under the prefix that mean nothing: the first in the order of
// their names, so that one pod always gets the same answer.
func (k Keys) refuseUnknown(annotations map[string]string) error {
	var unknown []string
	for name := range annotations {
		if key, ok := k.cut(name); ok && !written(key) && !slices.Contains(podKeys[:], key) {
			unknown = append(unknown, name)
		}
	}
	name := slices.Min(unknown)
	key, _ := k.cut(name)
	if slices.Contains(namespaceKeys, key) {
		return credential.Errorf(credential.ErrInvalid, credential.ReasonAnnotationUnknown,
			"annotation %q has no meaning on a pod: set it on the namespace", name)
	}
	if len(key) > maxKey {
		return credential.Errorf(credential.ErrInvalid, credential.ReasonAnnotationUnknown,
			"annotation %.100q… is unknown, and longer than any known one", name)
	}
	return credential.Errorf(credential.ErrInvalid, credential.ReasonAnnotationUnknown,
		"annotation %q is unknown: did you mean %q?", name, k.Name(typo.Nearest(key, podKeys[:])))
}

// maxKey is the maximum length that Kubernetes allows for the name of an annotation behind its prefix. It checks that after
// admission, so the webhook can receive longer names.
const maxKey = 63
