package survey

import (
	"strings"

	authorizationv1 "k8s.io/api/authorization/v1"

	"github.com/credence-iam/credence/operator/installation"
)

// Right is what a ServiceAccount may do.
type Right struct {
	Who     string // component
	What    authorizationv1.SubjectAccessReviewSpec
	Allowed bool
}

// WebhookVersion returns the version of the webhook's Deployment.
func (s *Snapshot) WebhookVersion() string {
	if s.Found.Webhook == nil {
		return ""
	}
	return installation.ImageOf(s.Found.Webhook, "webhook").Label()
}

// wantedRights returns what the chart gives to the ServiceAccounts of brokers and webhook.
func (s *Snapshot) wantedRights() (all []Right) {
	add := func(component, namespace, group, resource, name string, verbs ...string) {
		for _, verb := range verbs {
			all = append(all, Right{Who: component, What: authorizationv1.SubjectAccessReviewSpec{ResourceAttributes: &authorizationv1.ResourceAttributes{
				Namespace: namespace, Group: group, Resource: resource, Name: name, Verb: verb,
			}}})
		}
	}
	const watchVerbs = "get list watch"
	for _, resource := range []string{"pods", "namespaces", "serviceaccounts"} {
		add("broker", "", "", resource, "", strings.Fields(watchVerbs)...)
	}
	if installation.Arg(s.Found.BrokerArgs(), "token-verification") == "tokenreview" {
		add("broker", "", "authentication.k8s.io", "tokenreviews", "", "create")
	} else {
		for _, path := range []string{"/openid/v1/jwks", "/.well-known/openid-configuration"} {
			all = append(all, Right{Who: "broker", What: authorizationv1.SubjectAccessReviewSpec{NonResourceAttributes: &authorizationv1.NonResourceAttributes{Path: path, Verb: "get"}}})
		}
	}
	add("broker", "", "events.k8s.io", "events", "", "create")
	add("broker", "", "", "configmaps", s.TrustName(), "list", "watch", "create", "patch")
	add("broker", "", "rbac.authorization.k8s.io", "clusterroles", installation.BrokerName, "get")
	add("broker", s.Namespace, "", "configmaps", s.TrustName(), "get")
	add("broker", s.Namespace, "discovery.k8s.io", "endpointslices", "", "list", "watch")
	add("broker", s.Namespace, "coordination.k8s.io", "leases", "", "create")
	add("broker", s.Namespace, "coordination.k8s.io", "leases", installation.BrokerName, "get", "update")
	add("webhook", "", "", "namespaces", "", strings.Fields(watchVerbs)...)
	accounts := map[string]string{"broker": installation.BrokerName, "webhook": installation.WebhookName}
	for component, d := range map[string]func() string{
		"broker":  func() string { return s.Found.Broker.Spec.Template.Spec.ServiceAccountName },
		"webhook": func() string { return s.Found.Webhook.Spec.Template.Spec.ServiceAccountName },
	} {
		if component == "broker" && s.Found.Broker == nil || component == "webhook" && s.Found.Webhook == nil {
			continue
		}
		if name := d(); name != "" {
			accounts[component] = name
		}
	}
	for i := range all {
		all[i].What.User = "system:serviceaccount:" + s.Namespace + ":" + accounts[all[i].Who]
		all[i].What.Groups = []string{"system:serviceaccounts", "system:serviceaccounts:" + s.Namespace, "system:authenticated"}
	}
	return all
}

// Can returns the right as the arguments of the subcommand "auth can-i" of kubectl.
func (r Right) Can() string {
	if n := r.What.NonResourceAttributes; n != nil {
		return n.Verb + " " + n.Path
	}
	a := r.What.ResourceAttributes
	text := a.Verb + " " + a.Resource
	if a.Group != "" {
		text += "." + a.Group
	}
	if a.Name != "" {
		text += "/" + a.Name
	}
	if a.Namespace != "" {
		return text + " -n " + a.Namespace
	}
	return text + " --all-namespaces"
}
