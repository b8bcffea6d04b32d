// Package snapshot reads what the user of the credence command may see of one pod, or one controller, and of all that its
// credentials need: the namespace, the controller, Events, the sidecar's log, the webhook, the brokers and their sessions.
//
// It guarantees: it changes nothing and reads no Secret; what cannot be read does not stop the rest, and Problems says
// which right is missing; a part that does not respond within a second counts as such. It draws no conclusions: package
// explain does.
package snapshot

import (
	"crypto/x509"
	"strings"
	"time"

	admissionregistrationv1 "k8s.io/api/admissionregistration/v1"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/broker/debugapi"
	"github.com/credence-iam/credence/broker/policy"
	"github.com/credence-iam/credence/operator/finding"
	"github.com/credence-iam/credence/operator/installation"
	"github.com/credence-iam/credence/sidecar/contract"
	"github.com/credence-iam/credence/webhook/inject"
)

// Judge decides as the webhook of the cluster does. The command makes it from the arguments of the webhook.
type Judge struct {
	// Injector injects with the sidecar settings of the cluster. Nil: they are not known.
	Injector *inject.Injector
	// Rules decide on roles, by the rules file if it is valid.
	Rules *policy.Rules
	// RulesErr is why the rules file is invalid; nil if it is valid, or if there is none.
	RulesErr error
	// Rebase returns Rules with another base ARN, for a webhook that leaves names of roles to the brokers.
	Rebase func(base credential.RoleBase) *policy.Rules
}

// Workload is a controller with a pod template.
type Workload struct {
	// Kind is as in a manifest: Deployment.
	Kind     string
	Meta     metav1.ObjectMeta
	Template corev1.PodTemplateSpec
	// Wanted is how many pods it should have, if that is known. Pods is how many it has.
	Wanted, Pods int
}

// Resource returns the workload as arguments of kubectl name it: deployment/cart.
func (w *Workload) Resource() string { return strings.ToLower(w.Kind) + "/" + w.Meta.Name }

// Message is an Event, or a condition with the same content.
type Message struct {
	Object string // pod/app
	Reason string
	Text   string
	Time   time.Time
}

// Problem is why a part of the snapshot is not known.
type Problem string

// Sources of a snapshot, for Problems.
const (
	SourceNamespace     = "namespace"
	SourceEvents        = "events"
	SourceLog           = "log"
	SourceTrust         = "trust"
	SourceConfiguration = "configuration"
	SourceBrokers       = "brokers"
	SourceGrants        = "grants"
	SourcePolicies      = "policies"
	SourceRBAC          = "rbac"
	SourceEnvironment   = "environment"
	SourceTrial         = "trial"
	SourceCertificate   = "certificate"
)

// Snapshot is what the user may see of one pod and of what its credentials need. Parts that could not be read are zero, and
// Problems says why.
type Snapshot struct {
	// Now is the time of the API server.
	Now time.Time
	// Target has the flags that choose the cluster, for the commands of remedies.
	Target finding.Cluster
	// File is the manifest that the subject is from; empty if it is in the cluster.
	File string

	Namespace     *corev1.Namespace
	NamespaceName string
	// Pod is the pod. It is nil if the controller has none, and for manifests of controllers.
	Pod *corev1.Pod
	// Workload is the controller that the user of the cluster made, such as a Deployment. Nil: the pod has none.
	Workload *Workload
	// Messages are about the pod and its controllers, newest first.
	Messages []Message
	// Log is what the sidecar logged last, oldest first.
	Log []LogLine
	// Trust is the ConfigMap with the brokers' roots in the namespace. TrustGone: there is none.
	Trust     *corev1.ConfigMap
	TrustGone bool
	// Variables are the ConfigMaps from which containers take their environment, by name.
	Variables map[string]*corev1.ConfigMap
	// Policies are the NetworkPolicies of the pod's namespace and of that of the brokers.
	Policies []networkingv1.NetworkPolicy
	// BrokersNamespace has the labels of the namespace of the brokers.
	BrokersNamespace *corev1.Namespace

	// Trial is the result of [Snapshot.Try]; nil without a trial.
	Trial *Trial

	Installation Installation
	Judge        Judge
	// Problems are why parts are not known, by source.
	Problems map[string]Problem
}

// Installation is the part of a snapshot that all pods share.
type Installation struct {
	// Found are Deployments and settings. Nil: there is no Credence, as far as the user may see.
	Found *installation.Installation
	// Configuration is the MutatingWebhookConfiguration. ConfigurationGone: there is none.
	Configuration     *admissionregistrationv1.MutatingWebhookConfiguration
	ConfigurationGone bool
	// WebhookPods are the webhook's pods.
	WebhookPods []corev1.Pod
	// WebhookTLS is the certificate that the webhook serves; nil if it is not known.
	WebhookTLS *Serving
	// Brokers are the brokers' pods, with what each says.
	Brokers []Broker
	// Identity is the role that AWS gives the brokers; empty if it is not known.
	Identity string
	// MissingRights are objects without which the brokers have no rights in the cluster.
	MissingRights []string
}

// Broker is one broker.
type Broker struct {
	Pod corev1.Pod
	// Grants are those of the pod's role, or those that could be.
	Grants []debugapi.Grant
	// Known: Grants were read.
	Known bool
	// Time is the broker's clock minus that of the API server; 0 if it is not known.
	Clock time.Duration
	// Problem is why the broker is not ready: by its own check, or by an Event.
	Problem string
	// TLS is the certificate that it serves; nil if it is not known.
	TLS *Serving
}

// Serving is a certificate that a server presents.
type Serving struct {
	From, Until time.Time
	// Untrusted is why clients do not accept it: the error of a verification without regard to time. Empty: they do.
	Untrusted string

	name  string
	chain []*x509.Certificate
}

// Keys returns the keys of labels and annotations.
func (s *Snapshot) Keys() policy.Keys {
	if s.Judge.Rules != nil {
		return s.Judge.Rules.Keys()
	}
	keys, _ := policy.NewKeys(policy.DefaultPrefix) // never fails
	return keys
}

// Meta returns the metadata of the pod, or of the template from which pods would be made.
func (s *Snapshot) Meta() metav1.ObjectMeta {
	if s.Pod != nil {
		return s.Pod.ObjectMeta
	}
	if s.Workload != nil {
		return s.Workload.Template.ObjectMeta
	}
	return metav1.ObjectMeta{}
}

// Spec returns the spec of the pod or of the template.
func (s *Snapshot) Spec() *corev1.PodSpec {
	switch {
	case s.Pod != nil:
		return &s.Pod.Spec
	case s.Workload != nil:
		return &s.Workload.Template.Spec
	}
	return &corev1.PodSpec{}
}

// PolicyPod returns the pod as package policy sees it.
func (s *Snapshot) PolicyPod() policy.Pod {
	meta, account := s.Meta(), s.Spec().ServiceAccountName
	if account == "" {
		account = "default"
	}
	return policy.Pod{
		Namespace: s.NamespaceName, Name: meta.Name, UID: string(meta.UID), ServiceAccount: account,
		Request: s.Keys().Request(meta.Annotations),
	}
}

// PolicyNamespace returns the namespace as package policy sees it.
func (s *Snapshot) PolicyNamespace() policy.Namespace {
	ns := policy.Namespace{Name: s.NamespaceName}
	if s.Namespace != nil {
		ns.Labels, ns.Annotations = s.Namespace.Labels, s.Namespace.Annotations
	}
	return ns
}

// Sidecar returns the sidecar of the pod; nil if it has none.
func (s *Snapshot) Sidecar() *corev1.Container {
	for i, c := range s.Spec().InitContainers {
		if c.Name == contract.ContainerName {
			return &s.Spec().InitContainers[i]
		}
	}
	return nil
}

// SidecarStatus returns the state of the sidecar of the pod; nil if there is none.
func (s *Snapshot) SidecarStatus() *corev1.ContainerStatus {
	if s.Pod == nil {
		return nil
	}
	for i, c := range s.Pod.Status.InitContainerStatuses {
		if c.Name == contract.ContainerName {
			return &s.Pod.Status.InitContainerStatuses[i]
		}
	}
	return nil
}
