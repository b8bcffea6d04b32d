package installation

import (
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/http"
	"slices"
	"strconv"
	"strings"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// Pods returns the pods of webhook and brokers in a namespace, by name. It leaves out pods that have ended.
func (c *Client) Pods(ctx context.Context, namespace string) (webhooks, brokers []corev1.Pod, err error) {
	list, err := c.Kube.CoreV1().Pods(namespace).List(ctx, metav1.ListOptions{LabelSelector: strings.TrimSuffix(selector, "=") + " in (" + webhookComponent + "," + brokerComponent + ")"})
	if err != nil {
		return nil, nil, err
	}
	slices.SortFunc(list.Items, func(a, b corev1.Pod) int { return cmp.Compare(a.Name, b.Name) })
	for _, pod := range list.Items {
		switch {
		case pod.Status.Phase == corev1.PodSucceeded, pod.Status.Phase == corev1.PodFailed:
		case pod.Labels[componentLabel] == webhookComponent:
			webhooks = append(webhooks, pod)
		default:
			brokers = append(brokers, pod)
		}
	}
	return webhooks, brokers, nil
}

// Ready reports whether a pod is ready, and not about to end.
func Ready(pod *corev1.Pod) bool {
	return pod.DeletionTimestamp == nil && slices.ContainsFunc(pod.Status.Conditions, func(c corev1.PodCondition) bool {
		return c.Type == corev1.PodReady && c.Status == corev1.ConditionTrue
	})
}

// Trouble returns why a pod does not run, in the words of the kubelet or of the scheduler; empty if they have none. It can
// contain any character.
func Trouble(pod *corev1.Pod) string {
	ended := func(t *corev1.ContainerStateTerminated) string {
		return strings.TrimSuffix(fmt.Sprintf("it ended with exit code %d: %s", t.ExitCode, cmp.Or(t.Message, t.Reason)), ": ")
	}
	for _, c := range slices.Concat(pod.Status.InitContainerStatuses, pod.Status.ContainerStatuses) {
		switch w, t := c.State.Waiting, c.State.Terminated; {
		case w != nil && w.Reason != "ContainerCreating" && w.Reason != "PodInitializing":
			text := strings.TrimSuffix("container "+c.Name+" waits with "+w.Reason+": "+w.Message, ": ")
			if last := c.LastTerminationState.Terminated; last != nil {
				text += "; " + ended(last)
			}
			return text
		case t != nil && t.ExitCode != 0:
			return "container " + c.Name + " does not run: " + ended(t)
		}
	}
	for _, c := range pod.Status.Conditions {
		if c.Type == corev1.PodScheduled && c.Status == corev1.ConditionFalse {
			return "it is not scheduled: " + c.Message
		}
	}
	return ""
}

// Unready returns the lines of /readyz of a pod, one for each check that fails. It returns "" if none fails, or if the page
// cannot be read.
func (c *Client) Unready(ctx context.Context, pod *corev1.Pod, port int) string {
	_, err := c.PodCall(ctx, pod, http.MethodGet, port, "/readyz", nil)
	status, ok := errors.AsType[*StatusError](err)
	if !ok {
		return ""
	}
	var lines []string
	for line := range strings.Lines(status.Text) {
		if line = strings.TrimSpace(line); line != "" {
			lines = append(lines, line)
		}
	}
	return strings.Join(lines, "\n")
}

// Certificates returns the certificates that a pod serves for a name, that of the server first. It does not verify them.
func (c *Client) Certificates(ctx context.Context, pod *corev1.Pod, port int, name string) ([]*x509.Certificate, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, callTimeout, fmt.Errorf("no response within %s", callTimeout))
	defer cancel()
	conn, err := c.dialPod(ctx, pod, port)
	if err != nil {
		return nil, fmt.Errorf("reading the certificate of pod %s/%s, port %d: %w", pod.Namespace, pod.Name, port, err)
	}
	defer conn.Close()
	// Close ends a handshake, because the connection has no deadlines.
	stop := context.AfterFunc(ctx, func() { _ = conn.Close() })
	defer stop()
	secured := tls.Client(conn, &tls.Config{
		ServerName: name, MinVersion: tls.VersionTLS13, NextProtos: []string{"h2", "http/1.1"},
		InsecureSkipVerify: true, //nolint:gosec // G402: it sends nothing, and the certificates are the result
	})
	if err := secured.HandshakeContext(ctx); err != nil {
		return nil, fmt.Errorf("reading the certificate of pod %s/%s, port %d: %w", pod.Namespace, pod.Name, port, cmp.Or(context.Cause(ctx), err))
	}
	return secured.ConnectionState().PeerCertificates, nil
}

// Port returns the port of an argument such as --listen=:9443, or its default. 0 means that the program does not listen.
func Port(args []string, name string, otherwise int) int {
	if !slices.ContainsFunc(args, func(arg string) bool { return strings.HasPrefix(arg, "--"+name+"=") }) {
		return otherwise
	}
	_, text, err := net.SplitHostPort(Arg(args, name))
	if err != nil {
		return 0
	}
	port, _ := strconv.Atoi(text) // 0 for a name of a port
	return port
}
