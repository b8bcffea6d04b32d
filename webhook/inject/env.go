package inject

import (
	"slices"
	"strings"

	"github.com/credence-iam/credence/sidecar/contract"
	"github.com/credence-iam/credence/webhook/inject/podview"
	corev1 "k8s.io/api/core/v1"
)

// The environment of AWS SDKs.
const (
	containerPrefix  = "AWS_CONTAINER_"
	fullURI          = "AWS_CONTAINER_CREDENTIALS_FULL_URI"
	authorization    = "AWS_CONTAINER_AUTHORIZATION_TOKEN"
	metadataEndpoint = "AWS_EC2_METADATA_SERVICE_ENDPOINT"
	region           = "AWS_REGION"
	defaultRegion    = "AWS_DEFAULT_REGION"
	webIdentity      = "AWS_WEB_IDENTITY_TOKEN_FILE"
	uidFieldPath     = "metadata.uid"
)

// env returns the variables that container c lacks.
func (p *plan) env(c podview.Container) []corev1.EnvVar {
	var vars []corev1.EnvVar
	// All of the family or none: which of its members wins, when several are set, differs from SDK to
	// SDK and from version to version. The address is a literal of 127.0.0.1, the only form of the
	// loopback interface that all SDKs take.
	if !p.hasContainerFamily(c) {
		vars = append(vars,
			corev1.EnvVar{Name: fullURI, Value: p.endpoint + contract.CredentialsPath},
			// The UID is unique and stored nowhere. It keeps a request that an application was talked
			// into making (SSRF) from working; it is no secret from those who may read the pod.
			fromUID(authorization))
	}
	// Also with metadata "off": the sidecar then answers 404 to everything. Without the variable, an
	// SDK that finds nothing else would go on to the node's metadata service, and so to the node's
	// role. A container that needs the real service sets the variable itself.
	// With a slash at its end, because the AWS CLI v2 appends paths that begin without one. Those who append paths
	// that begin with one ask for //latest, which the sidecar takes for the same.
	if !has(c, metadataEndpoint) {
		vars = append(vars, corev1.EnvVar{Name: metadataEndpoint, Value: p.endpoint + "/"})
	}
	if p.requested.Region != "" && !has(c, region) && !has(c, defaultRegion) {
		vars = append(vars,
			corev1.EnvVar{Name: region, Value: p.requested.Region},
			corev1.EnvVar{Name: defaultRegion, Value: p.requested.Region})
	}
	return vars
}

func has(c podview.Container, name string) bool {
	return slices.ContainsFunc(c.Env, func(v corev1.EnvVar) bool { return v.Name == name })
}

func (p *plan) hasContainerFamily(c podview.Container) bool {
	return slices.ContainsFunc(c.Env, func(v corev1.EnvVar) bool { return strings.HasPrefix(v.Name, containerPrefix) })
}

// ours reports whether v is a variable of the AWS_CONTAINER_ family as this package writes it.
func (p *plan) ours(v corev1.EnvVar) bool {
	switch v.Name {
	case fullURI:
		return v.Value == p.endpoint+contract.CredentialsPath
	case authorization:
		return isFromUID(v)
	default:
		return false
	}
}

func fromUID(name string) corev1.EnvVar { return fromField(name, uidFieldPath) }

func fromField(name, path string) corev1.EnvVar {
	return corev1.EnvVar{Name: name, ValueFrom: &corev1.EnvVarSource{FieldRef: &corev1.ObjectFieldSelector{FieldPath: path}}}
}

func isFromUID(v corev1.EnvVar) bool {
	return v.ValueFrom != nil && v.ValueFrom.FieldRef != nil && v.ValueFrom.FieldRef.FieldPath == uidFieldPath
}
