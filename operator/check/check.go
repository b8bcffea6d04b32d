// Package check looks at an installation of Credence and reports what is wrong with it, or at a cluster before an
// installation: each finding has its cause, the person who can fix it, and the commands. The order of the checks is that in
// which a credential travels, so the first failure is the cause of later ones.
//
// It guarantees: it changes nothing and reads no Secret; it uses only the rights of its user, and says which one is
// missing. All checks are pure functions of what package survey saw. It does not look at one pod in detail.
package check

import (
	"context"
	"fmt"
	"io"
	"slices"
	"time"

	"github.com/credence-iam/credence/broker/policy"
	"github.com/credence-iam/credence/broker/rulesfile"
	"github.com/credence-iam/credence/operator/finding"
	"github.com/credence-iam/credence/operator/installation"
	"github.com/credence-iam/credence/operator/survey"
)

// Config configures a check. Its zero value checks the whole cluster.
type Config struct {
	// Version is the version of this program, to compare with those of webhook and brokers.
	Version string
	// Namespace limits the checks of namespaces and pods to this one. Default: all.
	Namespace string
	// Quick leaves out all checks but those of the way to the first credentials of a new pod: the webhook and its
	// certificate, the brokers and theirs, and the trust of the namespaces. It takes a second.
	Quick bool
	// Ignore has the IDs of checks that are left out.
	Ignore []string
	// Target has the flags that choose the cluster, for the commands of remedies.
	Target finding.Cluster
}

// check is one row of docs/check.md.
type check struct {
	id, group string
	worst     finding.State // of its findings
	means     string        // what is wrong if it fails
	fix       string
	quick     bool
	run       func(*snapshot, *results)
}

// group names, in the order of a report.
const (
	groupCluster    = "Cluster and versions"
	groupAdmission  = "Webhook and admission"
	groupBrokers    = "Brokers"
	groupAWS        = "Sessions and AWS"
	groupNamespaces = "Namespaces"
	groupPods       = "Pods"
	groupTarget     = "Namespace of Credence"
)

// installed are the checks of an installation.
var installed = []check{
	{"installation", groupCluster, finding.Failed, "A Deployment or a ConfigMap of the chart does not exist.", "Install the chart again.", true, installationFound},
	{"kubernetes-version", groupCluster, finding.Failed, "The API server is older than 1.30, the oldest that Credence supports.", "Upgrade the control plane.", false, kubernetesVersion},
	{"node-versions", groupCluster, finding.Failed, "A kubelet older than 1.29 runs no native sidecars, so injected pods never start there.", "Upgrade or drain the named nodes.", false, nodeVersions},
	{"versions", groupCluster, finding.Failed, "Webhook, brokers, sidecars and this command are more than one minor version apart, or an upgrade has not finished.", "Finish the upgrade, one minor version at a time.", false, versions},
	{"rights", groupCluster, finding.Failed, "The brokers' or the webhook's ServiceAccount lacks a right that the chart gives.", "Install the chart's ClusterRoles, Roles and bindings again.", false, rights},
	{"webhook-pods", groupAdmission, finding.Failed, "No webhook is ready, so annotated pods of opted-in namespaces are refused; or fewer are ready than the Deployment wants.", "The finding has the reason of each pod.", true, webhookPods},
	{"webhook-configuration", groupAdmission, finding.Failed, "The API server does not call the webhook for annotated pods as the chart asks for.", "Install the chart again.", true, webhookConfiguration},
	{"webhook-certificate", groupAdmission, finding.Failed, "The API server cannot verify the certificate that the webhook serves, or it expires soon.", "Make cert-manager and its cainjector work, or correct the roots.", true, webhookCertificate},
	{"injection", groupAdmission, finding.Failed, "The API server calls the webhook for a PodTemplate in a dry run and does not get it back with a sidecar.", "The finding has the API server's words, often a firewall between it and the webhook.", false, injection},
	{"admission-policies", groupAdmission, finding.Failed, "A ValidatingAdmissionPolicy of the chart or its binding is missing or changed, so pods could start without a sidecar or change their role.", "Install the chart again.", false, admissionPolicies},
	{"other-webhooks", groupAdmission, finding.Warning, "kiam, kube2iam or another webhook uses the same annotations.", "Migrate one namespace at a time, then remove it.", false, otherWebhooks},
	{"broker-pods", groupBrokers, finding.Failed, "No broker is ready, so new pods get no credentials; or fewer are ready than the Deployment wants.", "The finding has what each broker waits for.", true, brokerPods},
	{"broker-agreement", groupBrokers, finding.Failed, "Brokers differ in version or arguments, or the Service does not list a ready broker.", "Finish or undo the rollout.", true, brokerAgreement},
	{"shared-arguments", groupBrokers, finding.Failed, "Webhook and brokers differ in an argument that both need, such as the audience of tokens.", "Upgrade with the chart's value, which sets both.", true, sharedArguments},
	{"broker-certificate", groupBrokers, finding.Failed, "Sidecars cannot verify the certificate that a broker serves, or it expires soon.", "Make cert-manager renew it, and see that its root is published.", true, brokerCertificate},
	{"certificates", groupBrokers, finding.Failed, "A Certificate of cert-manager is not ready, or its renewal is overdue.", "See the events of the Certificate.", false, certificates},
	{"config-files", groupBrokers, finding.Failed, "The brokers or the webhook rejected the rules file or the sidecar settings, and use an earlier one.", "Correct the named line, before they restart.", false, configFiles},
	{"metrics", groupBrokers, finding.Failed, "A broker lost audit lines or Events, or refused pods because of an error of its own; or it or a webhook does not hear from the API server.", "The finding has the number; docs/operations.md has the rest.", false, metricsInBounds},
	{"aws-identity", groupAWS, finding.Failed, "AWS refuses the brokers' own credentials, or they end soon.", "Correct the identity of the brokers.", false, awsIdentity},
	{"sts", groupAWS, finding.Warning, "The last fetch of a session failed by no fault of its role, or one in a hundred STS calls takes over 5 s.", "See the path to STS, and AWS's status.", false, stsCalls},
	{"clock-skew", groupAWS, finding.Failed, "A broker's clock and AWS's are more than a minute apart. At 5 minutes AWS refuses all calls.", "Correct the time of the broker's node.", false, clockSkew},
	{"rate-budget", groupAWS, finding.Warning, "Renewals need more than 0.8 of the STS rate, renewals are late, or STS throttles.", "Raise the rate, or use fewer sessions.", false, rateBudget},
	{"sessions", groupAWS, finding.Warning, "Pods use sessions that are not cached, that end soon, that AWS refuses, or that only one broker has.", "The finding names roles and reasons.", false, sessions},
	{"opt-in-labels", groupNamespaces, finding.Failed, "The inject label of a namespace has a value that opts nothing in. With `-n`: the namespace does not exist, or is not opted in.", "Write enabled, or disabled.", false, optInLabels},
	{"trust", groupNamespaces, finding.Failed, "An opted-in namespace lacks the brokers' current roots, so its pods cannot start or cannot verify brokers.", "See why the brokers cannot write the ConfigMap.", true, trust},
	{"permitted-roles", groupNamespaces, finding.Failed, "An opted-in namespace permits no role, or its annotation is invalid.", "Correct the namespace's annotation or the rules file.", false, permittedRoles},
	{"permits-any-role", groupNamespaces, finding.Warning, "A namespace permits all roles, of all accounts or of one. Each author of a pod there can use each role that the brokers may assume.", "Permit the roles that the namespace needs, or limit it by the rules file.", false, permitsAnyRole},
	{"pod-security", groupNamespaces, finding.Warning, "The PodSecurity label of an opted-in namespace has no valid level.", "Correct the label.", false, podSecurity},
	{"pods-not-injected", groupPods, finding.Failed, "Annotated pods run without a sidecar and may use the node's role.", "Recreate them.", false, podsNotInjected},
	{"sidecar-versions", groupPods, finding.Warning, "Sidecars are more than one minor version older or newer than the webhook.", "Restart the named workloads.", false, sidecarVersions},
	{"sidecar-contract", groupPods, finding.Failed, "Sidecars have an audience, a trust ConfigMap or a broker address that is no longer in use.", "Restart the named workloads.", false, sidecarContract},
	{"sidecars-waiting", groupPods, finding.Warning, "Sidecars have waited over two minutes for their first credentials, or restart again and again.", "credence explain has the reason of a pod.", false, sidecarsWaiting},
	{"node-metadata", groupPods, finding.Unknown, "Pods may reach the node's metadata service, and so the node's role. The hop limit cannot be seen from here.", "Set the hop limit to 1 and require tokens.", false, nodeMetadata},
}

// onlyBefore are the checks that are run only before an installation.
var onlyBefore = []check{
	{"cert-manager", groupCluster, finding.Failed, "cert-manager is not installed, or its API does not accept a Certificate.", "Install it, or bring Secrets of your own.", false, certManager},
	{"your-rights", groupCluster, finding.Failed, "You lack a right that helm install needs.", "Ask a cluster admin to install, or for the right.", false, yourRights},
	{"existing-installation", groupTarget, finding.Warning, "The cluster already has objects of Credence. Two installations in one cluster do not work.", "Upgrade or uninstall the existing one.", false, existingInstallation},
	{"target-pod-security", groupTarget, finding.Warning, "The PodSecurity label of the namespace for Credence has no valid level.", "Correct the label.", false, targetPodSecurity},
	{"target-network", groupTarget, finding.Warning, "A NetworkPolicy of the namespace for Credence denies all traffic that no other policy allows.", "Set networkPolicy.enabled of the chart, and allow egress to STS, DNS and the API server.", false, targetNetwork},
}

// before are the checks before an installation, some of which are also those of an installation. all are all.
var (
	before = slices.Concat(named("kubernetes-version", "node-versions"), onlyBefore[:2], named("other-webhooks"), onlyBefore[2:])
	all    = slices.Concat(installed, onlyBefore)
)

// named returns checks of an installation.
func named(ids ...string) []check {
	return slices.DeleteFunc(slices.Clone(installed), func(c check) bool { return !slices.Contains(ids, c.id) })
}

// Result is what a check found.
type Result struct {
	// Version is the version of this program, Namespace that of Credence.
	Version   string `json:"version"`
	Namespace string `json:"namespace"`
	// State is the worst state of all findings.
	State  finding.State    `json:"state"`
	Groups []finding.Report `json:"groups"`
}

// snapshot is what was seen.
type snapshot struct {
	*survey.Snapshot

	rulesErr error // of the text of the rules file
}

// results collects the findings of one check.
type results struct {
	id       string
	findings []finding.Finding
}

func (r *results) ok(format string, args ...any) {
	r.add(finding.OK, "", nil, fmt.Sprintf(format, args...))
}

func (r *results) warn(subject string, m *finding.Remedy, format string, args ...any) {
	r.add(finding.Warning, subject, m, fmt.Sprintf(format, args...))
}

func (r *results) fail(subject string, m *finding.Remedy, format string, args ...any) {
	r.add(finding.Failed, subject, m, fmt.Sprintf(format, args...))
}

func (r *results) add(state finding.State, subject string, m *finding.Remedy, text string) {
	r.findings = append(r.findings, finding.Finding{Step: r.id, Subject: subject, State: state, Text: text, Remedy: m})
}

// maxFindings limits the findings of one check: there can be 63 brokers.
const maxFindings = 5

// bound removes findings beyond the limit, the harmless ones first.
func (r *results) bound() {
	severity := []finding.State{finding.Failed, finding.Warning, finding.Unknown, finding.OK}
	slices.SortStableFunc(r.findings, func(a, b finding.Finding) int {
		return slices.Index(severity, a.State) - slices.Index(severity, b.State)
	})
	if more := len(r.findings) - maxFindings; more > 0 {
		r.findings = r.findings[:maxFindings]
		r.findings[maxFindings-1].Text += fmt.Sprintf("; and %d more like this", more)
	}
}

// unread adds a finding if a part could not be read, and reports whether that is so.
func unread[T any](r *results, p survey.Part[T]) bool {
	if p.Err == nil {
		return false
	}
	if p.Forbidden() {
		r.add(finding.Unknown, "", nil, "not checked; needs: "+p.Needs)
	} else {
		r.add(finding.Unknown, "", nil, "not checked: "+p.Err.Error())
	}
	return true
}

// Run checks the installation. Its error is that of ctx.
func Run(ctx context.Context, client *installation.Client, found *installation.Installation, cfg Config) (*Result, error) {
	s := &snapshot{}
	limits := (*policy.File)(nil)
	if found.Rules != "" {
		file, err := rulesfile.Parse([]byte(found.Rules))
		if s.rulesErr = err; err == nil {
			limits = &file
		}
	}
	s.Snapshot = survey.Gather(ctx, client, found, survey.Config{Version: cfg.Version, Namespace: cfg.Namespace, Quick: cfg.Quick, Limits: limits, Target: cfg.Target})
	return run(ctx, s, installed, cfg)
}

// Before checks a cluster before Credence is installed in a namespace, which need not exist yet.
func Before(ctx context.Context, client *installation.Client, namespace string, cfg Config) (*Result, error) {
	return run(ctx, &snapshot{Snapshot: survey.Before(ctx, client, namespace, cfg.Target)}, before, cfg)
}

func run(ctx context.Context, s *snapshot, checks []check, cfg Config) (*Result, error) {
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	return s.report(checks, cfg), nil
}

// report runs the checks on a snapshot. It is a pure function of both.
func (s *snapshot) report(checks []check, cfg Config) *Result {
	result := &Result{Version: cfg.Version, Namespace: s.Namespace, State: finding.OK}
	var whole finding.Report
	for _, c := range checks {
		if cfg.Quick && !c.quick || slices.Contains(cfg.Ignore, c.id) {
			continue
		}
		r := &results{id: c.id}
		c.run(s, r)
		r.bound()
		if n := len(result.Groups); n == 0 || result.Groups[n-1].Subject != c.group {
			result.Groups = append(result.Groups, finding.Report{Subject: c.group})
		}
		result.Groups[len(result.Groups)-1].Add(r.findings...)
		whole.Add(r.findings...)
	}
	result.State = whole.Worst()
	return result
}

// IDs returns the IDs of all checks, for Config.Ignore.
func IDs() []string {
	var ids []string
	for _, c := range all {
		ids = append(ids, c.id)
	}
	return ids
}

// Healthy reports whether nothing failed and there is no warning.
func (r *Result) Healthy() bool { return r.State == finding.OK || r.State == finding.Unknown }

// cause returns the first finding of the worst state.
func (r *Result) cause() (finding.Finding, bool) {
	var whole finding.Report
	for _, g := range r.Groups {
		whole.Add(g.Findings...)
	}
	return whole.Cause()
}

// Write prints the result for a terminal, by group, and a summary. If style.Quiet and all is well, it prints nothing.
func (r *Result) Write(w io.Writer, style finding.Style) error {
	counts := make(map[finding.State]int)
	for _, g := range r.Groups {
		shown := !style.Quiet
		for _, f := range g.Findings {
			counts[f.State]++
			shown = shown || f.State != finding.OK
		}
		if !shown {
			continue
		}
		if err := g.Write(w, style); err != nil {
			return err
		}
		if _, err := fmt.Fprintln(w); err != nil {
			return err
		}
	}
	if style.Quiet && r.State == finding.OK {
		return nil
	}
	text := fmt.Sprintf("ok: %d, unknown: %d, warning: %d, failed: %d", counts[finding.OK], counts[finding.Unknown], counts[finding.Warning], counts[finding.Failed])
	if first, ok := r.cause(); ok {
		text += "; begin with " + first.Step
	}
	_, err := fmt.Fprintln(w, text)
	return err
}

// pause is the time between two attempts of Wait.
const pause = 5 * time.Second

// Wait calls once until its result is healthy, for at most limit, and returns the last result or error. It calls progress
// with each new cause.
func Wait(ctx context.Context, limit time.Duration, once func(context.Context) (*Result, error), progress func(string)) (*Result, error) {
	end := time.NewTimer(limit)
	defer end.Stop()
	last := ""
	for {
		result, err := once(ctx)
		if err == nil && result.Healthy() {
			return result, nil
		}
		text := ""
		if err != nil {
			text = err.Error()
		} else if first, ok := result.cause(); ok {
			text = first.Step + ": " + first.Text
		}
		if text != last {
			progress(finding.Printable(text))
			last = text
		}
		again := time.NewTimer(pause)
		select {
		case <-ctx.Done():
			again.Stop()
			return nil, context.Cause(ctx)
		case <-end.C:
			again.Stop()
			return result, err
		case <-again.C:
		}
	}
}
