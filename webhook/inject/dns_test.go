package inject_test

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/webhook/inject"
)

// podWith returns an annotated pod with fields at the start of its spec.
func podWith(fields string) []byte {
	return []byte(`{"metadata":{"name":"p","annotations":{"iam.amazonaws.com/role":"reader"}},"spec":{` + fields +
		`"containers":[{"name":"app","image":"i"}]}}`)
}

// dnsName returns the name that the sidecar of an injected pod looks up.
func dnsName(t *testing.T, raw []byte, result inject.Result) any {
	t.Helper()
	return variable(named(t, decode(t, apply(t, raw, result.Patch)), "initContainers", "credence-sidecar"), "CREDENCE_BROKER_DNS_NAME")
}

// TestDNSPolicy: Inject refuses a pod that cannot resolve the broker's name, with the fix. It warns if this is not certain.
func TestDNSPolicy(t *testing.T) {
	const (
		service, external, address = "credence-broker.credence.svc:9443", "broker.example.com:9443", "192.0.2.1:9443"

		clusters  = `"dnsPolicy":"None","dnsConfig":{"nameservers":["10.96.0.10"]},`
		searching = `"dnsPolicy":"None","dnsConfig":{"nameservers":["10.96.0.10"],"searches":["cluster.local"]},`
		foreign   = `"dnsPolicy":"None","dnsConfig":{"nameservers":["192.0.2.53","10.96.0.10"],"searches":["cluster.local"]},`
	)
	unknown := inject.DNS{}
	for name, tt := range map[string]struct {
		broker, fields string
		dns            inject.DNS
		refused, warns string
	}{
		"no DNS policy":                     {broker: service, dns: clusterDNS},
		"no DNS policy, nothing known":      {broker: service, dns: unknown},
		"ClusterFirst":                      {broker: service, fields: `"dnsPolicy":"ClusterFirst",`, dns: clusterDNS},
		"ClusterFirstWithHostNet":           {broker: service, fields: `"dnsPolicy":"ClusterFirstWithHostNet",`, dns: clusterDNS},
		"ClusterFirst with further servers": {broker: service, fields: `"dnsConfig":{"nameservers":["192.0.2.53"]},`, dns: clusterDNS},
		"Default":                           {broker: service, fields: `"dnsPolicy":"Default",`, dns: clusterDNS, refused: "dnsPolicy Default"},
		"Default, nothing known":            {broker: service, fields: `"dnsPolicy":"Default",`, dns: unknown, refused: "remove dnsPolicy"},
		"Default, a server of the cluster":  {broker: service, fields: `"dnsPolicy":"Default","dnsConfig":{"nameservers":["10.96.0.10"]},`, dns: clusterDNS, refused: "dnsPolicy Default"},
		"Default, external broker":          {broker: external, fields: `"dnsPolicy":"Default",`, dns: clusterDNS},
		"Default, broker's address":         {broker: address, fields: `"dnsPolicy":"Default",`, dns: clusterDNS},
		"Default, broker's full name":       {broker: "b.credence.svc.cluster.local:1", fields: `"dnsPolicy":"Default",`, dns: unknown, refused: "b.credence.svc.cluster.local"},
		"None, the cluster's":               {broker: service, fields: clusters, dns: clusterDNS},
		"None, the cluster's, searching":    {broker: service, fields: searching, dns: clusterDNS},
		"None, no searches, no domain":      {broker: service, fields: clusters, dns: inject.DNS{Servers: clusterDNS.Servers}, refused: "dnsConfig.searches"},
		"None, searching, no domain":        {broker: service, fields: searching, dns: inject.DNS{Servers: clusterDNS.Servers}},
		"None, foreign first":               {broker: service, fields: foreign, dns: clusterDNS, warns: `"192.0.2.53" may not know credence-broker.credence.svc`},
		"None, servers unknown":             {broker: service, fields: searching, dns: inject.DNS{Domain: "cluster.local"}, warns: `"10.96.0.10" may not know`},
		"None, node-local":                  {broker: service, fields: strings.Replace(clusters, "10.96.0.10", "169.254.20.10", 1), dns: clusterDNS},
		"None, IPv6 in another form":        {broker: service, fields: strings.Replace(clusters, "10.96.0.10", "fd00:0::000a", 1), dns: inject.DNS{Domain: "cluster.local", Servers: []netip.Addr{netip.MustParseAddr("fd00::a")}}},
		"None, IPv4-mapped IPv6":            {broker: service, fields: strings.Replace(clusters, "10.96.0.10", "::ffff:10.96.0.10", 1), dns: clusterDNS},
		"None, no address":                  {broker: service, fields: strings.Replace(clusters, "10.96.0.10", "dns", 1), dns: clusterDNS, warns: `"dns" may not know`},
		"None, external broker":             {broker: external, fields: foreign, dns: clusterDNS},
		"None without servers (invalid)":    {broker: service, fields: `"dnsPolicy":"None",`, dns: clusterDNS},
	} {
		t.Run(name, func(t *testing.T) {
			i := newInjector(t, func(c *inject.Config) { c.Broker = tt.broker })
			if err := i.UseDNS(tt.dns); err != nil {
				t.Fatal(err)
			}
			result, err := i.Inject(podWith(tt.fields), namespace)
			if tt.refused != "" {
				if credential.ReasonOf(err) != credential.ReasonPodUnsupported || !errors.Is(err, credential.ErrInvalid) || !strings.Contains(err.Error(), tt.refused) {
					t.Errorf("Inject returns %v, want a refusal with %q", err, tt.refused)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			warnings := strings.Join(result.Warnings, "\n")
			if tt.warns == "" && warnings != "" || !strings.Contains(warnings, tt.warns) {
				t.Errorf("warnings are %q, want %q", warnings, tt.warns)
			}
		})
	}
}

// TestBrokerFullName: if the full name of the brokers is known, the sidecar looks it up. It always verifies the name in
// certificates.
func TestBrokerFullName(t *testing.T) {
	for broker, want := range map[string]any{
		"credence-broker.credence.svc:9443":                "credence-broker.credence.svc.cluster.local.",
		"credence-broker.credence.svc.corp.example:9443":   "credence-broker.credence.svc.corp.example.",
		"credence-broker.credence.svc.cluster.local.:9443": "credence-broker.credence.svc.cluster.local.",
		"credence-broker:9443":                             nil,
		"broker.example.com:9443":                          nil,
		"192.0.2.1:9443":                                   nil,
		"[fd00::1]:9443":                                   nil,
	} {
		i := newInjector(t, func(c *inject.Config) { c.Broker = broker })
		raw := podWith("")
		result, err := i.Inject(raw, namespace)
		if err != nil {
			t.Fatal(err)
		}
		if got := dnsName(t, raw, result); got != want {
			t.Errorf("sidecar looks up broker %s as %v, want %v", broker, got, want)
		}
		sidecar := named(t, decode(t, apply(t, raw, result.Patch)), "initContainers", "credence-sidecar")
		if got := variable(sidecar, "CREDENCE_BROKER"); got != broker {
			t.Errorf("CREDENCE_BROKER is %v, want %s", got, broker)
		}
	}
	i := newInjector(t)
	if err := i.UseDNS(inject.DNS{}); err != nil {
		t.Fatal(err)
	}
	result, err := i.Inject(podWith(""), namespace)
	if err != nil {
		t.Fatal(err)
	}
	if got := dnsName(t, podWith(""), result); got != nil {
		t.Errorf("without a domain, the sidecar looks up %v", got)
	}
}

// TestDomainSetBetweenCalls: webhooks that do and do not know the cluster's domain accept each other's sidecars, and
// those of "credence inject".
func TestDomainSetBetweenCalls(t *testing.T) {
	with := func(domain string) *inject.Injector {
		i := newInjector(t)
		if err := i.UseDNS(inject.DNS{Domain: domain}); err != nil {
			t.Fatal(err)
		}
		return i
	}
	for _, tt := range []struct{ first, second string }{{"", "cluster.local"}, {"cluster.local", ""}, {"corp.example", "cluster.local"}} {
		t.Run(fmt.Sprintf("%q then %q", tt.first, tt.second), func(t *testing.T) {
			raw := podWith("")
			result, err := with(tt.first).Inject(raw, namespace)
			if err != nil {
				t.Fatal(err)
			}
			again, err := with(tt.second).Inject(apply(t, raw, result.Patch), namespace)
			if err != nil || again.Patch != nil || len(again.Warnings) > 0 {
				t.Errorf("second injection adds %v and warns %q (%v), want nothing", again.Patch, again.Warnings, err)
			}
		})
	}
}

// TestUseDNS: UseDNS refuses an invalid domain and keeps the DNS in use.
func TestUseDNS(t *testing.T) {
	i := newInjector(t)
	for _, domain := range []string{"Cluster.Local", "a b", "a..b", "-a", "cluster.local.", strings.Repeat("a.", 80) + "a", "x\ny"} {
		if err := i.UseDNS(inject.DNS{Domain: domain}); err == nil || !strings.Contains(err.Error(), "is not a DNS domain such as cluster.local") {
			t.Errorf("UseDNS with %.30q returns %v", domain, err)
		}
	}
	result, err := i.Inject(podWith(""), namespace)
	if err != nil {
		t.Fatal(err)
	}
	if got := dnsName(t, podWith(""), result); got != "credence-broker.credence.svc.cluster.local." {
		t.Errorf("after a refused domain, the sidecar looks up %v", got)
	}
}
