//go:build unix

package chart_test

import (
	"maps"
	"path"
	"slices"
	"strings"
	"testing"

	cmv1 "github.com/cert-manager/cert-manager/pkg/apis/certmanager/v1"
	admissionregistrationv1 "k8s.io/api/admissionregistration/v1"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	policyv1 "k8s.io/api/policy/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/pod-security-admission/api"
	psapolicy "k8s.io/pod-security-admission/policy"

	"github.com/credence-iam/credence/integration/chart"
)

// TestObjectsAgree shows that the objects of each kind of installation fit together. The golden files have the value of
// each field; a review of them does not show that two objects agree.
func TestObjectsAgree(t *testing.T) {
	t.Parallel()
	for name := range cases(t) {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			all := objects(t, name)
			podsAreRestricted(t, all)
			podsAreSelected(t, all)
			portsExist(t, all)
			probesArePatient(t, all)
			filesAreMounted(t, all)
			sharedFlagsAreEqual(t, all)
			rightsAreBound(t, all)
			certificatesReachTheirUsers(t, all)
			refusalsFailClosed(t, all)
		})
	}
}

// podsAreRestricted checks that all pods run in a namespace that enforces the strictest PodSecurity level, of this version
// and of the oldest one that the chart supports. Only the host's network, if a user wants it, needs another level.
func podsAreRestricted(t *testing.T, all []runtime.Object) {
	evaluator, err := psapolicy.NewEvaluator(psapolicy.DefaultChecks(), nil)
	if err != nil {
		t.Fatal(err)
	}
	for name, template := range podSpecs(all) {
		template.Spec.HostNetwork = false
		for _, version := range []api.Version{api.LatestVersion(), api.MajorMinorVersion(1, 30)} {
			result := psapolicy.AggregateCheckResults(evaluator.EvaluatePod(
				api.LevelVersion{Level: api.LevelRestricted, Version: version}, &template.ObjectMeta, &template.Spec))
			if !result.Allowed {
				t.Errorf("%s, version %s: %s", name, version.String(), result.ForbiddenDetail())
			}
		}
	}
}

// podsAreSelected checks that the Service and the PodDisruptionBudget of a program select its pods and no others.
func podsAreSelected(t *testing.T, all []runtime.Object) {
	services, budgets := chart.Of[*corev1.Service](all), chart.Of[*policyv1.PodDisruptionBudget](all)
	if len(services) != 2 || len(budgets) == 0 {
		t.Fatalf("%d Services and %d PodDisruptionBudgets, want two Services", len(services), len(budgets))
	}
	selectors := map[string]labels.Selector{}
	for _, s := range services {
		selectors["Service "+s.Name] = labels.SelectorFromSet(s.Spec.Selector)
	}
	for _, b := range budgets {
		selector, err := metav1.LabelSelectorAsSelector(b.Spec.Selector)
		if err != nil {
			t.Fatal(err)
		}
		selectors["PodDisruptionBudget "+b.Name] = selector
	}
	for name, template := range podSpecs(all) {
		for what, selector := range selectors {
			if got, want := selector.Matches(labels.Set(template.Labels)), strings.HasSuffix(what, " "+name); got != want {
				t.Errorf("%s selects pods of %s: %t, want %t", what, name, got, want)
			}
		}
	}
}

// portsExist checks that the program has each port that a Service or a probe names.
func portsExist(t *testing.T, all []runtime.Object) {
	for _, d := range deployments(t, all) {
		c := d.Spec.Template.Spec.Containers[0]
		named := []string{c.LivenessProbe.HTTPGet.Port.StrVal, c.ReadinessProbe.HTTPGet.Port.StrVal}
		for _, s := range chart.Of[*corev1.Service](all) {
			for _, port := range s.Spec.Ports {
				if s.Name == d.Name {
					named = append(named, port.TargetPort.StrVal)
				}
			}
		}
		if len(named) < 4 {
			t.Errorf("the Service of %s has %d ports, want its own and that of the metrics", d.Name, len(named)-2)
		}
		for _, name := range named {
			if !slices.ContainsFunc(c.Ports, func(p corev1.ContainerPort) bool { return p.Name == name }) {
				t.Errorf("%s has no port %q", d.Name, name)
			}
		}
	}
}

// probesArePatient checks that no probe has the default time limit of 1 s, with which load on the nodes stops all programs
// at once, and that a program is killed only if it does not respond for a minute.
func probesArePatient(t *testing.T, all []runtime.Object) {
	for _, d := range deployments(t, all) {
		c := d.Spec.Template.Spec.Containers[0]
		if ready := c.ReadinessProbe; ready.TimeoutSeconds < 5 {
			t.Errorf("the readiness probe of %s waits %d s", d.Name, ready.TimeoutSeconds)
		}
		if live := c.LivenessProbe; live.TimeoutSeconds < 10 || live.PeriodSeconds*live.FailureThreshold < 60 {
			t.Errorf("the liveness probe of %s waits %d s, %d times, each %d s", d.Name, live.TimeoutSeconds, live.FailureThreshold, live.PeriodSeconds)
		}
	}
}

// filesAreMounted checks that each file of a ConfigMap reaches a program: a flag names it, and its ConfigMap is mounted as
// a read-only folder, because kubelets do not update a file that is mounted alone.
func filesAreMounted(t *testing.T, all []runtime.Object) {
	unused := map[string]bool{} // the files that no flag names, as CONFIGMAP/KEY
	for _, c := range chart.Of[*corev1.ConfigMap](all) {
		if c.Name == "extra" || c.Name == "credence-dashboard" { // one of extraObjects, and one for Grafana
			continue
		}
		for key := range c.Data {
			unused[c.Name+"/"+key] = true
		}
	}
	for _, d := range deployments(t, all) {
		pod := d.Spec.Template.Spec
		for flag, file := range flagsOf(t, d) {
			if !strings.HasPrefix(file, "/etc/credence/") {
				continue
			}
			mounts := pod.Containers[0].VolumeMounts
			at := slices.IndexFunc(mounts, func(m corev1.VolumeMount) bool { return m.MountPath == path.Dir(file) })
			if at < 0 || mounts[at].SubPath != "" || !mounts[at].ReadOnly {
				t.Errorf("%s, %s: %s is not mounted as a read-only folder", d.Name, flag, path.Dir(file))
				continue
			}
			volume := slices.IndexFunc(pod.Volumes, func(v corev1.Volume) bool { return v.Name == mounts[at].Name })
			if volume >= 0 && pod.Volumes[volume].ConfigMap != nil {
				delete(unused, pod.Volumes[volume].ConfigMap.Name+"/"+path.Base(file))
			}
		}
	}
	if len(unused) > 0 {
		t.Errorf("no flag of a program names %v", slices.Sorted(maps.Keys(unused)))
	}
}

// sharedFlagsAreEqual checks that the broker and the webhook get equal values of their shared flags, so that they decide
// alike. The tests of the programs show that each accepts its flags.
func sharedFlagsAreEqual(t *testing.T, all []runtime.Object) {
	broker, webhook := flagsOf(t, deployment(t, all, "broker")), flagsOf(t, deployment(t, all, "webhook"))
	for _, flag := range []string{"--annotation-prefix", "--audience", "--cluster-name", "--trust-config-map"} {
		if broker[flag] == "" || webhook[flag] == "" {
			t.Errorf("not both programs get %s", flag)
		}
	}
	if broker["--rules-file"] != webhook["--rules-file"] {
		t.Errorf("the broker gets the rules file %q, the webhook %q", broker["--rules-file"], webhook["--rules-file"])
	}
	if broker["--base-arn"] != "" && webhook["--base-arn"] == "" {
		t.Error("the webhook does not get the broker's base ARN")
	}
	for flag, value := range webhook {
		if other, ok := broker[flag]; ok && other != value {
			t.Errorf("the broker gets %s=%s, the webhook %s", flag, other, value)
		}
	}
}

// flagsOf returns the arguments of a program by their flags.
func flagsOf(t *testing.T, d *appsv1.Deployment) map[string]string {
	flags := map[string]string{}
	for _, arg := range d.Spec.Template.Spec.Containers[0].Args {
		flag, value, ok := strings.Cut(arg, "=")
		if _, twice := flags[flag]; twice || !ok {
			t.Errorf("%s gets %s without a value or twice", d.Name, flag)
		}
		flags[flag] = value
	}
	return flags
}

// forPeople are the roles that an admin binds.
var forPeople = []string{"credence-viewer", "credence-commands"}

// rightsAreBound checks that each role of a program is bound to its ServiceAccount, that no role for people is bound or has
// Secrets, and that no role is aggregated. The
// golden files list the rights. The chart has the reason of each one, and the tests on a control plane run with them.
func rightsAreBound(t *testing.T, all []runtime.Object) {
	roles := map[string]string{} // by ServiceAccount
	namespace := deployments(t, all)[0].Namespace
	for name, pod := range podSpecs(all) {
		if account := pod.Spec.ServiceAccountName; account != "" {
			roles[namespace+"/"+account] = name
		}
	}
	unbound := map[string]bool{}
	rules := map[string][]rbacv1.PolicyRule{}
	for _, o := range chart.Of[*rbacv1.ClusterRole](all) {
		rules["ClusterRole "+o.Name] = o.Rules
		unbound["ClusterRole "+o.Name] = true
		aggregated := func(label string) bool { return strings.HasPrefix(label, "rbac.") }
		if o.AggregationRule != nil || slices.ContainsFunc(slices.Collect(maps.Keys(o.Labels)), aggregated) {
			t.Errorf("ClusterRole %s is aggregated: it adds its rules to other roles, or gets theirs", o.Name)
		}
	}
	for _, o := range chart.Of[*rbacv1.Role](all) {
		rules["Role "+o.Name] = o.Rules
		unbound["Role "+o.Name] = true
	}
	check := func(role rbacv1.RoleRef, subjects []rbacv1.Subject) {
		if !unbound[role.Kind+" "+role.Name] {
			t.Errorf("a binding names the %s %s, which does not exist or is bound twice", role.Kind, role.Name)
		}
		delete(unbound, role.Kind+" "+role.Name)
		for _, s := range subjects {
			if s.Kind != "ServiceAccount" || roles[s.Namespace+"/"+s.Name] != role.Name {
				t.Errorf("%s %s is bound to %s %s/%s, which is not the account of its program", role.Kind, role.Name, s.Kind, s.Namespace, s.Name)
			}
		}
	}
	for _, b := range chart.Of[*rbacv1.ClusterRoleBinding](all) {
		check(b.RoleRef, b.Subjects)
	}
	for _, b := range chart.Of[*rbacv1.RoleBinding](all) {
		check(b.RoleRef, b.Subjects)
	}
	for role := range unbound {
		if !slices.Contains(forPeople, role[strings.IndexByte(role, ' ')+1:]) {
			continue
		}
		delete(unbound, role)
		for _, rule := range rules[role] {
			if slices.Contains(rule.Resources, "secrets") || slices.Contains(rule.Resources, "*") || slices.Contains(rule.Verbs, "*") {
				t.Errorf("%s has the rule %v", role, rule)
			}
		}
	}
	if len(unbound) > 0 {
		t.Errorf("nothing is bound to %v", slices.Sorted(maps.Keys(unbound)))
	}
}

// certificatesReachTheirUsers checks that each program mounts the Secret of its Certificate, and that the API server gets
// the webhook's roots either from cert-manager or from the user's values. If the user provides the Secrets, there is no
// object of cert-manager, which may not be installed.
func certificatesReachTheirUsers(t *testing.T, all []runtime.Object) {
	certificates := slices.DeleteFunc(chart.Of[*cmv1.Certificate](all), func(c *cmv1.Certificate) bool { return c.Spec.IsCA })
	for _, c := range certificates {
		volumes := deployment(t, all, strings.TrimPrefix(c.Name, "credence-")).Spec.Template.Spec.Volumes
		if len(volumes) == 0 || volumes[0].Name != "tls" || volumes[0].Secret.SecretName != c.Spec.SecretName {
			t.Errorf("%s mounts %v, its certificate is in Secret %s", c.Name, volumes, c.Spec.SecretName)
		}
	}
	if n := len(certificates); n != 2 && (n != 0 || len(chart.Of[*cmv1.Issuer](all)) > 0) {
		t.Errorf("%d programs have a Certificate and there are %d Issuers, want both or neither", n, len(chart.Of[*cmv1.Issuer](all)))
	}
	hook := chart.Of[*admissionregistrationv1.MutatingWebhookConfiguration](all)[0]
	from, bundle := hook.Annotations["cert-manager.io/inject-ca-from"], hook.Webhooks[0].ClientConfig.CABundle
	roots := configMaps(all, "credence-roots")
	switch {
	case len(roots) == 0 && from == "credence/credence-webhook" && bundle == nil && len(certificates) == 2:
	case len(roots) == 1 && from == "" && string(bundle) == roots[0].Data["roots.pem"]:
	default:
		t.Errorf("roots injected from %q, a bundle of %d bytes, and %d ConfigMaps: want cert-manager's injection, or the user's roots in both places",
			from, len(bundle), len(roots))
	}
}

// refusalsFailClosed checks that a policy that refuses also refuses if its expressions fail, and that a policy that warns
// never refuses. If the webhook fails, the pod is refused.
func refusalsFailClosed(t *testing.T, all []runtime.Object) {
	closed := map[string]bool{}
	for _, p := range chart.Of[*admissionregistrationv1.ValidatingAdmissionPolicy](all) {
		closed[p.Name] = p.Spec.FailurePolicy == nil || *p.Spec.FailurePolicy == admissionregistrationv1.Fail
	}
	for _, b := range chart.Of[*admissionregistrationv1.ValidatingAdmissionPolicyBinding](all) {
		isClosed, ok := closed[b.Spec.PolicyName]
		if denies := slices.Contains(b.Spec.ValidationActions, admissionregistrationv1.Deny); !ok || denies != isClosed {
			t.Errorf("policy %s does %v and fails closed: %t", b.Spec.PolicyName, b.Spec.ValidationActions, isClosed)
		}
		delete(closed, b.Spec.PolicyName)
	}
	if len(closed) > 0 {
		t.Errorf("no binding puts %v in force", slices.Sorted(maps.Keys(closed)))
	}
	for _, o := range chart.Of[*admissionregistrationv1.MutatingWebhookConfiguration](all) {
		for _, w := range o.Webhooks {
			if w.FailurePolicy != nil && *w.FailurePolicy != admissionregistrationv1.Fail {
				t.Errorf("webhook %s has failurePolicy %s", w.Name, *w.FailurePolicy)
			}
		}
	}
}

// TestNamespaced shows that all namespaced objects are in the namespace of the release, and that all references to it
// follow its name.
func TestNamespaced(t *testing.T) {
	t.Parallel()
	const namespace = "elsewhere"
	rendered, err := chart.Render(t.Context(), chart.Config{Helm: helm, Namespace: namespace, ValueFiles: []string{cases(t)["defaults"]}})
	if err != nil {
		t.Fatal(err)
	}
	all, err := chart.Decode(rendered)
	if err != nil {
		t.Fatal(err)
	}
	clusterScoped := map[string]bool{
		"ClusterRole": true, "ClusterRoleBinding": true, "MutatingWebhookConfiguration": true,
		"ValidatingAdmissionPolicy": true, "ValidatingAdmissionPolicyBinding": true,
	}
	for _, object := range all {
		kind := object.GetObjectKind().GroupVersionKind().Kind
		want := namespace
		if clusterScoped[kind] {
			want = ""
		}
		meta := object.(metav1.Object)
		if meta.GetNamespace() != want {
			t.Errorf("%s %s is in namespace %q, want %q", kind, meta.GetName(), meta.GetNamespace(), want)
		}
	}
	text := strings.ReplaceAll(string(rendered), "credence-", "")
	for _, stale := range []string{".credence.", "namespace: credence\n", "credence/credence"} {
		if strings.Contains(text, stale) {
			t.Errorf("the chart for namespace %s has %q", namespace, stale)
		}
	}
}
