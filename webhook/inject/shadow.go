package inject

import (
	"fmt"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"

	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/broker/policy"
)

// outranking are the variables that SDKs heed before a container's credentials endpoint, or fail on,
// and why each is worth a warning. They are warnings only, because each has good uses: keys for
// another cloud's storage, a profile for settings that are not credentials.
var outranking = []struct {
	name string
	// evenEmpty: an empty value does harm too.
	evenEmpty bool
	what      string
}{
	{"AWS_ACCESS_KEY_ID", false, "SDKs use these keys, not the annotated role"},
	{"AWS_PROFILE", true, "botocore and Go fail on a profile that does not exist, and others take their credentials from it"},
	{"AWS_DEFAULT_PROFILE", true, "botocore fails on a profile that does not exist, and takes its credentials from it"},
	{"AWS_SHARED_CREDENTIALS_FILE", false, "SDKs use credentials in that file, not the annotated role"},
	{"AWS_CONFIG_FILE", false, "SDKs use credentials that the file leads to, not the annotated role"},
}

// shadowed looks for what would outrank the sidecar in the chains of AWS SDKs. It refuses web
// identity, which comes before container credentials in nearly all of them and never falls through
// when it fails; so the pod would run under another role than its annotation says, or under none.
func (by *plan) shadowed(c container) (warnings []string, err error) {
	// Of variables of the same name, the last counts.
	if at := last(c.Env, webIdentity); at >= 0 && !empty(c.Env[at]) {
		if by.cfg.OnShadowed != WarnShadowed {
			return nil, credential.Errorf(credential.ErrInvalid, credential.ReasonShadowed,
				"container %q has %s, which SDKs prefer to the annotated role: remove it (and what sets it, such as the service account's eks.amazonaws.com/role-arn), or list the container in %q",
				c.Name, webIdentity, by.cfg.Keys.Name(policy.SkipContainers))
		}
		warnings = append(warnings, fmt.Sprintf("container %q has %s: SDKs use that identity, not the annotated role", c.Name, webIdentity))
	}
	for _, v := range outranking {
		if at := last(c.Env, v.name); at >= 0 && (v.evenEmpty || !empty(c.Env[at])) {
			warnings = append(warnings, fmt.Sprintf("container %q has %s: %s", c.Name, v.name, v.what))
		}
	}
	switch at := slices.IndexFunc(c.Env, func(v corev1.EnvVar) bool {
		return strings.HasPrefix(v.Name, containerPrefix) && !by.ours(v)
	}); {
	case at >= 0:
		warnings = append(warnings, fmt.Sprintf("container %q has %s: it is left as it is, and the annotated role is not added to it", c.Name, c.Env[at].Name))
	case has(c, fullURI) != has(c, authorization):
		warnings = append(warnings, fmt.Sprintf("container %q has only one of %s and %s: it is left as it is, and does not get the annotated role; remove it, and both are added", c.Name, fullURI, authorization))
	}
	if at := last(c.Env, metadataEndpoint); at >= 0 && empty(c.Env[at]) {
		warnings = append(warnings, fmt.Sprintf("container %q has an empty %s: SDKs that find nothing else go on to the node's metadata service, and so to the node's role; remove it", c.Name, metadataEndpoint))
	}
	if len(c.EnvFrom) > 0 {
		warnings = append(warnings, fmt.Sprintf("container %q has envFrom, which admission cannot see into: AWS_* variables in it may outrank the annotated role", c.Name))
	}
	return warnings, nil
}

func last(env []corev1.EnvVar, name string) int {
	for at, v := range slices.Backward(env) {
		if v.Name == name {
			return at
		}
	}
	return -1
}

// empty reports whether SDKs see v as unset: tried with those for Go, Python and JavaScript.
func empty(v corev1.EnvVar) bool { return v.Value == "" && v.ValueFrom == nil }
