package check

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	apierrors "k8s.io/apimachinery/pkg/api/errors"

	"github.com/credence-iam/credence/operator/finding"
	"github.com/credence-iam/credence/operator/installation"
	"github.com/credence-iam/credence/operator/survey"
)

func installationFound(s *snapshot, r *results) {
	for _, err := range s.Found.Problems {
		object := strings.TrimPrefix(strings.SplitN(err.Error(), ":", 2)[0], "reading ")
		switch {
		case apierrors.IsForbidden(err):
			r.add(finding.Unknown, "", nil, "not checked; needs: get "+object)
		case apierrors.IsNotFound(err):
			r.fail("", s.reinstall("Install the chart again"), "%s does not exist", object)
		default:
			r.add(finding.Unknown, "", nil, "not checked: "+err.Error())
		}
	}
	if len(r.findings) == 0 {
		r.ok("found in namespace %s", s.Namespace)
	}
}

func kubernetesVersion(s *snapshot, r *results) {
	if unread(r, s.Server) {
		return
	}
	if installation.OlderKubernetes(s.Server.Value.Major+"."+s.Server.Value.Minor, installation.OldestKubernetes) {
		r.fail("", &finding.Remedy{Who: finding.ClusterAdmin, What: fmt.Sprintf("Upgrade the control plane to Kubernetes 1.%d or newer", installation.OldestKubernetes), Page: "docs/install.md"},
			"the API server is of %s, Credence needs 1.%d", s.Server.Value.GitVersion, installation.OldestKubernetes)
		return
	}
	r.ok("the API server is of %s", s.Server.Value.GitVersion)
}

func versions(s *snapshot, r *results) {
	if unread(r, s.Own) {
		return
	}
	count := make(map[string]bool) // "broker 0.1.0"
	var all []string               // versions
	for component, members := range map[string][]survey.Member{"webhook": s.Webhooks, "broker": s.Brokers} {
		for _, m := range members {
			for _, c := range m.Pod.Spec.Containers {
				if c.Name == component {
					version := installation.Image(c.Image).Label()
					count[component+" "+version] = true
					all = append(all, version)
				}
			}
		}
	}
	if sidecar := installation.Image(installation.Arg(s.Found.WebhookArgs(), "sidecar-image")); sidecar != "" {
		count["sidecar "+sidecar.Label()] = true
		all = append(all, sidecar.Label())
	}
	slices.Sort(all)
	all = slices.Compact(all)
	text := strings.Join(slices.Sorted(maps.Keys(count)), ", ")
	rollout := func(name string) string {
		return s.Target.Command("kubectl -n %s rollout status deployment/%s", s.Namespace, name)
	}
	remedy := &finding.Remedy{
		Who: finding.ClusterAdmin, What: "Finish the upgrade of the chart, or roll it back", Page: "docs/upgrade.md",
		Commands: []string{rollout(installation.WebhookName), rollout(installation.BrokerName)},
	}
	for _, a := range all {
		for _, b := range all {
			if installation.Apart(a, b) > installation.MaxApart {
				r.fail("", remedy, "parts are more than one minor version apart, which is not supported: %s", text)
				return
			}
		}
	}
	if len(all) > 1 {
		r.warn("", remedy, "parts have different versions, as during an upgrade: %s", text)
		return
	}
	for _, v := range all {
		if installation.Apart(s.Version, v) > installation.MaxApart {
			r.warn("", &finding.Remedy{Who: finding.ClusterAdmin, What: "Use this command in version " + v, Page: "docs/upgrade.md"},
				"this command is of version %s, more than one minor version from the cluster's %s", s.Version, v)
			return
		}
	}
	if text == "" {
		text = "no pod of Credence runs"
	}
	r.ok("%s", text)
}

// canI returns the command that shows whether a user has a right, which is written as its arguments.
func (s *snapshot) canI(right string, more ...string) string {
	return s.Target.Kubectl(slices.Concat([]string{"auth", "can-i"}, strings.Fields(right), more)...)
}

func rights(s *snapshot, r *results) {
	if unread(r, s.Rights) {
		return
	}
	var missing survey.Tally
	for _, right := range s.Rights.Value {
		if !right.Allowed {
			missing.Add(right.Who+": "+right.Can(), s.canI(right.Can(), "--as="+right.What.User))
		}
	}
	if missing.Count > 0 {
		r.fail("", &finding.Remedy{Who: finding.ClusterAdmin, What: "Install the chart again; it gives these rights. The commands show them", Commands: missing.Commands, Page: "docs/install.md"},
			"%s missing: %s", some(missing.Count, "right"), &missing)
		return
	}
	r.ok("brokers and webhook have their %s", some(len(s.Rights.Value), "right"))
}
