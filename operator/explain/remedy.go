package explain

import (
	"encoding/json"
	"fmt"
	"strings"
	"time"

	appsv1 "k8s.io/api/apps/v1"

	"github.com/credence-iam/credence/broker/clip"
	"github.com/credence-iam/credence/operator/finding"
)

func (s subject) kubectl(words ...string) string { return s.Target.Kubectl(words...) }

// in returns a command of kubectl in the pod's namespace.
func (s subject) in(words ...string) string {
	return s.kubectl(append([]string{"-n", s.NamespaceName}, words...)...)
}

// inCredence returns a command of kubectl in the namespace of webhook and brokers.
func (s subject) inCredence(words ...string) string {
	return s.kubectl(append([]string{"-n", s.credence()}, words...)...)
}

// credence returns the namespace of webhook and brokers.
func (s subject) credence() string {
	if s.Installation.Found != nil {
		return s.Installation.Found.Namespace
	}
	return "credence"
}

// apply returns a command that applies an object.
func (s subject) apply(object any) string {
	return finding.Shell("printf", "%s", encode(object)) + " | " + s.kubectl("apply", "-f", "-")
}

// encode returns an object as JSON on one line.
func encode(object any) string {
	var text strings.Builder
	e := json.NewEncoder(&text)
	e.SetEscapeHTML(false)
	_ = e.Encode(object) // Maps of strings never fail.
	return strings.TrimSpace(text.String())
}

// m is an object of JSON.
type m = map[string]any

// recreate returns the commands that replace the pod by a new one, which admission sees.
func (s subject) recreate() []string {
	switch {
	case s.File != "":
		return []string{s.in("apply", "-f", s.File)}
	case s.Workload != nil && (s.Workload.Kind == "Deployment" || s.Workload.Kind == "StatefulSet" || s.Workload.Kind == "DaemonSet"):
		return []string{s.in("rollout", "restart", s.Workload.Resource())}
	case s.Pod == nil:
		return nil // The controller tries again by itself.
	case s.Workload != nil:
		return []string{s.in("delete", "pod", s.Pod.Name)} // The controller makes another one.
	default:
		return []string{s.in("get", "pod", s.Pod.Name, "-o", "yaml") + " | " + s.kubectl("replace", "--force", "-f", "-")}
	}
}

// annotate returns the commands that set annotations of the pod, or remove those that are nil, and recreate it.
func (s subject) annotate(annotations m) []string {
	patch := m{"metadata": m{"annotations": annotations}}
	switch {
	case s.File != "":
		return nil // The author edits the file.
	case s.Workload == nil:
		return append([]string{s.in("patch", "pod", s.Meta().Name, "--type=merge", "-p", encode(patch))}, s.recreate()...)
	case s.Workload.Kind == "CronJob":
		patch = m{"spec": m{"jobTemplate": m{"spec": m{"template": patch}}}}
	default:
		patch = m{"spec": m{"template": patch}}
	}
	return []string{s.in("patch", strings.ToLower(s.Workload.Kind), s.Workload.Meta.Name, "--type=merge", "-p", encode(patch))}
}

// reinstall returns the command that makes objects of the installation again that were removed or changed.
func (s subject) reinstall() []string {
	if found := s.Installation.Found; found != nil {
		for _, d := range []*appsv1.Deployment{found.Webhook, found.Broker} {
			if d == nil {
				continue
			}
			if release := d.Annotations["meta.helm.sh/release-name"]; release != "" {
				return []string{s.Target.Helm("-n", s.credence(), "get", "manifest", release) + " | " +
					// As helm, because its next upgrade would conflict with another owner of the fields.
					s.kubectl("apply", "--server-side", "--force-conflicts", "--field-manager=helm", "-f", "-")}
			}
		}
	}
	return []string{s.kubectl("apply", "--server-side", "--force-conflicts", "-f", "install.yaml")}
}

// setArg returns the command that changes an argument of the webhook or the brokers.
func (s subject) setArg(deployment string, args []string, name, value string) []string {
	op, at := "add", "-"
	for i, arg := range args {
		if strings.HasPrefix(arg, "--"+name+"=") {
			op, at = "replace", fmt.Sprint(i)
		}
	}
	patch := []m{{"op": op, "path": "/spec/template/spec/containers/0/args/" + at, "value": "--" + name + "=" + value}}
	return []string{
		s.inCredence("patch", "deployment", deployment, "--type=json", "-p", encode(patch)),
		s.inCredence("rollout", "status", "deployment/"+deployment),
	}
}

func passed(step, format string, args ...any) finding.Finding {
	return finding.Finding{Step: step, State: finding.OK, Text: fmt.Sprintf(format, args...)}
}

func unsure(step, format string, args ...any) finding.Finding {
	return finding.Finding{Step: step, State: finding.Unknown, Text: fmt.Sprintf(format, args...)}
}

// failed returns a failure with its remedy.
func failed(step, text string, remedy finding.Remedy) finding.Finding {
	return finding.Finding{Step: step, State: finding.Failed, Text: text, Remedy: &remedy}
}

// unless returns f as a warning if harmless, because the pod does not need what f is about at this moment.
func unless(harmless bool, f finding.Finding) finding.Finding {
	if harmless && f.State == finding.Failed {
		f.State = finding.Warning
	}
	return f
}

// age returns a duration for a reader: 12 s, 3 min, 2 h 5 min, 4 d.
func age(d time.Duration) string {
	switch {
	case d < 0:
		return "0 s"
	case d < time.Minute:
		return fmt.Sprintf("%d s", int(d.Seconds()))
	case d < time.Hour:
		return fmt.Sprintf("%d min", int(d.Minutes()))
	case d < 24*time.Hour:
		return fmt.Sprintf("%d h %d min", int(d.Hours()), int(d.Minutes())%60)
	default:
		return fmt.Sprintf("%d d", int(d.Hours()/24))
	}
}

// short bounds a text of the cluster in a finding, and makes it one line.
func short(text string) string { return clip.Bytes(strings.Join(strings.Fields(text), " "), 600) }

// count returns a number of things.
func count(n int, thing string) string {
	if n == 1 {
		return "1 " + thing
	}
	return fmt.Sprintf("%d %ss", n, thing)
}

// what returns the part of a message of an error about what happened. Its fix is behind the last semicolon, and a remedy
// replaces it.
func what(message string) string {
	if at := strings.LastIndex(message, "; "); at > 0 {
		message = message[:at]
	}
	return short(message)
}
