package snapshot

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"

	"github.com/credence-iam/credence/broker/clip"
	"github.com/credence-iam/credence/operator/finding"
	"github.com/credence-iam/credence/operator/installation"
	"github.com/credence-iam/credence/sidecar/contract"
)

const (
	// partTimeout bounds one part of a snapshot. Together with the parts before it, a snapshot takes less than two seconds.
	partTimeout = 1200 * time.Millisecond
	// logLines and logBytes bound the part of the sidecar's log that is read. It logs about two lines an hour, and one a
	// minute while it fails.
	logLines, logBytes = 200, 256 << 10
	// maxEvents bounds the Events of one object. The API server keeps them for an hour.
	maxEvents = 200
	// maxVariables bounds the ConfigMaps that are read because containers take variables from them.
	maxVariables = 20
)

// Request says of what to make a snapshot.
type Request struct {
	Namespace string
	// Kind and Name are the pod or controller, see [ParseTarget].
	Kind, Name string
	// Manifest is read from File and not looked for in the cluster. Nil: Kind and Name are.
	Manifest *Manifest
	File     string
	// Judge and Target are as in [Snapshot].
	Judge  Judge
	Target finding.Cluster
}

// gatherer collects the parts of a snapshot at the same time.
type gatherer struct {
	*Snapshot
	client *installation.Client
	asked  time.Time // when the API server said Now, by the clock of this machine

	mu      sync.Mutex // guards Snapshot while parts run
	running sync.WaitGroup
}

// Gather returns a snapshot. found is nil if there is no Credence in the cluster. It fails only if the pod or controller
// cannot be read.
func Gather(ctx context.Context, client *installation.Client, found *installation.Installation, r Request) (*Snapshot, error) {
	g := &gatherer{client: client, Snapshot: &Snapshot{
		Target: r.Target, File: r.File, NamespaceName: r.Namespace, Judge: r.Judge,
		Problems: map[string]Problem{}, Variables: map[string]*corev1.ConfigMap{}, Installation: Installation{Found: found},
	}}
	g.part(ctx, "", func(ctx context.Context) (func(), error) {
		now, err := serverTime(ctx, client.Config)
		return func() { g.Now, g.asked = now, time.Now() }, err
	})
	g.part(ctx, SourceNamespace, func(ctx context.Context) (func(), error) {
		ns, err := client.Kube.CoreV1().Namespaces().Get(ctx, r.Namespace, metav1.GetOptions{})
		return func() { g.Namespace = ns }, err
	})
	var err error
	var subjects []metav1.ObjectMeta
	if r.Manifest != nil {
		g.Pod, g.Workload = r.Manifest.Pod, r.Manifest.Workload
	} else {
		subjects, err = g.find(ctx, r.Kind, r.Name)
	}
	g.running.Wait()
	if err != nil {
		return nil, err
	}
	if g.Now.IsZero() {
		g.Now, g.asked = time.Now(), time.Now()
	}
	g.aboutPod(ctx, subjects)
	if found != nil {
		g.aboutInstallation(ctx, found)
	}
	g.running.Wait()
	g.verify()
	slices.SortStableFunc(g.Messages, func(a, b Message) int { return b.Time.Compare(a.Time) })
	return g.Snapshot, nil
}

// part reads one part in the background. read returns the function that stores the result. With an error, that function is
// not called, and Problems gets the error.
func (g *gatherer) part(ctx context.Context, source string, read func(context.Context) (func(), error)) {
	g.running.Go(func() {
		ctx, cancel := context.WithTimeout(ctx, partTimeout)
		defer cancel()
		store, err := read(ctx)
		g.mu.Lock()
		defer g.mu.Unlock()
		switch {
		case err == nil:
			store()
		case source != "":
			g.Problems[source] = ProblemOf(err)
		}
	})
}

var forbidden = regexp.MustCompile(`cannot ([a-z]+) resource "([^"]+)" in API group "([^"]*)"(?: in the namespace "([^"]+)")?`)

// ProblemOf says why a part could not be read. If a right is missing, it names the right.
func ProblemOf(err error) Problem {
	if match := forbidden.FindStringSubmatch(err.Error()); match != nil {
		where := "in the whole cluster"
		if match[4] != "" {
			where = "in namespace " + match[4]
		}
		return Problem(fmt.Sprintf("needs: %s %s %s", match[1], match[2], where))
	}
	if errors.Is(err, context.DeadlineExceeded) {
		return Problem(fmt.Sprintf("no response within %s: %s", partTimeout, clip.Bytes(err.Error(), 300)))
	}
	return Problem(clip.Bytes(err.Error(), 300))
}

// serverTime returns the clock of the API server.
func serverTime(ctx context.Context, config *rest.Config) (time.Time, error) {
	client, err := rest.HTTPClientFor(config)
	if err != nil {
		return time.Time{}, err
	}
	u, _, err := rest.DefaultServerUrlFor(config)
	if err != nil {
		return time.Time{}, err
	}
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, u.JoinPath("version").String(), nil)
	if err != nil {
		return time.Time{}, err
	}
	response, err := client.Do(request)
	if err != nil {
		return time.Time{}, err
	}
	defer response.Body.Close()
	return http.ParseTime(response.Header.Get("Date"))
}

// aboutPod reads what belongs to the pod: Events, log, the brokers' roots in its namespace, and variables.
func (g *gatherer) aboutPod(ctx context.Context, subjects []metav1.ObjectMeta) {
	kube, ns := g.client.Kube, g.NamespaceName
	for _, subject := range subjects {
		g.part(ctx, SourceEvents, func(ctx context.Context) (func(), error) {
			list, err := kube.CoreV1().Events(ns).List(ctx, metav1.ListOptions{FieldSelector: "involvedObject.uid=" + string(subject.UID), Limit: maxEvents})
			if err != nil {
				return nil, err
			}
			return func() {
				for i := range list.Items {
					g.Messages = append(g.Messages, messageOf(&list.Items[i]))
				}
			}, nil
		})
	}
	g.part(ctx, SourceTrust, func(ctx context.Context) (func(), error) {
		trust, err := kube.CoreV1().ConfigMaps(ns).Get(ctx, installation.TrustConfigMap, metav1.GetOptions{})
		if apierrors.IsNotFound(err) {
			return func() { g.TrustGone = true }, nil
		}
		return func() { g.Trust = trust }, err
	})
	if status := g.SidecarStatus(); g.File == "" && status != nil && (status.State.Running != nil || status.State.Terminated != nil) {
		g.part(ctx, SourceLog, func(ctx context.Context) (func(), error) {
			text, err := kube.CoreV1().Pods(ns).GetLogs(g.Pod.Name, &corev1.PodLogOptions{
				Container: contract.ContainerName, TailLines: new(int64(logLines)), LimitBytes: new(int64(logBytes)),
			}).DoRaw(ctx)
			return func() { g.Log = append([]LogLine{}, ParseLog(string(text))...) }, err
		})
	}
	var names []string
	for _, c := range slices.Concat(g.Spec().InitContainers, g.Spec().Containers) {
		for _, source := range c.EnvFrom {
			if ref := source.ConfigMapRef; ref != nil && !slices.Contains(names, ref.Name) && len(names) < maxVariables {
				names = append(names, ref.Name)
			}
		}
	}
	for _, name := range names {
		g.part(ctx, SourceEnvironment, func(ctx context.Context) (func(), error) {
			config, err := kube.CoreV1().ConfigMaps(ns).Get(ctx, name, metav1.GetOptions{})
			return func() { g.Variables[name] = config }, err
		})
	}
}

// aboutPolicies reads the NetworkPolicies between the pod and the brokers.
func (g *gatherer) aboutPolicies(ctx context.Context, brokers string) {
	namespaces := []string{g.NamespaceName, brokers}
	for _, ns := range slices.Compact(namespaces) {
		g.part(ctx, SourcePolicies, func(ctx context.Context) (func(), error) {
			list, err := g.client.Kube.NetworkingV1().NetworkPolicies(ns).List(ctx, metav1.ListOptions{Limit: 500})
			if err != nil {
				return nil, err
			}
			return func() { g.Policies = append(g.Policies, list.Items...) }, nil
		})
	}
	g.part(ctx, "", func(ctx context.Context) (func(), error) {
		ns, err := g.client.Kube.CoreV1().Namespaces().Get(ctx, brokers, metav1.GetOptions{})
		return func() { g.BrokersNamespace = ns }, err
	})
}

// messageOf returns an Event. Those of the broker are of the newer API, whose times are elsewhere.
func messageOf(e *corev1.Event) Message {
	at := e.LastTimestamp.Time
	if e.EventTime.After(at) {
		at = e.EventTime.Time
	}
	if e.Series != nil && e.Series.LastObservedTime.After(at) {
		at = e.Series.LastObservedTime.Time
	}
	return Message{Object: strings.ToLower(e.InvolvedObject.Kind) + "/" + e.InvolvedObject.Name, Reason: e.Reason, Text: e.Message, Time: at}
}
