package view

import (
	"fmt"
	"maps"
	"math"
	"slices"
	"strings"
	"time"

	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/operator/finding"
)

// The limits of health are those that the alerts in docs/metrics.md have by default.
const (
	certificateSoon = 7 * 24 * time.Hour
	failingPart     = 0.2 // of the STS calls
	maxSkew         = 60  // seconds
	maxWatchAge     = 300
	maxVerifyAge    = 3600
	pageOperations  = "docs/operations.md"
)

// health returns what is right and what is wrong, in the order in which a credential travels.
func health(s Snapshot, sessions []sessionRow, n numbers, now time.Time) (all []finding.Finding) {
	add := func(step string, state finding.State, text string, remedy *finding.Remedy) {
		all = append(all, finding.Finding{Step: step, State: state, Text: text, Remedy: remedy})
	}
	for _, problem := range s.Problems {
		add("access", finding.Unknown, problem, &finding.Remedy{
			Who: finding.ClusterAdmin, What: "If a right is missing, grant it; the value rbac.viewer.create makes roles for this page", Page: "docs/dashboard.md#rights",
		})
	}
	all = append(all, deploymentHealth(s, "webhook", s.Webhook, "annotated pods in opted-in namespaces are refused"))
	all = append(all, deploymentHealth(s, "broker", s.Broker, "new pods get no credentials; running pods keep theirs until these expire"))
	all = append(all, podsHealth(s)...)
	all = append(all, brokerEvents(s)...)
	all = append(all, stsHealth(n)...)
	all = append(all, sessionsHealth(sessions)...)

	total := n.total
	if demand, share := total["credence_broker_fetch_rate_demand"], total["credence_broker_fetch_rate_share"]; demand > nearFull*share {
		add("budget", finding.Warning, fmt.Sprintf("renewals need %s, and the brokers may make %s", rate(demand), rate(share)),
			&finding.Remedy{Who: finding.ClusterAdmin, What: "Raise the value broker.stsRate, or let pods share sessions", Page: "docs/scale.md"})
	} else if share > 0 {
		add("budget", finding.OK, fmt.Sprintf("renewals need %s, and the brokers may make %s", rate(demand), rate(share)), nil)
	}
	if lost := n.recent["credence_broker_audit_lines_lost_total"]; lost > 0 {
		add("audit", finding.Failed, counted(int(lost), "audit line is lost", "audit lines are lost"),
			&finding.Remedy{Who: finding.ClusterAdmin, What: "Find out why the output of the brokers is not read fast enough", Page: "docs/audit.md"})
	}
	for _, p := range s.Pods {
		all = append(all, numbersHealth(p, now)...)
	}
	return all
}

func describe(s Snapshot, component string) *finding.Remedy {
	return &finding.Remedy{
		Who: finding.ClusterAdmin, What: "See why its pods are not ready", Page: pageOperations,
		Commands: []string{s.Target.Command("kubectl -n %s describe pods -l app.kubernetes.io/name=credence,app.kubernetes.io/component=%s", s.Namespace, component)},
	}
}

func deploymentHealth(s Snapshot, component string, d *Deployment, effect string) finding.Finding {
	f := finding.Finding{Step: component, State: finding.OK}
	switch {
	case d == nil:
		f.State, f.Text = finding.Unknown, "its Deployment is not known"
	case d.Want == 0:
		f.State, f.Text, f.Remedy = finding.Failed, "its Deployment has 0 replicas, so "+effect,
			&finding.Remedy{Who: finding.ClusterAdmin, What: "Scale it", Commands: []string{s.Target.Command("kubectl -n %s scale deployment/credence-%s --replicas=2", s.Namespace, component)}}
	case d.Ready == 0:
		f.State, f.Text, f.Remedy = finding.Failed, "none is ready, so "+effect, describe(s, component)
	case d.Ready < d.Want:
		f.State, f.Text, f.Remedy = finding.Warning, fmt.Sprintf("%d of %d are ready", d.Ready, d.Want), describe(s, component)
	default:
		f.Text = fmt.Sprintf("%d of %d are ready", d.Ready, d.Want)
	}
	return f
}

// podsHealth reports pods that do not respond, versions that differ, and brokers that one node takes with it.
func podsHealth(s Snapshot) (all []finding.Finding) {
	nodes, versions, running := map[string]bool{}, map[string]bool{}, 0
	for _, p := range s.Pods {
		if p.Metrics != nil {
			versions[versionOf(p)] = true
		}
		if !p.Webhook && p.Ready {
			running++
			nodes[p.Node] = true
		}
		if p.Ready && p.Err != "" {
			what := "its numbers are old or missing"
			if !p.Webhook {
				what = "its numbers are old or missing, and so are the sessions that only this broker has"
			}
			all = append(all, finding.Finding{Step: "pod " + p.Name, State: finding.Unknown, Text: "it does not respond to this page, so " + what + ": " + p.Err})
		}
	}
	if running > 1 && len(nodes) == 1 {
		all = append(all, finding.Finding{Step: "placement", State: finding.Warning, Text: "all brokers are on one node: " + slices.Collect(maps.Keys(nodes))[0],
			Remedy: &finding.Remedy{Who: finding.ClusterAdmin, What: "Give the cluster another node for them, then restart the brokers", Commands: []string{s.Target.Command("kubectl -n %s rollout restart deployment/credence-broker", s.Namespace)}}})
	}
	if len(versions) > 1 {
		all = append(all, finding.Finding{Step: "versions", State: finding.Warning, Text: "different versions run: " + strings.Join(slices.Sorted(maps.Keys(versions)), ", "),
			Remedy: &finding.Remedy{Who: finding.ClusterAdmin, What: "Wait for the end of the upgrade, or find out why it does not end", Commands: []string{s.Target.Command("kubectl -n %s rollout status deployment/credence-broker", s.Namespace)}, Page: "docs/upgrade.md"}})
	}
	return all
}

// brokerEvents reports what brokers report on their own pods.
func brokerEvents(s Snapshot) (all []finding.Finding) {
	seen := map[string]bool{}
	for _, e := range s.Refused {
		if e.Namespace != s.Namespace || seen[e.Event] || !slices.ContainsFunc(s.Pods, func(p Pod) bool { return p.Name == e.Pod }) {
			continue
		}
		seen[e.Event] = true
		all = append(all, finding.Finding{Step: "pod " + e.Pod, State: finding.Warning, Text: e.Event + ": " + e.Message, Remedy: &finding.Remedy{
			Who: finding.ClusterAdmin, What: "See the events of this pod", Page: pageOperations,
			Commands: []string{s.Target.Command("kubectl -n %s describe pod %s", s.Namespace, e.Pod)},
		}})
	}
	return all
}

func stsHealth(n numbers) (all []finding.Finding) {
	calls, outcomes := n.recent.Of(stsCalls), n.recent.By(stsCalls, "outcome")
	if own := outcomes[string(credential.ReasonBrokerCredentials)]; own > 0 {
		all = append(all, finding.Finding{Step: "AWS", State: finding.Failed, Text: counted(int(own), "call fails", "calls fail") + " because of the brokers' own AWS credentials",
			Remedy: &finding.Remedy{Who: finding.ClusterAdmin, What: "Correct the AWS credentials of the brokers; their logs have the words of AWS", Page: "docs/aws.md#how-its-own-credentials-are-kept"}})
	}
	failed := 0.0
	for _, reason := range []credential.Reason{credential.ReasonSTSUnavailable, credential.ReasonSTSThrottled} {
		failed += outcomes[string(reason)]
	}
	switch text := fmt.Sprintf("%s of %s calls of STS fail", count(failed), count(calls)); {
	case failed > failingPart*calls:
		all = append(all, finding.Finding{Step: "STS", State: finding.Failed, Text: text,
			Remedy: &finding.Remedy{Who: finding.ClusterAdmin, What: "Do not restart brokers; find out whether STS or the way to it fails", Page: pageOperations + "#when-sts-is-down"}})
	case failed > 0:
		all = append(all, finding.Finding{Step: "STS", State: finding.Warning, Text: text,
			Remedy: &finding.Remedy{Who: finding.ClusterAdmin, What: "Wait; brokers retry. See the errors below", Page: pageOperations + "#when-sts-is-down"}})
	case calls > 0:
		all = append(all, finding.Finding{Step: "STS", State: finding.OK, Text: text})
	}
	return all
}

// sessionsHealth counts the sessions that need attention, by what is wrong with them.
func sessionsHealth(rows []sessionRow) (all []finding.Finding) {
	counts := map[string]int{}
	for _, row := range rows {
		counts[row.Label]++
	}
	for _, c := range []struct {
		label, one, many, what string
		who                    finding.Person
	}{
		{refusedLabel, "session is missing, because its fetch failed", "sessions are missing, because their fetches failed", "See the reasons in the table of sessions", finding.AWSAdmin},
		{failedLabel, "session is valid, but its renewal failed", "sessions are valid, but their renewals failed", "See the reasons in the table of sessions, before these sessions expire", finding.ClusterAdmin},
		{missingLabel, "session has not been fetched yet", "sessions have not been fetched yet", "Wait; if it lasts, see STS and the budget below", finding.ClusterAdmin},
		{overdueLabel, "session is overdue for its renewal", "sessions are overdue for their renewal", "See STS and the budget below", finding.ClusterAdmin},
	} {
		if n := counts[c.label]; n > 0 {
			all = append(all, finding.Finding{Step: "sessions", State: finding.Warning, Text: counted(n, c.one, c.many), Remedy: &finding.Remedy{Who: c.who, What: c.what}})
		}
	}
	if len(rows) > 0 && len(all) == 0 {
		all = append(all, finding.Finding{Step: "sessions", State: finding.OK, Text: counted(len(rows), "session", "sessions") + ", none needs attention"})
	}
	return all
}

// numbersHealth reports what the numbers of one pod show.
func numbersHealth(p Pod, now time.Time) (all []finding.Finding) {
	m := p.Metrics
	warn := func(text, what, page string) {
		all = append(all, finding.Finding{Step: "pod " + p.Name, State: finding.Warning, Text: text, Remedy: &finding.Remedy{Who: finding.ClusterAdmin, What: what, Page: page}})
	}
	for _, program := range []string{"broker", "webhook"} {
		metric := "credence_" + program + "_"
		if end, ok := m[metric+"certificate_expiry_timestamp_seconds"]; ok {
			if left := time.Unix(int64(end), 0).Sub(now); left < certificateSoon {
				warn("its certificate expires in "+short(left), "See why cert-manager does not renew it, unless its certificates are that short", "docs/certificates.md")
			}
		}
		if ok, known := m[metric+"rules_file_ok"]; known && ok == 0 {
			warn("the rules file is invalid, so it uses the last valid one", "Correct the value rules; the log has the error", "docs/rules.md")
		}
		if age := m[metric+"informer_age_seconds"]; age > maxWatchAge {
			warn("its watches of the API server do not work since "+shortSeconds(age), "Check the way from this pod to the API server", pageOperations)
		}
	}
	if ok, known := m["credence_webhook_sidecar_settings_file_ok"]; known && ok == 0 {
		warn("the file of the sidecar settings is invalid, so it uses the last valid one", "Correct the values of sidecar; the log has the error", "docs/settings.md")
	}
	if age := m["credence_broker_token_verification_age_seconds"]; age > maxVerifyAge {
		warn("it has read no signing keys for "+shortSeconds(age), "Check the way from this pod to the API server", "docs/tokens.md")
	}
	if skew := m["credence_broker_clock_skew_seconds"]; math.Abs(skew) > maxSkew {
		warn(fmt.Sprintf("its clock differs from that of AWS by %s", shortSeconds(math.Abs(skew))), "Set the clock of its node, "+p.Node, "docs/aws.md#clocks")
	}
	return all
}
