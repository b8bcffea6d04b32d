package installation

import (
	"bufio"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/credence-iam/credence/broker/policy"
	"github.com/credence-iam/credence/sidecar/contract"
)

const (
	// With one of these messages, the webhook logs at its start which DNS it uses. A test of cmd/webhook compares them.
	domainMessage   = "Configured the cluster domain"
	noDomainMessage = "Found no cluster domain, so sidecars use search domains to find the brokers, set --cluster-domain"

	// maxLogHead limits what is read of a webhook's log, in bytes. The messages are among the first ten lines.
	maxLogHead = 64 << 10
	// maxWitnesses limits the injected pods that are read for the cluster domain.
	maxWitnesses = 50
)

// ClusterDNS is the cluster's DNS as the webhook uses it.
type ClusterDNS struct {
	Domain  string
	Servers []netip.Addr // unknown if Domain comes from injected pods
}

// ClusterDNS returns the DNS that the webhook read from its own resolv.conf. The first lines of its log have it. A busy
// webhook's log loses them after a while, so ClusterDNS then reads the sidecars of injected pods that call the same broker.
// It returns the zero value if the webhook found no domain, and an error if it cannot be known.
func (c *Client) ClusterDNS(ctx context.Context, i *Installation, keys policy.Keys, broker string) (ClusterDNS, error) {
	pods, err := c.Kube.CoreV1().Pods(i.Namespace).List(ctx, metav1.ListOptions{LabelSelector: selector + webhookComponent})
	if err != nil {
		return ClusterDNS{}, fmt.Errorf("listing the webhook's pods: %w", err)
	}
	slices.SortFunc(pods.Items, func(a, b corev1.Pod) int { return cmp.Compare(a.Name, b.Name) })
	var problems []error
	for n := range pods.Items {
		pod := &pods.Items[n]
		if pod.Status.Phase != corev1.PodRunning {
			continue
		}
		dns, err := c.loggedDNS(ctx, pod)
		if err == nil {
			return dns, nil
		}
		problems = append(problems, err)
	}
	if domain, err := c.injectedDomain(ctx, keys, broker); domain != "" || err != nil {
		return ClusterDNS{Domain: domain}, errors.Join(append(problems, err)...)
	}
	return ClusterDNS{}, errors.Join(append(problems, errors.New("no injected pod has it"))...)
}

// loggedDNS reads the beginning of a webhook's log.
func (c *Client) loggedDNS(ctx context.Context, pod *corev1.Pod) (ClusterDNS, error) {
	limit := int64(maxLogHead)
	stream, err := c.Kube.CoreV1().Pods(pod.Namespace).GetLogs(pod.Name, &corev1.PodLogOptions{Container: webhookComponent, LimitBytes: &limit}).Stream(ctx)
	if err != nil {
		return ClusterDNS{}, fmt.Errorf("reading the log of pod %s/%s: %w", pod.Namespace, pod.Name, err)
	}
	defer stream.Close()
	dns, err := LoggedDNS(stream)
	if err != nil {
		return ClusterDNS{}, fmt.Errorf("reading the log of pod %s/%s: %w", pod.Namespace, pod.Name, err)
	}
	return dns, nil
}

// errNoDomain means that a log has no record of the cluster domain.
var errNoDomain = errors.New("it does not have the webhook's first lines any more, or those of level info")

// LoggedDNS returns the DNS that the webhook says in its log, which it does at its start.
func LoggedDNS(log io.Reader) (ClusterDNS, error) {
	lines := bufio.NewScanner(log)
	for lines.Scan() {
		var record struct {
			Message string       `json:"msg"`
			Domain  string       `json:"domain"`
			Servers []netip.Addr `json:"name_servers"`
		}
		if json.Unmarshal(lines.Bytes(), &record) != nil {
			continue
		}
		switch record.Message {
		case domainMessage:
			return ClusterDNS{record.Domain, record.Servers}, nil
		case noDomainMessage:
			return ClusterDNS{}, nil
		}
	}
	return ClusterDNS{}, cmp.Or(lines.Err(), errNoDomain)
}

// injectedDomain returns the cluster domain that injected pods use, "" if none has one.
func (c *Client) injectedDomain(ctx context.Context, keys policy.Keys, broker string) (string, error) {
	pods, err := c.Kube.CoreV1().Pods(metav1.NamespaceAll).List(ctx, metav1.ListOptions{
		LabelSelector: keys.Name(policy.Injected) + "=true", Limit: maxWitnesses,
	})
	if err != nil {
		return "", fmt.Errorf("listing injected pods: %w", err)
	}
	host := broker[:max(0, strings.LastIndexByte(broker, ':'))]
	domains := map[string]int{}
	for n := range pods.Items {
		for _, sidecar := range pods.Items[n].Spec.InitContainers {
			if sidecar.Name != contract.ContainerName || valueOf(sidecar, contract.Env(contract.Broker)) != broker {
				continue
			}
			if domain, ok := strings.CutPrefix(strings.TrimSuffix(valueOf(sidecar, contract.Env(contract.BrokerDNSName)), "."), host+"."); ok {
				domains[domain]++
			}
		}
	}
	most := ""
	for domain, count := range domains {
		if count > domains[most] || count == domains[most] && domain < most {
			most = domain
		}
	}
	return most, nil
}

// valueOf returns the value of a container's variable, "" without one.
func valueOf(c corev1.Container, name string) string {
	for _, v := range c.Env {
		if v.Name == name {
			return v.Value
		}
	}
	return ""
}
