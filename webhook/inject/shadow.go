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

// What EKS Pod Identity sets, from its webhook's source and its user guide: the addresses of its agent on the node, and
// where the token for that agent is mounted.
const podIdentityTokens = "/var/run/secrets/pods.eks.amazonaws.com/"

var podIdentityAgents = []netip.Addr{netip.MustParseAddr("169.254.170.23"), netip.MustParseAddr("fd00:ec2::23")}

// ofPodIdentity reports whether v, a variable of the AWS_CONTAINER_ family, leads to EKS Pod Identity.
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
type otherIdentity struct{ variable, from, remove string }

// identityOf returns what SDKs in c would use in place of the annotated role, without any fall-through; nil for nothing.
func identityOf(c podview.Container) *otherIdentity {
	// Of variables of the same name, the last counts.
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

// shadowed looks for what would outrank the sidecar in the chains of AWS SDKs. It refuses web
// identity, which comes before container credentials in nearly all of them and never falls through
// when it fails; so the pod would run under another role than its annotation says, or under none. It refuses EKS Pod
// Identity, which takes the same variables as the sidecar, for the same reason.
func (p *plan) shadowed(c podview.Container, w *warnings) error {
	identity := identityOf(c)
	if identity != nil && p.cfg.OnShadowed != WarnShadowed {
		return credential.Errorf(credential.ErrInvalid, credential.ReasonShadowed,
			"container %q has %.100s%s, which SDKs prefer to the annotated role: remove it (and %s), or list the container in %q",
			c.Name, identity.variable, identity.from, identity.remove, p.cfg.Keys.Name(policy.SkipContainers))
	}
	if identity != nil {
		w.shadowf("container %q has %.100s%s: SDKs use that identity, not the annotated role", c.Name, identity.variable, identity.from)
	}
	for _, v := range outranking {
		if at := last(c.Env, v.name); at >= 0 && (v.evenEmpty || !empty(c.Env[at])) {
			w.shadowf("container %q has %s: %s", c.Name, v.name, v.what)
		}
	}
	switch at := slices.IndexFunc(c.Env, func(v corev1.EnvVar) bool {
		return strings.HasPrefix(v.Name, containerPrefix) && !p.ours(v)
	}); {
	case at >= 0:
		w.shadowf("container %q has %.100s: it is left as it is, and the annotated role is not added to it", c.Name, c.Env[at].Name)
	case has(c, fullURI) != has(c, authorization):
		w.shadowf("container %q has only one of %s and %s: it is left as it is, and does not get the annotated role; remove it, and both are added", c.Name, fullURI, authorization)
	}
	if at := last(c.Env, metadataEndpoint); at >= 0 && empty(c.Env[at]) {
		w.shadowf("container %q has an empty %s: SDKs that find nothing else go on to the node's metadata service, and so to the node's role; remove it", c.Name, metadataEndpoint)
	}
	if len(c.EnvFrom) > 0 {
		// Not kept: it is so in many pods in which nothing is wrong.
		w.addf("container %q has envFrom, which admission cannot see into: AWS_* variables in it may outrank the annotated role", c.Name)
	}
	return nil
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
