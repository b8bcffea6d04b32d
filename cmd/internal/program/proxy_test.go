package program

import (
	"maps"
	"net/url"
	"os"
	"strings"
	"testing"

	"golang.org/x/net/http/httpproxy"
)

// proxyEnvironment sets all proxy variables. Those that env lacks become empty.
func proxyEnvironment(t *testing.T, env map[string]string) {
	t.Helper()
	for _, name := range []string{"HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy", "NO_PROXY", "no_proxy", "ALL_PROXY", "all_proxy", "REQUEST_METHOD", apiServer} {
		t.Setenv(name, env[name])
	}
}

func TestDirectCalls(t *testing.T) {
	const proxy = "http://user:pa55word@proxy.example.com:3128"
	both := map[string]string{"HTTP_PROXY": proxy, "HTTPS_PROXY": proxy}
	with := func(more ...string) map[string]string {
		env := maps.Clone(both)
		for i := 0; i < len(more); i += 2 {
			env[more[i]] = more[i+1]
		}
		return env
	}
	never := []string{
		"http://169.254.170.23/v1/credentials", "http://169.254.170.2/v2/credentials/x", "http://169.254.169.254/latest/api/token", "http://169.254.0.1:8080/",
		"http://[fd00:ec2::23]/v1/credentials", "http://[fd00:ec2::254]/latest/api/token", "http://[fe80::1]/", "http://[::ffff:169.254.169.254]/",
		"http://127.0.0.1:51679/", "http://127.8.9.10/", "http://[::1]:9/", "http://localhost:80/", "https://127.0.0.1:6443/",
	}
	always := []string{"https://sts.eu-central-1.amazonaws.com/", "http://sts.example.com/", "https://10.0.0.1/", "http://170.254.169.254/", "http://[fd00:ec3::23]/", "https://169.254.169.254.example.com/"}
	for name, tt := range map[string]struct {
		env     map[string]string
		proxied []string // besides always
		direct  []string // besides never
	}{
		"as the chart sets it":   {with(apiServer, "10.96.0.1"), nil, []string{"https://10.96.0.1:443/api", "https://10.96.0.1/api"}},
		"lower case":             {map[string]string{"http_proxy": proxy, "https_proxy": proxy, apiServer: "10.96.0.1"}, nil, []string{"https://10.96.0.1:443/api"}},
		"API server over IPv6":   {with(apiServer, "fd00:10:96::1"), []string{"https://10.96.0.1:443/api"}, []string{"https://[fd00:10:96::1]:443/api"}},
		"API server with a name": {with(apiServer, "api.cluster.example.com"), nil, []string{"https://api.cluster.example.com:6443/api"}},
		"hosts of the user":      {with("NO_PROXY", "internal.example.com,10.1.0.0/16"), nil, []string{"https://x.internal.example.com/", "https://10.1.2.3/"}},
		"the same in lower case": {with("no_proxy", "internal.example.com"), nil, []string{"https://x.internal.example.com/"}},
		"in both":                {with("NO_PROXY", "internal.example.com", "no_proxy", "other.example.com"), nil, []string{"https://x.other.example.com/", "https://x.internal.example.com/"}},
		"without a scheme":       {map[string]string{"HTTP_PROXY": "proxy.example.com:3128", "HTTPS_PROXY": "proxy.example.com:3128"}, nil, nil},
	} {
		t.Run(name, func(t *testing.T) {
			proxyEnvironment(t, tt.env)
			got, err := DirectCalls()
			if want := (Proxies{HTTPS: "proxy.example.com:3128", HTTP: "proxy.example.com:3128"}); err != nil || got != want {
				t.Fatalf("DirectCalls() = %+v, %v; want %+v", got, err, want)
			}
			through := httpproxy.FromEnvironment().ProxyFunc()
			for _, want := range []struct {
				urls []string
				host string
			}{{append(always, tt.proxied...), "proxy.example.com:3128"}, {append(never, tt.direct...), ""}} {
				for _, text := range want.urls {
					u, err := url.Parse(text)
					if err != nil {
						t.Fatal(err)
					}
					by, err := through(u)
					host := ""
					if by != nil {
						host = by.Host
					}
					if err != nil || host != want.host {
						t.Errorf("proxy for %s is %q, want %q (%v)", text, host, want.host, err)
					}
				}
			}
		})
	}
	t.Run("everything direct", func(t *testing.T) {
		proxyEnvironment(t, with("NO_PROXY", "*"))
		if _, err := DirectCalls(); err != nil {
			t.Fatal(err)
		}
		for _, text := range append(always, never...) {
			u, _ := url.Parse(text)
			if by, err := httpproxy.FromEnvironment().ProxyFunc()(u); err != nil || by != nil {
				t.Errorf("proxy for %s is %v (%v)", text, by, err)
			}
		}
	})
}

func TestWithoutAProxyNothingChanges(t *testing.T) {
	proxyEnvironment(t, map[string]string{"NO_PROXY": "x", apiServer: "10.96.0.1"})
	if got, err := DirectCalls(); err != nil || got != (Proxies{}) || os.Getenv("NO_PROXY") != "x" {
		t.Errorf("DirectCalls() = %+v, %v, and NO_PROXY is %q", got, err, os.Getenv("NO_PROXY"))
	}
}

// net/http ignores a value that is not a proxy's address, and sends the calls that should use the proxy directly.
func TestWrongProxiesAreRefused(t *testing.T) {
	for _, value := range []string{"http://user:pa55word@", "http://user:pa55word@proxy example.com", "ftp://user:pa55word@proxy.example.com", "://pa55word", "http://user:pa55word@proxy:port"} {
		for _, name := range []string{"HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy"} {
			proxyEnvironment(t, map[string]string{name: value})
			_, err := DirectCalls()
			if err == nil || !strings.HasPrefix(err.Error(), name+": must be a proxy's address") || strings.Contains(err.Error(), "pa55word") {
				t.Errorf("%s=%s: %v", name, value, err)
			}
		}
	}
}

func TestWithoutProxies(t *testing.T) {
	proxyEnvironment(t, map[string]string{"HTTP_PROXY": "http://a:1", "http_proxy": "http://b:1", "HTTPS_PROXY": "http://c:1", "https_proxy": "http://d:1"})
	WithoutProxies()
	for _, text := range []string{"https://10.96.0.1/", "http://example.com/"} {
		u, _ := url.Parse(text)
		if by, err := httpproxy.FromEnvironment().ProxyFunc()(u); err != nil || by != nil {
			t.Errorf("%s is called through %v (%v)", text, by, err)
		}
	}
}
