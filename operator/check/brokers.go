package check

import (
	"cmp"
	"fmt"
	"maps"
	"math"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"

	"github.com/credence-iam/credence/broker/policy"
	"github.com/credence-iam/credence/operator/finding"
	"github.com/credence-iam/credence/operator/installation"
	"github.com/credence-iam/credence/operator/metrics"
	"github.com/credence-iam/credence/operator/survey"
	"github.com/credence-iam/credence/webhook/inject"
	"github.com/credence-iam/credence/webhook/settingsfile"
)

func brokerPods(s *snapshot, r *results) {
	s.component(r, installation.BrokerName, s.Found.Broker, s.Brokers, "new pods get no credentials; sidecars keep what they have until it expires")
}

func brokerAgreement(s *snapshot, r *results) {
	if unread(r, s.Own) {
		return
	}
	forms := make(map[string]string) // image and arguments → a pod that has them
	var unlisted []string
	for _, m := range s.Brokers {
		for _, c := range m.Pod.Spec.Containers {
			if c.Name == "broker" {
				forms[c.Image+"\x00"+strings.Join(c.Args, "\x00")] = m.Pod.Name
			}
		}
		if s.Listed.Err == nil && installation.Ready(&m.Pod) && !s.Listed.Value[m.Pod.Name] {
			unlisted = append(unlisted, m.Pod.Name)
		}
	}
	if len(forms) > 1 {
		pods := make([]string, 0, len(forms))
		for _, pod := range forms {
			pods = append(pods, pod)
		}
		slices.Sort(pods)
		r.warn("", &finding.Remedy{Who: finding.ClusterAdmin, What: "Finish the rollout, or undo it", Page: "docs/operations.md", Commands: []string{
			s.Target.Command("kubectl -n %s rollout status deployment/%s", s.Namespace, installation.BrokerName),
		}}, "brokers differ in image or arguments, for example %s", strings.Join(pods[:min(len(pods), survey.MaxExamples)], " and "))
	}
	if len(unlisted) > 0 {
		r.fail("service/"+installation.BrokerName, s.reinstall("See why its selector does not match these pods", s.Target.Command("kubectl -n %s get endpointslices -l kubernetes.io/service-name=%s -o yaml", s.Namespace, installation.BrokerName)),
			"it does not list ready brokers, so no sidecar calls them: %s", strings.Join(unlisted[:min(len(unlisted), survey.MaxExamples)], ", "))
	}
	if s.Listed.Err != nil {
		unread(r, s.Listed)
	} else if len(forms) <= 1 && len(unlisted) == 0 {
		r.ok("same image and arguments; the Service lists all ready brokers")
	}
}

// shared has the arguments that webhook and brokers must have alike, with their defaults.
var shared = map[string]string{"annotation-prefix": policy.DefaultPrefix, "audience": inject.DefaultAudience, "cluster-name": ""}

func sharedArguments(s *snapshot, r *results) {
	webhook, broker := s.Found.WebhookArgs(), s.Found.BrokerArgs()
	if webhook == nil || broker == nil {
		return // The checks of their pods have the reason.
	}
	equal := true
	for _, name := range slices.Sorted(maps.Keys(shared)) {
		w, b := cmp.Or(installation.Arg(webhook, name), shared[name]), cmp.Or(installation.Arg(broker, name), shared[name])
		if w != b {
			equal = false
			r.fail("", s.reinstall("Upgrade the release with the right value, which sets both"), "--%s is %q for webhooks and %q for brokers", name, w, b)
		}
	}
	if equal {
		r.ok("webhooks and brokers have the same annotation prefix, audience and cluster name")
	}
}

func brokerCertificate(s *snapshot, r *results) {
	if unread(r, s.Own) || unread(r, s.Published) {
		return
	}
	if len(s.Published.Value.Roots) == 0 {
		r.add(finding.Unknown, "", nil, "not checked: the brokers have published no roots, see trust")
		return
	}
	s.serving(r, s.Brokers, "broker", s.Published.Value.Roots, fmt.Sprintf("ConfigMap %s/%s", s.Namespace, s.TrustName()))
}

func certificates(s *snapshot, r *results) {
	if unread(r, s.Issued) {
		return
	}
	if len(s.Issued.Value) == 0 {
		r.ok("no Certificates: the Secrets come from elsewhere")
		return
	}
	var next time.Time
	bad := 0
	for _, c := range s.Issued.Value {
		subject := "certificate/" + c.GetName()
		remedy := &finding.Remedy{Who: finding.ClusterAdmin, What: "See in its conditions and events what cert-manager waits for", Page: "docs/certificates.md", Commands: []string{
			s.Target.Command("kubectl -n %s describe certificate %s", s.Namespace, c.GetName()),
		}}
		if ok, message := condition(c, "Ready"); !ok {
			bad++
			r.fail(subject, remedy, "it is not ready: %s", message)
			continue
		}
		text, _, _ := unstructured.NestedString(c.Object, "status", "renewalTime")
		renewal, err := time.Parse(time.RFC3339, text)
		switch {
		case err != nil:
		case s.Now.Sub(renewal) > time.Hour:
			bad++
			r.warn(subject, remedy, "its renewal was due at %s", text)
		case next.IsZero() || renewal.Before(next):
			next = renewal
		}
	}
	if bad == 0 {
		r.ok("%s ready; next renewal at %s", some(len(s.Issued.Value), "Certificate"), next.UTC().Format(time.RFC3339))
	}
}

// condition returns whether an object has a condition, and its message if not.
func condition(c unstructured.Unstructured, kind string) (bool, string) {
	conditions, _, _ := unstructured.NestedSlice(c.Object, "status", "conditions")
	for _, one := range conditions {
		if m, ok := one.(map[string]any); ok && m["type"] == kind {
			return m["status"] == "True", fmt.Sprint(m["message"])
		}
	}
	return false, "cert-manager has not reported on it; does it run?"
}

// measured returns the metrics of the running members, and adds a finding for each that could not be read.
func measured(r *results, members []survey.Member) (all []metrics.Values, names []string) {
	var unknown *survey.Member
	for i, m := range members {
		switch {
		case m.Pod.Status.Phase != corev1.PodRunning:
		case m.Metrics.Err != nil:
			unknown = &members[i]
		default:
			all, names = append(all, m.Metrics.Value), append(names, m.Pod.Name)
		}
	}
	switch {
	case unknown != nil:
		unread(r, unknown.Metrics)
	case len(all) == 0:
		r.add(finding.Unknown, "", nil, "not checked: no pod runs")
	}
	return all, names
}

func configFiles(s *snapshot, r *results) {
	brokers, _ := measured(r, s.Brokers)
	webhooks, _ := measured(&results{}, s.Webhooks)
	edit := func(name string) *finding.Remedy {
		return &finding.Remedy{Who: finding.ClusterAdmin, What: "Correct it in the values of the chart; pods that restart do not start with it", Page: "docs/operations.md", Commands: []string{
			s.Target.Command("kubectl -n %s get configmap %s -o yaml", s.Namespace, name),
			s.Target.Command("kubectl -n %s logs -l app.kubernetes.io/part-of=credence --tail=-1 --prefix | grep 'Could not use'", s.Namespace),
		}}
	}
	rejected := func(all []metrics.Values, name string) bool {
		return slices.ContainsFunc(all, func(m metrics.Values) bool { v, ok := m[name]; return ok && v == 0 })
	}
	because := func(err error) string {
		if err == nil {
			return "their logs have the reason"
		}
		return err.Error()
	}
	bad := false
	if s.rulesErr != nil || rejected(brokers, "credence_broker_rules_file_ok") || rejected(webhooks, "credence_webhook_rules_file_ok") {
		bad = true
		r.fail("configmap/"+installation.RulesConfigMap, edit(installation.RulesConfigMap), "the rules file is invalid, so an earlier one is in force: %s", because(s.rulesErr))
	}
	var settingsErr error
	if s.Found.Settings != "" {
		_, settingsErr = settingsfile.Parse([]byte(s.Found.Settings), inject.DefaultSettings(), s.Keys)
	}
	if settingsErr != nil || rejected(webhooks, "credence_webhook_sidecar_settings_file_ok") {
		bad = true
		r.fail("configmap/"+installation.SettingsConfigMap, edit(installation.SettingsConfigMap), "the sidecar settings are invalid, so earlier ones are in force: %s", because(settingsErr))
	}
	if !bad && len(r.findings) == 0 {
		r.ok("the sidecar settings are in force; %s", map[bool]string{true: "there is no rules file", false: "so is the rules file"}[s.Found.Rules == ""])
	}
}

// threshold is a bound of a metric.
type threshold struct {
	metric string
	over   float64
	state  finding.State
	text   string // with a verb for the value
	what   string
}

const reach = "See if it reaches the API server, and restart it if others do"

// thresholds are of metrics that no other check looks at.
var thresholds = []threshold{
	{"credence_broker_audit_lines_lost_total", 0, finding.Warning, "%g audit lines were lost since its start", "See what reads its output: the node's disk, or a slow log collector"},
	{`credence_broker_events_total{outcome="dropped"}`, 0, finding.Warning, "%g Kubernetes Events about refused pods were dropped since its start", "See in the audit log which pods are refused so often"},
	{`credence_broker_refusals_total{reason="INTERNAL"}`, 0, finding.Warning, "it refused %g calls since its start because of an error of its own", "See the cause in its log, and report it to the project"},
	{"credence_broker_tokens_waiting", 200, finding.Warning, "%g tokens wait for their verification", "See in the audit log who calls so often"},
	{"credence_broker_informer_age_seconds", 300, finding.Failed, "its watches of the API server have not worked for %.0f s", reach},
	{"credence_webhook_informer_age_seconds", 300, finding.Failed, "its watch of namespaces has not worked for %.0f s", reach},
	{"credence_broker_token_verification_age_seconds", 3600, finding.Failed, "it got no signing keys from the API server for %.0f s", reach},
}

func metricsInBounds(s *snapshot, r *results) {
	programs, names := measured(r, slices.Concat(s.Webhooks, s.Brokers))
	for i, m := range programs {
		for _, t := range thresholds {
			if v := m[t.metric]; v > t.over {
				r.add(t.state, "pod/"+names[i], &finding.Remedy{Who: finding.ClusterAdmin, What: t.what, Page: "docs/operations.md#alerts", Commands: []string{
					s.Target.Command("kubectl -n %s logs %s --tail=200", s.Namespace, names[i]),
				}}, fmt.Sprintf(t.text, v))
			}
		}
	}
	if len(r.findings) == 0 {
		r.ok("no audit line or Event lost; the API server responds to %d programs", len(programs))
	}
}

func awsIdentity(s *snapshot, r *results) {
	brokers, names := measured(r, s.Brokers)
	page := "docs/aws.md"
	var ends float64
	for i, m := range brokers {
		calls, refused := m.Of("credence_broker_sts_calls_total"), m.Of("credence_broker_sts_calls_total", `outcome="BROKER_CREDENTIALS"`)
		end, expires := m.Broker("base_credentials_expiry_timestamp_seconds")
		remedy := &finding.Remedy{Who: finding.AWSAdmin, What: "Correct the identity of the brokers: keys, the trust policy of their role, or that of aws.assumeRole", Page: page, Commands: []string{
			s.Target.Command("kubectl -n %s logs %s --tail=200", s.Namespace, names[i]),
		}}
		switch left := end - float64(s.Now.Unix()); {
		case refused > 0 && refused >= 0.5*calls:
			r.fail("pod/"+names[i], remedy, "AWS refused its own credentials in %.0f of %.0f calls since its start", refused, calls)
		case expires && left < 240:
			r.fail("pod/"+names[i], remedy, "its own credentials end in %.0f s and were not renewed", left)
		}
		if expires && (ends == 0 || end < ends) {
			ends = end
		}
	}
	switch {
	case len(r.findings) > 0:
	case ends > 0:
		r.ok("AWS accepts the brokers' own credentials, which end at %s and are renewed before", time.Unix(int64(ends), 0).UTC().Format(time.RFC3339))
	default:
		r.ok("AWS accepts the brokers' own credentials, which do not expire")
	}
}

func stsCalls(s *snapshot, r *results) {
	brokers, _ := measured(r, s.Brokers)
	var calls, bad float64
	for _, m := range brokers {
		calls += m.Of("credence_broker_sts_calls_total")
		bad += m.Of("credence_broker_sts_calls_total", `outcome="STS_UNAVAILABLE"`) + m.Of("credence_broker_sts_calls_total", `outcome="STS_THROTTLED"`)
	}
	remedy := &finding.Remedy{Who: finding.ClusterAdmin, What: "See the network to STS, its VPC endpoint, and AWS's status", Page: "docs/operations.md#when-sts-is-down", Commands: []string{
		s.Target.Command("kubectl -n %s logs -l app.kubernetes.io/component=broker --tail=200 --prefix | grep -i sts", s.Namespace),
	}}
	bound, count := metrics.Sum(brokers).Within(0.99, "credence_broker_sts_call_duration_seconds", `action="AssumeRole"`)
	// The counters have no history: they also count outages that are over. The last fetch of each session does not.
	switch g := s.Grants.Value; {
	case g.Failing.Count > 0:
		r.warn("", remedy, "the last fetch failed for %s that pods use: %s", some(g.Failing.Count, "session"), &g.Failing)
	case s.Grants.Err != nil && bad > 0.2*calls:
		r.warn("", remedy, "%.0f of %.0f STS calls failed or were throttled since the brokers started", bad, calls)
	}
	if count > 0 && bound > 5 {
		r.warn("", remedy, "one in a hundred STS calls took more than %s", map[bool]string{true: "10 s", false: fmt.Sprintf("5 s, up to %g s", bound)}[math.IsInf(bound, 1)])
	}
	switch {
	case len(r.findings) > 0:
	case count == 0:
		r.ok("%.0f calls, none for a role yet", calls)
	default:
		r.ok("99 of 100 calls took at most %g s; since the brokers started, %.0f of %.0f failed", bound, bad, calls)
	}
}

func clockSkew(s *snapshot, r *results) {
	brokers, names := measured(r, s.Brokers)
	most := 0.0
	for i, m := range brokers {
		skew, _ := m.Broker("clock_skew_seconds")
		if math.Abs(skew) > math.Abs(most) {
			most = skew
		}
		state := finding.Warning
		if math.Abs(skew) > 240 {
			state = finding.Failed
		}
		if math.Abs(skew) > 60 {
			r.add(state, "pod/"+names[i], &finding.Remedy{Who: finding.ClusterAdmin, What: "Correct the time service of the pod's node", Commands: []string{
				s.Target.Command("kubectl -n %s get pod %s -o wide", s.Namespace, names[i]),
			}}, fmt.Sprintf("AWS's clock is %.0f s ahead of this broker's; at 300 s AWS refuses its calls", skew))
		}
	}
	if len(r.findings) == 0 {
		r.ok("within %.1f s of AWS's clock", math.Abs(most))
	}
}

func rateBudget(s *snapshot, r *results) {
	brokers, names := measured(r, s.Brokers)
	var demand, share float64
	for i, m := range brokers {
		d, _ := m.Broker("fetch_rate_demand")
		all, _ := m.Broker("fetch_rate_share")
		limit, _ := m.Broker("fetch_rate_limit")
		late, _ := m.Broker("sessions_late")
		demand, share = demand+d, share+all
		remedy := &finding.Remedy{Who: finding.ClusterAdmin, What: "Raise broker.stsRate if AWS allows it, or use longer sessions or a wider session-scope", Page: "docs/scale.md#what-to-choose"}
		switch {
		case all > 0 && d > 0.8*all:
			r.warn("pod/"+names[i], remedy, "its renewals need %.2f of the %.2f STS calls a second that it may make", d, all)
		case late > 0:
			r.warn("pod/"+names[i], remedy, "%.0f sessions are renewed late", late)
		case all > 0 && limit < 0.5*all:
			r.warn("pod/"+names[i], remedy, "STS throttles the account: it makes %.2f calls a second of the %.2f that it may", limit, all)
		}
	}
	if len(r.findings) == 0 {
		r.ok("renewals need %.3f of %.0f STS calls a second", demand, share)
	}
}

func sessions(s *snapshot, r *results) {
	brokers, names := measured(r, s.Brokers)
	var kept, warm float64
	for i, m := range brokers {
		k, _ := m.Broker("sessions_kept")
		w, _ := m.Broker("sessions_warm")
		refused, _ := m.Broker("sessions_refused")
		left, known := m.Broker("stalest_session_seconds")
		kept, warm = kept+k, warm+w
		logs := &finding.Remedy{Who: finding.ClusterAdmin, What: "See why the fetches of this broker fail or wait", Page: "docs/operations.md#credencesessionsmissing", Commands: []string{
			s.Target.Command("kubectl -n %s logs %s --tail=200", s.Namespace, names[i]),
		}}
		coming, _ := m.Broker("fetches_in_flight")
		if missing := k - w - refused - coming; missing > 0 {
			r.warn("pod/"+names[i], logs, "%.0f of %.0f sessions that pods use are not cached", missing, k)
		}
		if known && left < 120 {
			r.warn("pod/"+names[i], logs, "a session that pods use ends in %.0f s and was not renewed", left)
		}
	}
	if s.Grants.Err != nil {
		unread(r, s.Grants)
	}
	g := s.Grants.Value
	if g.Refused.Count > 0 {
		r.warn("", &finding.Remedy{Who: finding.AWSAdmin, What: "Correct the trust policy of these roles, or the roles in the annotations of pods", Page: "docs/errors.md"},
			"%s that AWS refuses: %s", some(g.Refused.Count, "session"), &g.Refused)
	}
	if g.Single > 0 && len(s.Brokers) > 1 && s.steady() {
		r.warn("", &finding.Remedy{Who: finding.ClusterAdmin, What: "See if brokers disagree on who is ready", Page: "docs/scale.md", Commands: []string{
			s.Target.Command("kubectl -n %s get endpointslices -l kubernetes.io/service-name=%s -o yaml", s.Namespace, installation.BrokerName),
		}}, "%d of %s are on one broker only, so its loss makes pods wait", g.Single, some(g.Active, "session"))
	}
	if len(r.findings) == 0 {
		r.ok("%.0f cached of %.0f that pods use, on all brokers together", warm, kept)
	}
}

// steady reports whether the brokers are old enough for each session to have two owners.
func (s *snapshot) steady() bool {
	return !slices.ContainsFunc(s.Brokers, func(m survey.Member) bool {
		return !installation.Ready(&m.Pod) || s.Now.Sub(m.Pod.CreationTimestamp.Time) < survey.Settle
	})
}
