package installation

import (
	"bufio"
	"context"
	"io"
	"net"
	"net/http"
	"strconv"
	"strings"

	corev1 "k8s.io/api/core/v1"
)

// BrokerOf returns the broker of a pod.
func (c *Client) BrokerOf(pod *corev1.Pod) Broker { return Broker{Pod: pod, client: c} }

// Unready returns the lines of /readyz of a pod, one for each check that fails. It returns "" if none fails, or if the page
// cannot be read.
func (c *Client) Unready(ctx context.Context, pod *corev1.Pod, port int) string {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	transport := &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return c.DialPod(ctx, pod, port)
	}}
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+net.JoinHostPort("127.0.0.1", strconv.Itoa(port))+"/readyz", nil)
	if err != nil {
		return ""
	}
	response, err := transport.RoundTrip(request)
	if err != nil {
		return ""
	}
	defer response.Body.Close()
	if response.StatusCode == http.StatusOK {
		return ""
	}
	var lines []string
	for scan := bufio.NewScanner(io.LimitReader(response.Body, 64<<10)); scan.Scan(); {
		if line := strings.TrimSpace(scan.Text()); line != "" {
			lines = append(lines, line)
		}
	}
	return strings.Join(lines, "\n")
}
