package snapshot

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strconv"
	"strings"

	appsv1 "k8s.io/api/apps/v1"
	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/validation"
	"k8s.io/apimachinery/pkg/util/yaml"
	"k8s.io/client-go/kubernetes/scheme"
)

// kinds are the kinds of a target, by the names that kubectl accepts.
var kinds = map[string]string{
	"po": "Pod", "deploy": "Deployment", "rs": "ReplicaSet", "sts": "StatefulSet", "ds": "DaemonSet", "cj": "CronJob", "rc": "ReplicationController", "job": "Job",
	"pod": "Pod", "deployment": "Deployment", "replicaset": "ReplicaSet", "statefulset": "StatefulSet", "daemonset": "DaemonSet", "cronjob": "CronJob",
	"replicationcontroller": "ReplicationController",
}

// ParseTarget returns the kind and name of an argument: NAME of a pod, or KIND/NAME.
func ParseTarget(text string) (kind, name string, err error) {
	word, name, ok := strings.Cut(text, "/")
	if !ok {
		return "Pod", text, nil
	}
	word = strings.ToLower(word)
	if kind = cmp.Or(kinds[word], kinds[strings.TrimSuffix(word, "s")]); kind == "" || name == "" {
		return "", "", fmt.Errorf("%q is not POD or KIND/NAME; kinds are %s. Of another controller, name one of its pods", text,
			strings.Join(slices.Compact(slices.Sorted(maps.Values(kinds))), ", "))
	}
	return kind, name, nil
}

// find reads the pod or controller, and returns the objects whose Events are about it.
func (g *gatherer) find(ctx context.Context, kind, name string) ([]metav1.ObjectMeta, error) {
	ns := g.NamespaceName
	if kind == "Pod" {
		pod, err := g.client.Kube.CoreV1().Pods(ns).Get(ctx, name, metav1.GetOptions{})
		if apierrors.IsNotFound(err) {
			return nil, fmt.Errorf("namespace %s has no pod %s; if its controller cannot create it, name the controller, such as deployment/%s", ns, name, name)
		}
		if err != nil {
			return nil, fmt.Errorf("reading pod %s/%s: %w", ns, name, err)
		}
		g.Pod = pod
		g.Workload = g.controllerOf(ctx, pod)
		return []metav1.ObjectMeta{pod.ObjectMeta}, nil
	}
	object, err := g.read(ctx, kind, name)
	if err != nil {
		return nil, fmt.Errorf("reading %s %s/%s: %w", strings.ToLower(kind), ns, name, err)
	}
	g.Workload = workloadOf(object)
	return g.podOf(ctx, object)
}

// read reads a controller.
func (g *gatherer) read(ctx context.Context, kind, name string) (runtime.Object, error) {
	apps, batch, ns, options := g.client.Kube.AppsV1(), g.client.Kube.BatchV1(), g.NamespaceName, metav1.GetOptions{}
	switch kind {
	case "Deployment":
		return apps.Deployments(ns).Get(ctx, name, options)
	case "ReplicaSet":
		return apps.ReplicaSets(ns).Get(ctx, name, options)
	case "StatefulSet":
		return apps.StatefulSets(ns).Get(ctx, name, options)
	case "DaemonSet":
		return apps.DaemonSets(ns).Get(ctx, name, options)
	case "Job":
		return batch.Jobs(ns).Get(ctx, name, options)
	case "CronJob":
		return batch.CronJobs(ns).Get(ctx, name, options)
	case "ReplicationController":
		return g.client.Kube.CoreV1().ReplicationControllers(ns).Get(ctx, name, options)
	}
	return nil, fmt.Errorf("kind %s is not known", kind)
}

// workloadOf returns a controller; nil if object is none.
func workloadOf(object runtime.Object) *Workload {
	wanted := func(replicas *int32) int {
		if replicas == nil {
			return 1
		}
		return int(*replicas)
	}
	switch o := object.(type) {
	case *appsv1.Deployment:
		return &Workload{Kind: "Deployment", Meta: o.ObjectMeta, Template: o.Spec.Template, Wanted: wanted(o.Spec.Replicas), Pods: int(o.Status.Replicas)}
	case *appsv1.ReplicaSet:
		return &Workload{Kind: "ReplicaSet", Meta: o.ObjectMeta, Template: o.Spec.Template, Wanted: wanted(o.Spec.Replicas), Pods: int(o.Status.Replicas)}
	case *appsv1.StatefulSet:
		return &Workload{Kind: "StatefulSet", Meta: o.ObjectMeta, Template: o.Spec.Template, Wanted: wanted(o.Spec.Replicas), Pods: int(o.Status.Replicas)}
	case *appsv1.DaemonSet:
		return &Workload{Kind: "DaemonSet", Meta: o.ObjectMeta, Template: o.Spec.Template, Wanted: int(o.Status.DesiredNumberScheduled), Pods: int(o.Status.CurrentNumberScheduled)}
	case *batchv1.Job:
		return &Workload{Kind: "Job", Meta: o.ObjectMeta, Template: o.Spec.Template, Wanted: 1, Pods: int(o.Status.Active + o.Status.Succeeded)}
	case *batchv1.CronJob:
		return &Workload{Kind: "CronJob", Meta: o.ObjectMeta, Template: o.Spec.JobTemplate.Spec.Template, Wanted: len(o.Status.Active)}
	case *corev1.ReplicationController:
		w := &Workload{Kind: "ReplicationController", Meta: o.ObjectMeta, Wanted: wanted(o.Spec.Replicas), Pods: int(o.Status.Replicas)}
		if o.Spec.Template != nil {
			w.Template = *o.Spec.Template
		}
		return w
	}
	return nil
}

// podOf chooses the pod of a controller that shows most, and returns the objects whose Events are about it. There is none if
// the controller lacks pods, because its newest ones are refused.
func (g *gatherer) podOf(ctx context.Context, object runtime.Object) ([]metav1.ObjectMeta, error) {
	ns, w := g.NamespaceName, g.Workload
	subjects, owner := []metav1.ObjectMeta{w.Meta}, w.Meta.UID
	switch w.Kind {
	case "Deployment":
		d, _ := object.(*appsv1.Deployment)
		sets, err := g.client.Kube.AppsV1().ReplicaSets(ns).List(ctx, metav1.ListOptions{LabelSelector: metav1.FormatLabelSelector(d.Spec.Selector)})
		if err != nil {
			return nil, fmt.Errorf("reading the ReplicaSets of %s: %w", w.Resource(), err)
		}
		newest := newestOf(sets.Items, func(r *appsv1.ReplicaSet) (metav1.ObjectMeta, int) {
			revision, _ := strconv.Atoi(r.Annotations["deployment.kubernetes.io/revision"])
			return r.ObjectMeta, revision
		}, w.Meta.UID)
		if newest == nil {
			return subjects, nil
		}
		owner, subjects = newest.UID, append(subjects, newest.ObjectMeta)
		w.Wanted, w.Pods = workloadOf(newest).Wanted, int(newest.Status.Replicas)
		g.replicaFailure(newest)
	case "ReplicaSet":
		set, _ := object.(*appsv1.ReplicaSet)
		g.replicaFailure(set)
	case "CronJob":
		jobs, err := g.client.Kube.BatchV1().Jobs(ns).List(ctx, metav1.ListOptions{})
		if err != nil {
			return nil, fmt.Errorf("reading the Jobs of %s: %w", w.Resource(), err)
		}
		newest := newestOf(jobs.Items, func(j *batchv1.Job) (metav1.ObjectMeta, int) {
			return j.ObjectMeta, int(j.CreationTimestamp.Unix())
		}, w.Meta.UID)
		if newest == nil {
			return subjects, nil
		}
		owner, subjects = newest.UID, append(subjects, newest.ObjectMeta)
		w.Wanted, w.Pods = 1, workloadOf(newest).Pods
	}
	if w.Pods < w.Wanted && w.Pods == 0 {
		return subjects, nil
	}
	pods, err := g.client.Kube.CoreV1().Pods(ns).List(ctx, metav1.ListOptions{Limit: 500, LabelSelector: metav1.FormatLabelSelector(&metav1.LabelSelector{MatchLabels: w.Template.Labels})})
	if err != nil {
		return nil, fmt.Errorf("reading the pods of %s: %w", w.Resource(), err)
	}
	worst := -1
	for i := range pods.Items {
		p := &pods.Items[i]
		if controller := metav1.GetControllerOf(p); controller == nil || controller.UID != owner || p.DeletionTimestamp != nil {
			continue
		}
		if score := badness(p); score > worst || score == worst && g.Pod.CreationTimestamp.Before(&p.CreationTimestamp) {
			worst, g.Pod = score, p
		}
	}
	if g.Pod != nil {
		subjects = append(subjects, g.Pod.ObjectMeta)
	}
	return subjects, nil
}

// newestOf returns the object of the owner with the highest rank; nil if there is none.
func newestOf[T any](all []T, of func(*T) (metav1.ObjectMeta, int), owner types.UID) (newest *T) {
	highest := -1
	for i := range all {
		meta, rank := of(&all[i])
		if controller := metav1.GetControllerOf(&meta); controller != nil && controller.UID == owner && rank > highest {
			highest, newest = rank, &all[i]
		}
	}
	return newest
}

// replicaFailure keeps the condition that lasts longer than the Event about a pod that was refused.
func (g *gatherer) replicaFailure(set *appsv1.ReplicaSet) {
	for _, c := range set.Status.Conditions {
		if c.Type == appsv1.ReplicaSetReplicaFailure && c.Status == corev1.ConditionTrue {
			g.mu.Lock()
			g.Messages = append(g.Messages, Message{Object: "replicaset/" + set.Name, Reason: c.Reason, Text: c.Message, Time: c.LastTransitionTime.Time})
			g.mu.Unlock()
		}
	}
}

// badness ranks pods by how much is wrong with their sidecar.
func badness(p *corev1.Pod) int {
	status := (&Snapshot{Pod: p}).SidecarStatus()
	switch {
	case status == nil:
		return 3
	case status.State.Waiting != nil:
		return 4
	case status.Started == nil || !*status.Started:
		return 2
	case p.Status.Phase != corev1.PodRunning:
		return 0
	case slices.ContainsFunc(p.Status.ContainerStatuses, func(c corev1.ContainerStatus) bool { return !c.Ready }):
		return 1
	}
	return 0
}

// controllerOf returns the controller that a user made, such as the Deployment of the pod's ReplicaSet; nil if there is
// none. If the user may not read it, or it is of another kind, the pod counts as its template.
func (g *gatherer) controllerOf(ctx context.Context, pod *corev1.Pod) *Workload {
	reference := metav1.GetControllerOf(pod)
	if reference == nil || reference.Kind == "Node" || !plausible(reference) {
		return nil
	}
	w := &Workload{Kind: reference.Kind, Meta: metav1.ObjectMeta{Name: reference.Name}, Template: corev1.PodTemplateSpec{ObjectMeta: pod.ObjectMeta, Spec: pod.Spec}}
	for reference != nil && kinds[strings.ToLower(reference.Kind)] != "" {
		object, err := g.read(ctx, reference.Kind, reference.Name)
		if err != nil {
			break
		}
		w = workloadOf(object)
		reference = metav1.GetControllerOf(&w.Meta)
	}
	return w
}

// plausible reports whether a reference can be one that a controller made. The API server accepts any kind and name, so the
// author of a pod could choose what a command of a remedy takes as a flag.
func plausible(r *metav1.OwnerReference) bool {
	return len(validation.IsDNS1123Label(strings.ToLower(r.Kind))) == 0 && len(validation.IsDNS1123Subdomain(r.Name)) == 0
}

// Manifest is a pod or a controller of a manifest.
type Manifest struct {
	Namespace string // empty: it names none
	Pod       *corev1.Pod
	Workload  *Workload
}

// maxManifest bounds a manifest, in bytes.
const maxManifest = 16 << 20

// ReadManifests returns the pods and controllers of YAML or JSON. It leaves out objects of other kinds.
func ReadManifests(r io.Reader) (all []Manifest, err error) {
	text, err := io.ReadAll(io.LimitReader(r, maxManifest+1))
	if err != nil {
		return nil, err
	}
	if len(text) > maxManifest {
		return nil, fmt.Errorf("is longer than %d bytes", maxManifest)
	}
	documents := yaml.NewYAMLOrJSONDecoder(bytes.NewReader(text), 4096)
	for {
		var raw runtime.RawExtension
		if err := documents.Decode(&raw); errors.Is(err, io.EOF) {
			return all, nil
		} else if err != nil {
			return nil, err
		}
		if len(bytes.TrimSpace(raw.Raw)) == 0 || string(raw.Raw) == "null" {
			continue
		}
		object, _, err := scheme.Codecs.UniversalDeserializer().Decode(raw.Raw, nil, nil)
		if runtime.IsNotRegisteredError(err) {
			continue
		} else if err != nil {
			return nil, err
		}
		if pod, ok := object.(*corev1.Pod); ok {
			all = append(all, Manifest{Namespace: pod.Namespace, Pod: pod})
		} else if w := workloadOf(object); w != nil {
			w.Pods = w.Wanted
			all = append(all, Manifest{Namespace: w.Meta.Namespace, Workload: w})
		}
	}
}
