package explain

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"

	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/operator/finding"
	"github.com/credence-iam/credence/operator/snapshot"
	"github.com/credence-iam/credence/webhook/inject"
)

// askNode are programs that ask 169.254.169.254 whatever their environment says, as parts of the names of images and
// commands. docs/sdk-compatibility.md has their versions.
var askNode = []string{"s3cmd", "s3fs", "pgbackrest", "awscred", "gdal"}

// inject returns what the webhook would do to the pod now. Variables that containers take from ConfigMaps count as if the
// pod had them.
func (s subject) inject() (inject.Result, error) {
	pod := corev1.Pod{ObjectMeta: s.Meta(), Spec: *s.Spec().DeepCopy()}
	for _, containers := range [][]corev1.Container{pod.Spec.InitContainers, pod.Spec.Containers} {
		for i := range containers {
			containers[i].Env, containers[i].EnvFrom = s.expand(containers[i])
		}
	}
	raw, err := json.Marshal(pod)
	if err != nil {
		return inject.Result{}, fmt.Errorf("encoding the pod: %w", err)
	}
	return s.Judge.Injector.Inject(raw, s.NamespaceName)
}

// expand returns the environment of a container with the AWS variables of its ConfigMaps, and the sources that are left.
func (s subject) expand(c corev1.Container) (env []corev1.EnvVar, left []corev1.EnvFromSource) {
	for _, source := range c.EnvFrom {
		ref := source.ConfigMapRef
		if ref == nil || s.Variables[ref.Name] == nil {
			left = append(left, source)
			continue
		}
		for _, name := range slices.Sorted(maps.Keys(s.Variables[ref.Name].Data)) {
			if strings.HasPrefix(source.Prefix+name, "AWS_") {
				env = append(env, corev1.EnvVar{Name: source.Prefix + name, Value: s.Variables[ref.Name].Data[name]})
			}
		}
	}
	return append(env, c.Env...), left // The variables of env win.
}

// injectable is the step that tries the injection of a pod that has not been injected.
func (s subject) injectable() []finding.Finding {
	if !s.annotated() || s.running() && s.Sidecar() != nil {
		return nil
	}
	if s.Judge.Injector == nil {
		return []finding.Finding{unsure("pod", "the settings of the webhook are not known")}
	}
	_, err := s.inject()
	e, ok := errors.AsType[*credential.Error](err)
	switch {
	case !ok || e.Reason == credential.ReasonAnnotationInvalid || e.Reason == credential.ReasonAnnotationUnknown:
		return nil // The step of the annotations has it.
	case e.Reason == credential.ReasonShadowed:
		return []finding.Finding{failed("environment", what(e.Message), s.unshadow(e.Message))}
	}
	return []finding.Finding{failed("pod", e.Message, finding.Remedy{Who: finding.Author, What: "change the pod as the message says", Page: "docs/errors.md"})}
}

// environment is the step of what SDKs in the pod's containers prefer to the sidecar.
func (s subject) environment() (all []finding.Finding) {
	const step = "environment"
	if s.Judge.Injector == nil {
		return nil
	}
	result, err := s.inject()
	if e, ok := errors.AsType[*credential.Error](err); ok && e.Reason == credential.ReasonShadowed && s.running() && s.Sidecar() != nil {
		return []finding.Finding{failed(step, what(e.Message), s.unshadow(e.Message))}
	}
	for _, warning := range result.Warnings {
		if strings.HasPrefix(warning, `container "`) && !strings.Contains(warning, "has envFrom") {
			fault, _, _ := strings.Cut(warning, ". ")
			all = append(all, unless(true, failed(step, fault, s.unshadow(warning))))
		}
	}
	all = append(all, s.secrets(step)...)
	all = append(all, s.unknown(step, snapshot.SourceEnvironment)...)
	if len(all) == 0 && err == nil {
		all = append(all, passed(step, "no variable outranks the sidecar"))
	}
	return append(all, s.nodeAskers()...)
}

// secrets names the Secrets from which containers take their environment. The command does not read Secrets.
func (s subject) secrets(step string) (all []finding.Finding) {
	for _, c := range s.Spec().Containers {
		for _, source := range c.EnvFrom {
			if source.SecretRef != nil {
				all = append(all, finding.Finding{
					Step: step, State: finding.Unknown, Text: fmt.Sprintf("container %s takes variables from Secret %s, which this command does not read", c.Name, source.SecretRef.Name),
					Remedy: &finding.Remedy{Who: finding.Author, What: "check that it has no AWS_ACCESS_KEY_ID, AWS_PROFILE or AWS_WEB_IDENTITY_TOKEN_FILE",
						Commands: []string{s.in("describe", "secret", source.SecretRef.Name)}},
				})
			}
		}
	}
	return all
}

// nodeAskers are hints that a program may ask the node's metadata service. An image's name is little evidence, so they are
// no warnings.
func (s subject) nodeAskers() (all []finding.Finding) {
	for _, c := range s.Spec().Containers {
		for _, program := range askNode {
			if strings.Contains(c.Image, program) || slices.ContainsFunc(slices.Concat(c.Command, c.Args), func(word string) bool { return strings.Contains(word, program) }) {
				all = append(all, finding.Finding{
					Step: "instance metadata", State: finding.Unknown, Text: fmt.Sprintf("container %s seems to run %s, some versions of which ask 169.254.169.254 and get the node's role", c.Name, program),
					Remedy: &finding.Remedy{Who: finding.Author, What: "compare its version with the page", Page: "docs/sdk-compatibility.md#what-asks-the-node-instead"},
				})
				break
			}
		}
	}
	return all
}

var variable = regexp.MustCompile(`container "([^"]+)" (?:sets|has|has an empty) (AWS_[A-Z0-9_]+)`)

// unshadow returns the remedy of a variable that outranks the sidecar, by the message about it.
func (s subject) unshadow(message string) finding.Remedy {
	r := finding.Remedy{Who: finding.Author, What: "remove it from the container, unless it is for something else", Page: "docs/errors.md"}
	match := variable.FindStringSubmatch(message)
	if match == nil {
		return r
	}
	container, name := match[1], match[2]
	names := []string{name}
	switch name {
	case "AWS_ACCESS_KEY_ID":
		names = []string{name, "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"}
	case "AWS_WEB_IDENTITY_TOKEN_FILE":
		names = []string{name, "AWS_ROLE_ARN"}
	}
	// A pod is made from its template. What the template lacks, a webhook has added.
	spec := s.Spec()
	if s.Workload != nil {
		spec = &s.Workload.Template.Spec
	}
	for _, c := range slices.Concat(spec.InitContainers, spec.Containers) {
		if c.Name != container {
			continue
		}
		for _, source := range c.EnvFrom {
			if ref := source.ConfigMapRef; ref != nil && s.Variables[ref.Name] != nil {
				if _, ok := s.Variables[ref.Name].Data[strings.TrimPrefix(name, source.Prefix)]; ok {
					r.What = "remove it from ConfigMap " + ref.Name + ", unless it is for something else, then recreate the pod"
					r.Commands = append([]string{s.in("patch", "configmap", ref.Name, "--type=merge", "-p", encode(m{"data": m{strings.TrimPrefix(name, source.Prefix): nil}}))}, s.recreate()...)
					return r
				}
			}
		}
		if !slices.ContainsFunc(c.Env, func(v corev1.EnvVar) bool { return v.Name == name }) {
			continue
		}
		if s.Workload != nil && s.File == "" {
			words := []string{"set", "env", s.Workload.Resource(), "-c", container}
			for _, v := range names {
				words = append(words, v+"-")
			}
			r.Commands = []string{s.in(words...)}
		}
		return r
	}
	account := s.PolicyPod().ServiceAccount
	switch {
	case name == "AWS_WEB_IDENTITY_TOKEN_FILE":
		r.What = "remove the role of IRSA from service account " + account + ", then recreate the pod"
		r.Commands = append([]string{s.in("annotate", "serviceaccount", account, "eks.amazonaws.com/role-arn-")}, s.recreate()...)
	case strings.HasPrefix(name, "AWS_CONTAINER_"):
		r.Who, r.What = finding.AWSAdmin, "delete the Pod Identity association of service account "+account+", then recreate the pod"
		r.Commands = append([]string{finding.Shell("aws", "eks", "list-pod-identity-associations", "--cluster-name", "CLUSTER", "--namespace", s.NamespaceName, "--service-account", account),
			finding.Shell("aws", "eks", "delete-pod-identity-association", "--cluster-name", "CLUSTER", "--association-id", "ID")}, s.recreate()...)
	}
	return r
}
