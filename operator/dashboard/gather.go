package dashboard

import (
	"cmp"
	"context"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/credence-iam/credence/broker/clip"
	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/operator/dashboard/view"
	"github.com/credence-iam/credence/operator/finding"
	"github.com/credence-iam/credence/operator/installation"
	"github.com/credence-iam/credence/operator/metrics"
)

const (
	// atOnce is how many pods are read at a time. A page of 10,000 grants takes some 30 MB while it is read.
	atOnce = 4
	// eventsAge is how old the list of Events may be: to make it, an API server reads all Events of the cluster.
	eventsAge = 30 * time.Second
	// eventsPage is how many Events one request returns.
	eventsPage = 500
	// eventsBy selects the Events of brokers.
	eventsBy = "reportingComponent=credence-iam.github.io/broker"
	// podsOf selects the pods of webhooks and brokers.
	podsOf, componentLabel = "app.kubernetes.io/name=credence,app.kubernetes.io/component in (broker,webhook)", "app.kubernetes.io/component"
	zoneLabel              = "topology.kubernetes.io/zone"
	metricsPath            = "/metrics"
	maxText                = 600 // of one message, in bytes
)

// Gatherer reads snapshots with the rights of its user.
type Gatherer struct {
	// Client is the cluster. Required.
	Client *installation.Client
	// Cluster is the name of the context, Namespace that of Credence. Required.
	Cluster, Namespace string
	// Target has the flags that choose the cluster.
	Target finding.Cluster

	refused    []view.Refused
	refusedErr error
	refusedAt  time.Time
}

// Gather returns the present state. What cannot be read is a problem of the snapshot. It is for one goroutine at a time.
func (g *Gatherer) Gather(ctx context.Context) view.Snapshot {
	s := view.Snapshot{Cluster: g.Cluster, Namespace: g.Namespace, Target: g.Target}
	problem := func(err error, right string) {
		if isForbidden(err) {
			err = fmt.Errorf("needs: %s; the cluster admin can grant it: %w", right, err)
		}
		s.Problems = append(s.Problems, shorten(err.Error()))
	}
	if found, err := g.Client.Find(ctx, g.Namespace); err != nil {
		problem(err, "get deployments in "+g.Namespace)
	} else {
		s.Webhook, s.Broker = deployment(found.Webhook), deployment(found.Broker)
		if s.Webhook == nil || s.Broker == nil {
			for _, err := range found.Problems {
				if strings.HasPrefix(err.Error(), "reading deployment") {
					problem(err, "get deployments in "+g.Namespace)
				}
			}
		}
	}
	pods, err := g.Client.Kube.CoreV1().Pods(g.Namespace).List(ctx, metav1.ListOptions{LabelSelector: podsOf, Limit: 500})
	if err != nil {
		problem(fmt.Errorf("listing the pods of Credence: %w", err), "list pods in "+g.Namespace)
		pods = &corev1.PodList{}
	}
	brokers, err := g.Client.Brokers(ctx, g.Namespace)
	if err != nil && len(pods.Items) > 0 {
		problem(err, "list pods in "+g.Namespace)
	}
	forwards := g.read(ctx, &s, pods.Items, brokers)
	if forwards != nil {
		problem(forwards, "create pods/portforward in "+g.Namespace)
	}
	g.events(ctx)
	if s.Refused, s.RefusedKnown = g.refused, g.refusedErr == nil; g.refusedErr != nil {
		problem(fmt.Errorf("listing the Events of brokers: %w", g.refusedErr), "list events in all namespaces")
	}
	s.Time = time.Now()
	return s
}

func deployment(d *appsv1.Deployment) *view.Deployment {
	if d == nil {
		return nil
	}
	want := 1 // Kubernetes' default
	if d.Spec.Replicas != nil {
		want = int(*d.Spec.Replicas)
	}
	return &view.Deployment{Want: want, Ready: int(d.Status.ReadyReplicas)}
}

// read reads the pages of all pods. It returns an error if the user may not read any.
func (g *Gatherer) read(ctx context.Context, s *view.Snapshot, items []corev1.Pod, brokers []installation.Broker) (refused error) {
	s.Pods = make([]view.Pod, len(items))
	sessions := make([][]view.Session, len(items))
	errs := make([]error, len(items))
	places := make(chan struct{}, atOnce)
	var all sync.WaitGroup
	for n := range items {
		p := &s.Pods[n]
		*p = podOf(&items[n])
		if items[n].Status.Phase != corev1.PodRunning {
			p.Err = "the pod does not run: " + p.State
			continue
		}
		all.Go(func() {
			places <- struct{}{}
			defer func() { <-places }()
			var text []byte
			if text, errs[n] = g.Client.PodCall(ctx, &items[n], http.MethodGet, installation.BrokerAdminPort, metricsPath, nil); errs[n] == nil {
				p.Metrics, p.Read = metrics.Parse(text), time.Now()
				at := slices.IndexFunc(brokers, func(b installation.Broker) bool { return b.Pod.Name == p.Name })
				if at >= 0 {
					sessions[n], errs[n] = sessionsOf(ctx, brokers[at])
				}
			}
			if errs[n] != nil {
				p.Err = shorten(errs[n].Error())
			}
		})
	}
	all.Wait()
	for n := range items {
		room := max(view.MaxSessions-len(s.Sessions), 0)
		s.SessionsLeftOut += max(len(sessions[n])-room, 0)
		s.Sessions = append(s.Sessions, sessions[n][:min(len(sessions[n]), room)]...)
		if errs[n] != nil && isForbidden(errs[n]) {
			refused = errs[n]
		}
	}
	slices.SortFunc(s.Pods, func(a, b view.Pod) int { return cmp.Compare(a.Name, b.Name) })
	return refused
}

// isForbidden reports whether the user lacks a right. The error of a port-forward has only a text.
func isForbidden(err error) bool {
	return apierrors.IsForbidden(err) || strings.Contains(err.Error(), "forbidden")
}

func podOf(pod *corev1.Pod) view.Pod {
	p := view.Pod{
		Name: pod.Name, Node: pod.Spec.NodeName, Zone: pod.Labels[zoneLabel], Webhook: pod.Labels[componentLabel] == "webhook",
		State: string(pod.Status.Phase), Started: pod.CreationTimestamp.Time,
	}
	if len(pod.Spec.Containers) > 0 {
		p.Image = pod.Spec.Containers[0].Image
	}
	for _, c := range pod.Status.ContainerStatuses {
		p.Restarts += int(c.RestartCount)
		switch {
		case c.State.Waiting != nil:
			p.State = c.State.Waiting.Reason
		case c.State.Terminated != nil:
			p.State = c.State.Terminated.Reason
		}
	}
	for _, c := range pod.Status.Conditions {
		p.Ready = p.Ready || c.Type == corev1.PodReady && c.Status == corev1.ConditionTrue
	}
	if pod.DeletionTimestamp != nil {
		p.State = "Terminating"
	}
	return p
}

func sessionsOf(ctx context.Context, b installation.Broker) ([]view.Session, error) {
	page, err := b.Grants(ctx, nil)
	if err != nil && len(page.Grants) == 0 {
		return nil, err
	}
	now := time.Now()
	all := make([]view.Session, 0, len(page.Grants))
	for _, grant := range page.Grants {
		grant.Message = shorten(grant.Message)
		all = append(all, view.Session{Grant: grant, Broker: b.Pod.Name, Read: now})
	}
	return all, nil
}

// events reads the Events of brokers in all namespaces, unless the list is new.
func (g *Gatherer) events(ctx context.Context) {
	if time.Since(g.refusedAt) < eventsAge {
		return
	}
	g.refused, g.refusedErr, g.refusedAt = nil, nil, time.Now()
	options := metav1.ListOptions{FieldSelector: eventsBy, Limit: eventsPage}
	for {
		list, err := g.Client.Kube.CoreV1().Events(metav1.NamespaceAll).List(ctx, options)
		if err != nil {
			g.refusedErr = err
			return
		}
		for n := range list.Items {
			if e := refusedOf(&list.Items[n]); time.Since(e.Time) < time.Hour {
				g.refused = append(g.refused, e)
			}
		}
		if options.Continue = list.Continue; options.Continue == "" || len(g.refused) >= view.MaxRefused {
			break
		}
	}
	slices.SortStableFunc(g.refused, func(a, b view.Refused) int { return b.Time.Compare(a.Time) })
	g.refused = g.refused[:min(len(g.refused), view.MaxRefused)]
}

func refusedOf(e *corev1.Event) view.Refused {
	r := view.Refused{Namespace: e.InvolvedObject.Namespace, Pod: e.InvolvedObject.Name, Event: e.Reason, Message: e.Message, Time: e.EventTime.Time}
	if e.Series != nil {
		r.Time = e.Series.LastObservedTime.Time
	}
	if r.Time.IsZero() {
		r.Time = e.LastTimestamp.Time
	}
	if reason, message, found := strings.Cut(e.Message, ": "); found && slices.Contains(credential.Reasons(), credential.Reason(reason)) {
		r.Reason, r.Message = reason, message
	} else if e.Reason == "CredentialsShadowed" {
		r.Reason = string(credential.ReasonShadowed)
	}
	r.Message = shorten(r.Message)
	return r
}

// shorten limits the length of a text.
func shorten(text string) string { return clip.Bytes(text, maxText) }
