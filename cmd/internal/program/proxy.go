package program

import (
	"errors"
	"fmt"
	"net/url"
	"os"
	"slices"
	"strings"
)

// direct are the hosts that are never called through a proxy, in the form of NO_PROXY: this machine, and the addresses at
// which a node or AWS serves this machine alone. A proxy could not reach them, and must not see the data
// sent there, such as a token for the broker's own credentials. 169.254.0.0/16 has instance metadata and EKS Pod Identity,
// and fd00:ec2::/32 both over IPv6.
var direct = []string{"localhost", "127.0.0.0/8", "::1", "169.254.0.0/16", "fe80::/10", "fd00:ec2::/32"}

// apiServer is where Kubernetes tells each pod the API server's host, and where client-go reads it.
const apiServer = "KUBERNETES_SERVICE_HOST"

// The variables, in net/http's order. Versions of golang.org/x/net differ about which of two counts, so both are looked at and
// set.
var (
	httpsNames   = []string{"HTTPS_PROXY", "https_proxy"}
	httpNames    = []string{"HTTP_PROXY", "http_proxy"}
	noProxyNames = []string{"NO_PROXY", "no_proxy"}
)

// Proxies are the proxies that a program's calls go through, each as HOST:PORT, without the user and password that its
// variable may have. Empty: none.
type Proxies struct {
	// HTTPS is for calls of https URLs, HTTP for those of http URLs.
	HTTPS, HTTP string
}

// DirectCalls makes this process call its own machine, link-local addresses and the cluster's API server without a proxy,
// whatever HTTP_PROXY, HTTPS_PROXY and NO_PROXY say, and returns the proxies for all other calls. A variable with something
// that is no proxy's address is an error, which does not quote it: net/http would ignore it and call directly.
//
// It adds to NO_PROXY (and no_proxy), which is what every HTTP client of the process goes by: client-go's, the AWS SDK's and
// OpenTelemetry's, at each redirect too. So it must be called before the first of them is used: net/http reads
// the variables once.
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
			if *v.host == "" { // of two, the first is net/http's
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

// WithoutProxies makes this process call nobody through a proxy: for a program that calls the API server alone. It must be
// called before the first HTTP client is used.
func WithoutProxies() {
	for _, name := range slices.Concat(httpsNames, httpNames) {
		_ = os.Unsetenv(name) // It fails for names that cannot be.
	}
}

var errProxy = errors.New("must be a proxy's address, such as http://proxy.example.com:3128")

// proxyHost returns the HOST:PORT of a proxy, which may be written without a scheme, as net/http takes it.
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
