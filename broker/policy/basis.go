package policy

import (
	"encoding/json"

	"github.com/credence-iam/credence/broker/credential"
)

// Basis is why a pod may have its role, for a person who asks.
type Basis struct {
	// Role is the role that the pod requests, completed to an ARN. It is zero if the request does not parse, or needs a
	// base ARN that is not known.
	Role credential.RoleARN
	// Key is the annotation of the namespace that permits the role: [Permitted] or [AllowedRoles]. It is empty if none does.
	Key Key
	// Text is the expression, or the glob of the list, that matches the role.
	Text string
	// Entry is the entry of the rules file that applies to the namespace; empty without a file.
	Entry string
	// Grant is the session that the pod may have. It is zero with an error.
	Grant Grant
}

// Basis returns the decision of [Rules.Grant] about the pod, with its basis, and the same error. With an error, the basis
// has the parts that were decided before it.
func (r *Rules) Basis(pod Pod, ns Namespace) (b Basis, err error) {
	b.Grant, err = r.Grant(pod, ns)
	e := &evaluation{rules: r, namespace: ns.Name, mayCompute: true}
	if file := r.limits.Load(); file != nil {
		if limit, err := file.find(ns.Name); err == nil {
			b.Entry = limit.name
		}
	}
	s, parsed := pod.Request.Settings()
	if parsed != nil {
		return b, err
	}
	role, unresolved := r.resolve(s, ns)
	if b.Role = role; unresolved != nil {
		return b, err
	}
	permitted, arn := ns.Annotations[r.names.permitted], role.String()
	if ok, _ := matchExpression(e, permitted, arn); ok && permitted != "" {
		b.Key, b.Text = Permitted, permitted
		return b, err
	}
	var globs []string
	if json.Unmarshal([]byte(ns.Annotations[r.names.allowedRoles]), &globs) != nil {
		return b, err
	}
	for _, glob := range globs {
		one, _ := json.Marshal([]string{glob}) // never fails
		if ok, _ := matchAllowed(e, string(one), arn); ok {
			b.Key, b.Text = AllowedRoles, glob
			break
		}
	}
	return b, err
}
