package program

import (
	"errors"
	"fmt"
	"net/url"
	"os"
	"slices"
	"strings"
)

// direct has the hosts that are never called through a proxy, in the form of NO_PROXY. They are this machine, and
// addresses at which a node or AWS serves only this machine. A proxy could not reach them, and must not see the data
// sent to them, such as a token for the broker's own credentials. 169.254.0.0/16 has instance metadata and EKS Pod
// Identity. fd00:ec2::/32 has both over IPv6.
var direct = []string{"localhost", "127.0.0.0/8", "::1", "169.254.0.0/16", "fe80::/10", "fd00:ec2::/32"}

// apiServer is the variable with the API server's host. Kubernetes sets it in each pod, and client-go reads it.
const apiServer = "KUBERNETES_SERVICE_HOST"

// The variables are in net/http's order. Versions of golang.org/x/net differ about which of two counts, so the program
// reads and sets both.
var (
	httpsNames   = []string{"HTTPS_PROXY", "https_proxy"}
	httpNames    = []string{"HTTP_PROXY", "http_proxy"}
	noProxyNames = []string{"NO_PROXY", "no_proxy"}
)

// Proxies are the proxies of a program's calls, each as HOST:PORT, without the user and password that its variable may
// have. Empty: none.
type Proxies struct {
	// HTTPS is for https URLs, HTTP for http URLs.
	HTTPS, HTTP string
}

// DirectCalls makes this process call its own machine, link-local addresses and the cluster's API server without a proxy.
// It returns the proxies for all other calls, from HTTP_PROXY and HTTPS_PROXY. If a variable has no valid address, it
// returns an error that does not quote it, because net/http would ignore the variable and call directly.
//
// It adds to NO_PROXY and no_proxy, because all HTTP clients of the process read them, even at each redirect. These are
// the clients of client-go, the AWS SDK and OpenTelemetry. Call it before the first of them is used, because net/http
// reads the variables once.
func DirectCalls() (Proxies, error) {
	var p Proxies
	for _, v := range []struct {
		names []string
		host  *string
	}{{httpsNames, &p.HTTPS}, {httpNames, &p.HTTP}} {
		for _, name := range v.names {
			value := os.Getenv(name)
			if value == "" {
				continue
			}
			host, err := proxyHost(value)
			if err != nil {
				return Proxies{}, fmt.Errorf("%s: %w", name, err)
			}
			if *v.host == "" { // net/http uses the first of the two
				*v.host = host
			}
		}
	}
	if p == (Proxies{}) {
		return p, nil
	}
	var hosts []string
	for _, name := range append(slices.Clone(noProxyNames), apiServer) {
		if value := os.Getenv(name); value != "" {
			hosts = append(hosts, value)
		}
	}
	text := strings.Join(append(hosts, direct...), ",")
	for _, name := range noProxyNames {
		if err := os.Setenv(name, text); err != nil {
			return Proxies{}, fmt.Errorf("adding to %s: %w", name, err)
		}
	}
	return p, nil
}

// WithoutProxies makes this process call without proxies. It is for a program that calls only the API server. Call it
// before the first HTTP client is used.
func WithoutProxies() {
	for _, name := range slices.Concat(httpsNames, httpNames) {
		_ = os.Unsetenv(name) // It fails only for an invalid name.
	}
}

var errProxy = errors.New("must be a proxy's address, such as http://proxy.example.com:3128")

// proxyHost returns the HOST:PORT of a proxy. As in net/http, the value may lack a scheme.
func proxyHost(value string) (string, error) {
	if !strings.Contains(value, "://") {
		value = "http://" + value
	}
	u, err := url.Parse(value)
	if err != nil || u.Hostname() == "" {
		return "", errProxy
	}
	switch u.Scheme {
	case "http", "https", "socks5", "socks5h":
		return u.Host, nil
	}
	return "", errProxy
}
