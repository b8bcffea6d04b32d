package inject

import (
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"

	"github.com/credence-iam/credence/sidecar/contract"
	"github.com/credence-iam/credence/webhook/inject/podview"
)

// Environment variables of AWS SDKs.
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

// env returns the variables that c lacks.
func (p *plan) env(c podview.Container) []corev1.EnvVar {
	var vars []corev1.EnvVar
	// If the container sets one variable of the family, env adds none: the one that wins differs between SDKs and their
	// versions.
	if !p.hasContainerFamily(c) {
		vars = append(vars,
			corev1.EnvVar{Name: fullURI, Value: p.endpoint + contract.CredentialsPath},
			// The UID is unique, and in no manifest. It stops requests that an attacker makes an application send (SSRF).
			// It is not secret from users who may read the pod.
			fromUID(authorization))
	}
	// It is set with metadata "off", too, and the sidecar then returns 404 for every path. Without it, an SDK that finds
	// nothing else would call the node's metadata service and get the node's role. A container that needs that service
	// sets the variable itself.
	// The final slash is for the AWS CLI v2, which appends paths without a leading slash. Other SDKs then request
	// //latest, which the sidecar treats as /latest.
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

// injects reports whether v is a variable of the AWS_CONTAINER_ family with the value that env writes.
func (p *plan) injects(v corev1.EnvVar) bool {
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
