package inject

import (
	"net/netip"
	"net/url"
	"path"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"

	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/broker/policy"
	"github.com/credence-iam/credence/webhook/inject/podview"
)

// outranking are the variables that SDKs prefer to a container's credentials endpoint, or on which they fail. They cause
// warnings only, because each has good uses: keys for another cloud's storage, a profile for settings that are not
// credentials.
var outranking = []struct {
	name        string
	alsoEmpty   bool // an empty value has an effect, too
	consequence string
}{
	{"AWS_ACCESS_KEY_ID", false, "SDKs use these keys, not the annotated role"},
	{"AWS_PROFILE", true, "botocore and Go fail if the profile does not exist, and other SDKs take their credentials from it"},
	{"AWS_DEFAULT_PROFILE", true, "botocore fails if the profile does not exist, and else takes its credentials from it"},
	{"AWS_SHARED_CREDENTIALS_FILE", false, "SDKs use credentials in that file, not the annotated role"},
	{"AWS_CONFIG_FILE", false, "SDKs use credentials to which the file leads, not the annotated role"},
}

// podIdentityTokens is the folder into which EKS Pod Identity mounts the token for its agent. The source code of its webhook
// has it.
const podIdentityTokens = "/var/run/secrets/pods.eks.amazonaws.com/"

// podIdentityAgents are the addresses of that agent on the node. The user guide of EKS has them.
var podIdentityAgents = []netip.Addr{netip.MustParseAddr("169.254.170.23"), netip.MustParseAddr("fd00:ec2::23")}

// ofPodIdentity reports whether v, a variable of the AWS_CONTAINER_ family, points to EKS Pod Identity.
func ofPodIdentity(v corev1.EnvVar) bool {
	if strings.HasPrefix(path.Clean(v.Value), podIdentityTokens) {
		return true
	}
	uri, err := url.Parse(strings.TrimSpace(v.Value))
	if err != nil {
		return false
	}
	address, err := netip.ParseAddr(uri.Hostname())
	return err == nil && slices.Contains(podIdentityAgents, address.WithZone("").Unmap())
}

// otherIdentity is a variable that gives a container an identity of its own.
type otherIdentity struct{ variable, from, source string }

// identityOf returns the identity that SDKs in c would use instead of the annotated role, with no fallback to it; nil if
// there is none.
func identityOf(c podview.Container) *otherIdentity {
	// The last of several variables with the same name counts.
	if at := last(c.Env, webIdentity); at >= 0 && !empty(c.Env[at]) {
		return &otherIdentity{webIdentity, "", "what sets it, such as the service account's eks.amazonaws.com/role-arn"}
	}
	var found *otherIdentity
	overridden := make(map[string]bool) // by a later variable of the same name
	for _, v := range slices.Backward(c.Env) {
		if !strings.HasPrefix(v.Name, containerPrefix) || overridden[v.Name] {
			continue
		}
		overridden[v.Name] = true
		if ofPodIdentity(v) {
			found = &otherIdentity{v.Name, " of EKS Pod Identity", "what sets it, such as a Pod Identity association of the service account"}
		}
	}
	return found
}

// shadowed finds variables that SDKs prefer to the sidecar. It refuses web identity: nearly all SDKs use it before
// container credentials, and do not fall back if it fails. The pod would run with another role than the annotated one,
// or with none. It refuses EKS Pod Identity, which uses the same variables as the sidecar, for the same reason.
func (p *plan) shadowed(c podview.Container, w *warnings) error {
	identity := identityOf(c)
	if identity != nil && p.cfg.OnShadowed != WarnShadowed {
		return credential.Errorf(credential.ErrInvalid, credential.ReasonShadowed,
			"container %q has %.100s%s, which SDKs prefer to the annotated role; remove it (and %s), or list the container in %q",
			c.Name, identity.variable, identity.from, identity.source, p.cfg.Keys.Name(policy.SkipContainers))
	}
	if identity != nil {
		w.shadowf("container %q sets %.100s%s, so SDKs use that identity, not the annotated role. Remove it at the end of the migration.", c.Name, identity.variable, identity.from)
	}
	for _, v := range outranking {
		if at := last(c.Env, v.name); at >= 0 && (v.alsoEmpty || !empty(c.Env[at])) {
			w.shadowf("container %q sets %s: %s. Remove it, unless it is for something else.", c.Name, v.name, v.consequence)
		}
	}
	switch at := slices.IndexFunc(c.Env, func(v corev1.EnvVar) bool {
		return strings.HasPrefix(v.Name, containerPrefix) && !p.injects(v)
	}); {
	case at >= 0:
		w.shadowf("container %q sets %.100s, so it does not get the annotated role. Remove the variable and the webhook sets its own.", c.Name, c.Env[at].Name)
	case has(c, fullURI) != has(c, authorization):
		set, missing := fullURI, authorization
		if has(c, authorization) {
			set, missing = missing, set
		}
		w.shadowf("container %q sets %s without %s, so it does not get the annotated role. Remove it and the webhook sets both.", c.Name, set, missing)
	}
	if at := last(c.Env, metadataEndpoint); at >= 0 && empty(c.Env[at]) {
		w.shadowf("container %q has an empty %s, so SDKs may call the node's metadata service and get the node's role. Remove the variable.", c.Name, metadataEndpoint)
	}
	if len(c.EnvFrom) > 0 {
		// The pod does not keep it, because many correct pods have envFrom.
		w.addf("container %q has envFrom, which the webhook cannot read. Check that it has no AWS_* variables that outrank the annotated role.", c.Name)
	}
	return nil
}

// last returns the index of the last variable with that name; -1 if there is none.
func last(env []corev1.EnvVar, name string) int {
	for at, v := range slices.Backward(env) {
		if v.Name == name {
			return at
		}
	}
	return -1
}

// empty reports whether SDKs treat v as unset. The SDKs for Go, Python and JavaScript were tried.
func empty(v corev1.EnvVar) bool { return v.Value == "" && v.ValueFrom == nil }
