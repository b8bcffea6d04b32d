package check

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/credence-iam/credence/operator/finding"
	"github.com/credence-iam/credence/operator/survey"
)

func podsNotInjected(s *snapshot, r *results) {
	if unread(r, s.Namespaces) || unread(r, s.Pods) {
		return
	}
	p := s.Pods.Value
	if p.Without.Count > 0 {
		r.fail("", &finding.Remedy{Who: finding.Author, What: "Recreate the pods; the webhook injects new ones", Commands: p.Without.Commands, Page: "docs/operations.md"},
			"%s of opted-in namespaces annotated but without a sidecar, probably older than the label of the namespace: %s", some(p.Without.Count, "pod"), &p.Without)
	}
	if p.NotOptedIn.Count > 0 {
		r.warn("", &finding.Remedy{Who: finding.NamespaceOwner, What: "Opt the namespace in, then recreate its pods. Or remove the annotations", Commands: p.NotOptedIn.Commands, Page: "docs/install.md"},
			"%s annotated in namespaces that are not opted in; SDKs there may use the node's role: %s", some(p.NotOptedIn.Count, "pod"), &p.NotOptedIn)
	}
	if p.Without.Count+p.NotOptedIn.Count == 0 {
		r.ok("%s, %d injected; all annotated pods have a sidecar", some(p.Total, "pod"), p.Injected)
	}
}

func sidecarVersions(s *snapshot, r *results) {
	if unread(r, s.Pods) {
		return
	}
	p := s.Pods.Value
	if p.Apart.Count > 0 {
		r.warn("", &finding.Remedy{Who: finding.Author, What: "Restart the workloads, so that the webhook injects its own version", Commands: p.Apart.Commands, Page: "docs/upgrade.md"},
			"%s more than one minor version from the webhook's %s: %s", some(p.Apart.Count, "sidecar"), s.WebhookVersion(), &p.Apart)
		return
	}
	var counts []string
	for _, version := range slices.Sorted(maps.Keys(p.Versions)) {
		counts = append(counts, fmt.Sprintf("%d of %s", p.Versions[version], version))
	}
	r.ok("%s: %s", some(p.Injected, "sidecar"), strings.Join(append(counts, "")[:max(1, len(counts))], ", "))
}

func sidecarContract(s *snapshot, r *results) {
	if unread(r, s.Pods) {
		return
	}
	if p := s.Pods.Value; p.Outdated.Count > 0 {
		r.fail("", &finding.Remedy{Who: finding.Author, What: "Restart the workloads, so that the webhook injects the names in use", Commands: p.Outdated.Commands, Page: "docs/upgrade.md"},
			"%s with a name of earlier settings, which cannot renew their credentials: %s", some(p.Outdated.Count, "sidecar"), &p.Outdated)
		return
	}
	r.ok("all sidecars use the audience, the trust ConfigMap and the broker address in use")
}

func sidecarsWaiting(s *snapshot, r *results) {
	if unread(r, s.Pods) {
		return
	}
	p := s.Pods.Value
	if p.Waiting.Count > 0 {
		r.warn("", &finding.Remedy{Who: finding.Author, What: "See in the sidecar's log why it has no credentials", Commands: p.Waiting.Commands, Page: "docs/errors.md"},
			"%s waiting for over %s for their first credentials: %s", some(p.Waiting.Count, "sidecar"), survey.Patience, &p.Waiting)
	}
	if p.Restarting.Count > 0 {
		r.warn("", &finding.Remedy{Who: finding.Author, What: "See in the log of the previous run why it ended", Commands: p.Restarting.Commands, Page: "docs/sidecar.md"},
			"%s restarted more than %d times: %s", some(p.Restarting.Count, "sidecar"), survey.MaxRestarts, &p.Restarting)
	}
	if p.Waiting.Count+p.Restarting.Count == 0 {
		r.ok("no sidecar waits for its first credentials, none restarts")
	}
}

func nodeVersions(s *snapshot, r *results) {
	if unread(r, s.Nodes) {
		return
	}
	if n := s.Nodes.Value; n.Old.Count > 0 {
		r.fail("", &finding.Remedy{Who: finding.ClusterAdmin, What: "Upgrade these nodes, or move pods away from them", Commands: n.Old.Commands, Page: "docs/install.md"},
			"%s older than Kubernetes 1.%d, without native sidecars: injected pods never start there: %s", some(n.Old.Count, "node"), survey.MinKubelet, &n.Old)
		return
	}
	r.ok("all nodes run native sidecars (%d)", s.Nodes.Value.Total)
}

func nodeMetadata(s *snapshot, r *results) {
	if unread(r, s.Nodes) {
		return
	}
	n := s.Nodes.Value
	if n.EC2 == 0 {
		r.ok("no node is an EC2 instance, by its provider ID")
		return
	}
	r.add(finding.Unknown, "", &finding.Remedy{
		Who: finding.AWSAdmin, What: "See that the hop limit is 1 and tokens are required",
		Commands: []string{"aws ec2 describe-instances --query 'Reservations[].Instances[].[InstanceId,MetadataOptions.HttpPutResponseHopLimit,MetadataOptions.HttpTokens]' --output text"},
		Page:     "docs/network.md#keep-pods-away-from-the-nodes-role",
	}, fmt.Sprintf("%s on EC2, whose hop limits the API server does not know: with more than 1, pods can use the node's role", some(n.EC2, "node")))
}
