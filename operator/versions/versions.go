// Package versions shows which versions of Credence run in a cluster: webhook, brokers and the sidecars in running pods,
// beside the versions of Kubernetes and of the credence command. It reports parts that are too far apart to work together.
// It reads lists of pods page by page, and stores one row for each image.
package versions

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/credence-iam/credence/broker/clip"
	"github.com/credence-iam/credence/broker/policy"
	"github.com/credence-iam/credence/operator/finding"
	"github.com/credence-iam/credence/operator/installation"
	"github.com/credence-iam/credence/sidecar/contract"
)

// The parts.
const (
	webhook = "webhook"
	broker  = "broker"
	sidecar = "sidecar"
)

const (
	// firstTimeout limits the first request, which shows whether the cluster is available.
	firstTimeout = 20 * time.Second
	// pageSize is how many pods one request lists. A page has a few MB.
	pageSize = 500
	// maxNamed limits the namespaces that a finding names.
	maxNamed = 5
)

// Program is one image of a part, and the pods that run it.
type Program struct {
	Part string `json:"part"`
	// Version is empty if neither the image's tag nor a label of its Deployment says it.
	Version string `json:"version,omitempty"`
	Image   string `json:"image"`
	// Digest is that of the image that runs, as its node reports it.
	Digest string `json:"digest,omitempty"`
	Pods   int    `json:"pods"`
	// Namespaces has the number of pods in each namespace. Only sidecars have it.
	Namespaces map[string]int `json:"namespaces,omitempty"`
}

// Report has all versions.
type Report struct {
	Client string `json:"client"`
	// Cluster names the cluster. It and the following fields are empty if no cluster was read.
	Cluster    string            `json:"cluster,omitempty"`
	Kubernetes string            `json:"kubernetes,omitempty"`
	Namespace  string            `json:"namespace,omitempty"`
	Programs   []Program         `json:"programs,omitempty"`
	Findings   []finding.Finding `json:"findings,omitempty"`

	label  string // selects injected pods
	target finding.Cluster
}

// Config configures [Read].
type Config struct {
	Client *installation.Client
	// Cluster names the cluster. Version is that of the credence command.
	Cluster, Version string
	// Target has the flags that choose the cluster.
	Target finding.Cluster
	// Installed is the namespace of Credence. Default: Read looks for it.
	Installed string
	// Namespace is the namespace whose pods Read lists if the user may not list those of all namespaces.
	Namespace string
}

// Read reads the versions from a cluster. It returns an error only if the cluster is unavailable. Other failures are
// findings.
func Read(ctx context.Context, cfg Config) (Report, error) {
	r := Report{Client: cfg.Version, Cluster: cfg.Cluster, target: cfg.Target}
	var err error
	if r.Kubernetes, err = kubernetes(ctx, cfg.Client); err != nil {
		return r, fmt.Errorf("reading the version of Kubernetes of %s: %w", cfg.Cluster, err)
	}
	found, err := cfg.Client.Find(ctx, cfg.Installed)
	if err != nil {
		r.unknown("installation", err)
		r.judge()
		return r, nil
	}
	r.Namespace = found.Namespace
	for _, part := range []struct {
		name       string
		deployment *appsv1.Deployment
	}{{webhook, found.Webhook}, {broker, found.Broker}} {
		if part.deployment == nil {
			continue
		}
		if err := r.readPart(ctx, cfg.Client, part.name, part.deployment); err != nil {
			r.unknown(part.name, err)
		}
	}
	for _, err := range found.Problems {
		r.unknown("installation", err)
	}
	if err := r.readSidecars(ctx, cfg, found); err != nil {
		r.unknown(sidecar, err)
	}
	slices.SortStableFunc(r.Programs, func(a, b Program) int {
		order := []string{webhook, broker, sidecar}
		return cmp.Or(cmp.Compare(slices.Index(order, a.Part), slices.Index(order, b.Part)), -cmp.Compare(a.Pods, b.Pods),
			cmp.Compare(a.Image, b.Image), cmp.Compare(a.Digest, b.Digest))
	})
	r.judge()
	return r, nil
}

// kubernetes returns the version of Kubernetes. It ends with ctx, unlike the method of the discovery client.
func kubernetes(ctx context.Context, client *installation.Client) (string, error) {
	ctx, stop := context.WithTimeoutCause(ctx, firstTimeout, fmt.Errorf("no response within %s", firstTimeout))
	defer stop()
	text, err := client.Kube.Discovery().RESTClient().Get().AbsPath("/version").Do(ctx).Raw()
	if err != nil {
		return "", cmp.Or(context.Cause(ctx), err)
	}
	var info struct {
		GitVersion string `json:"gitVersion"`
	}
	if err := json.Unmarshal(text, &info); err != nil {
		return "", fmt.Errorf("this is no API server of Kubernetes: %w", err)
	}
	return info.GitVersion, nil
}

// add counts the pod as one that runs the image in its container of that name.
func (r *Report) add(part, container string, pod *corev1.Pod) {
	image := installation.Image("")
	for _, c := range slices.Concat(pod.Spec.InitContainers, pod.Spec.Containers) {
		if c.Name == container {
			image = installation.Image(c.Image)
		}
	}
	if image == "" || pod.Status.Phase != corev1.PodRunning {
		return
	}
	digest := ""
	for _, s := range slices.Concat(pod.Status.InitContainerStatuses, pod.Status.ContainerStatuses) {
		if s.Name == container {
			digest = s.ImageID[strings.LastIndexByte(s.ImageID, '@')+1:]
		}
	}
	at := slices.IndexFunc(r.Programs, func(p Program) bool {
		return p.Part == part && p.Image == string(image) && p.Digest == digest
	})
	if at < 0 {
		at = len(r.Programs)
		r.Programs = append(r.Programs, Program{Part: part, Version: image.Version(), Image: string(image), Digest: digest})
	}
	p := &r.Programs[at]
	if p.Pods++; part != sidecar {
		return
	}
	if p.Namespaces == nil {
		p.Namespaces = map[string]int{}
	}
	p.Namespaces[pod.Namespace]++
}

// readPart reads the pods of a Deployment.
func (r *Report) readPart(ctx context.Context, client *installation.Client, part string, d *appsv1.Deployment) error {
	image := installation.ImageOf(d, part)
	said := "" // the version of an image without a tag
	if image.Tag() == "" {
		said = installation.Image(":" + d.Labels["app.kubernetes.io/version"]).Version()
	}
	selector, err := metav1.LabelSelectorAsSelector(d.Spec.Selector)
	if err == nil {
		err = eachPod(ctx, client, d.Namespace, selector.String(), func(pod *corev1.Pod) { r.add(part, part, pod) })
	}
	for n := range r.Programs {
		if p := &r.Programs[n]; p.Part == part && p.Image == string(image) {
			p.Version = cmp.Or(p.Version, said)
		}
	}
	if r.of(part) == "" && err == nil && !slices.ContainsFunc(r.Programs, func(p Program) bool { return p.Part == part }) {
		r.Programs = append(r.Programs, Program{Part: part, Version: cmp.Or(image.Version(), said), Image: string(image)})
	}
	return err
}

// readSidecars reads the injected pods of all namespaces, or of cfg.Namespace if the user may not.
func (r *Report) readSidecars(ctx context.Context, cfg Config, found *installation.Installation) error {
	args := found.WebhookArgs()
	r.label = cmp.Or(installation.Arg(args, "annotation-prefix"), policy.DefaultPrefix) + "/" + string(policy.Injected) + "=true"
	count := func(pod *corev1.Pod) { r.add(sidecar, contract.ContainerName, pod) }
	err := eachPod(ctx, cfg.Client, metav1.NamespaceAll, r.label, count)
	if apierrors.IsForbidden(err) && cfg.Namespace != "" {
		one := eachPod(ctx, cfg.Client, cfg.Namespace, r.label, count)
		err = fmt.Errorf("only those of namespace %s are counted: %w", cfg.Namespace, cmp.Or(one, err))
	}
	// An image with a digest alone says no version. The webhook injects the one of its own version.
	current := installation.Arg(args, "sidecar-image")
	for n := range r.Programs {
		if p := &r.Programs[n]; p.Part == sidecar && p.Image == current {
			p.Version = cmp.Or(p.Version, r.of(webhook))
		}
	}
	return err
}

// eachPod calls f for each pod, page by page.
func eachPod(ctx context.Context, client *installation.Client, namespace, selector string, f func(*corev1.Pod)) error {
	options := metav1.ListOptions{LabelSelector: selector, Limit: pageSize}
	for {
		page, err := client.Kube.CoreV1().Pods(namespace).List(ctx, options)
		if err != nil {
			return err
		}
		for n := range page.Items {
			f(&page.Items[n])
		}
		if options.Continue = page.Continue; options.Continue == "" {
			return nil
		}
	}
}

// of returns the newest version of a part, "" if it is not known.
func (r *Report) of(part string) (newest string) {
	for _, p := range r.Programs {
		if p.Part == part && p.Version != "" && (newest == "" || installation.Older(newest, p.Version)) {
			newest = p.Version
		}
	}
	return newest
}

func (r *Report) unknown(step string, err error) {
	r.note(finding.Finding{Step: step, State: finding.Unknown, Text: err.Error()})
}

func (r *Report) note(f finding.Finding) {
	all := finding.Report{Findings: r.Findings}
	all.Add(f)
	r.Findings = all.Findings
}

// judge adds findings about versions that do not work together.
func (r *Report) judge() {
	if installation.OlderKubernetes(r.Kubernetes, installation.OldestKubernetes) {
		r.note(finding.Finding{
			Step: "Kubernetes", State: finding.Failed, Text: fmt.Sprintf("Kubernetes %s is older than 1.%d, the oldest that Credence supports", r.Kubernetes, installation.OldestKubernetes),
			Remedy: &finding.Remedy{Who: finding.ClusterAdmin, What: "upgrade Kubernetes", Page: "docs/upgrade.md"},
		})
	}
	newest := r.of(broker)
	if hook := r.of(webhook); newest == "" || hook != "" && installation.Older(newest, hook) {
		newest = hook
	}
	if apart := installation.Apart(r.Client, newest); apart > installation.MaxApart {
		r.skew("client", r.Client, "this command", newest, finding.Remedy{
			Who: finding.Author, What: "install the credence command " + newest, Page: "docs/cli.md",
		})
	}
	for _, p := range r.Programs {
		if installation.Apart(p.Version, newest) <= installation.MaxApart {
			continue
		}
		what := fmt.Sprintf("%s of %d pods", p.Part, p.Pods)
		if p.Part != sidecar {
			r.skew(p.Part, p.Version, what, newest, finding.Remedy{
				Who: finding.ClusterAdmin, What: "upgrade all parts to one version", Page: "docs/upgrade.md",
				Commands: []string{r.target.Helm("-n", r.Namespace, "history", "credence")},
			})
			continue
		}
		var names, commands []string
		for name := range p.Namespaces {
			names = append(names, name)
		}
		slices.SortFunc(names, func(a, b string) int {
			return cmp.Or(-cmp.Compare(p.Namespaces[a], p.Namespaces[b]), cmp.Compare(a, b))
		})
		for _, name := range names[:min(len(names), maxNamed)] {
			commands = append(commands, r.target.Kubectl("-n", name, "get", "pods", "-l", r.label, "-o",
				`custom-columns=NAME:.metadata.name,OWNER:.metadata.ownerReferences[0].name,SIDECAR:.spec.initContainers[?(@.name=="`+contract.ContainerName+`")].image`))
		}
		if more := len(names) - maxNamed; more > 0 {
			what += fmt.Sprintf(" in %d namespaces", len(names))
		}
		r.skew(p.Part, p.Version, what, newest, finding.Remedy{
			Who: finding.NamespaceOwner, What: "replace these pods, for example with kubectl rollout restart; new pods get the webhook's sidecar", Commands: commands, Page: "docs/upgrade.md",
		})
	}
}

func (r *Report) skew(step, own, what, newest string, remedy finding.Remedy) {
	r.note(finding.Finding{
		Step: step, State: finding.Warning, Remedy: &remedy,
		Text: fmt.Sprintf("the %s has version %s, and Credence in the cluster %s; they work together if they are one minor version apart", what, own, newest),
	})
}

// Found reports whether a finding needs a reader's attention.
func (r *Report) Found() bool {
	all := finding.Report{Findings: r.Findings}
	_, found := all.Cause()
	return found
}

// Write prints the report for a terminal.
func (r *Report) Write(w io.Writer) error {
	var b strings.Builder
	table := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
	row := func(columns ...string) {
		for n, column := range columns {
			columns[n] = finding.Printable(clip.Runes(column, 300))
		}
		_, _ = fmt.Fprintln(table, strings.Join(columns, "\t"))
	}
	row("PART", "VERSION", "PODS", "IMAGE")
	row("client", r.Client, "-", "-")
	if r.Kubernetes != "" {
		row("Kubernetes", r.Kubernetes, "-", "-")
	}
	for _, p := range r.Programs {
		image := p.Image
		if p.Digest != "" && !strings.Contains(image, p.Digest) {
			image += " (" + clip.Runes(p.Digest, len("sha256:")+12) + ")"
		}
		row(p.Part, cmp.Or(p.Version, "unknown"), strconv.Itoa(p.Pods), image)
	}
	if err := table.Flush(); err != nil {
		return err
	}
	if len(r.Findings) > 0 {
		b.WriteByte('\n')
	}
	if _, err := io.WriteString(w, b.String()); err != nil || len(r.Findings) == 0 {
		return err
	}
	all := finding.Report{Subject: "versions of " + r.Cluster, Findings: r.Findings}
	return all.Write(w, finding.Style{})
}
