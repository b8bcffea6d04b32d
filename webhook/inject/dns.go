package inject

import (
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/validation"

	"github.com/credence-iam/credence/webhook/inject/podview"
)

// DNS describes the cluster's DNS. In the zero value, nothing is known.
type DNS struct {
	// Domain is the domain of the cluster's Services, such as cluster.local, without a final dot. With it, sidecars look
	// up the brokers' full name, which takes one or two queries. If it is empty, they depend on the search domains of
	// their pod.
	Domain string
	// Servers are name servers that know the cluster's Services. A pod with other servers gets a warning.
	Servers []netip.Addr
}

// maxDomain leaves room for the names of the Service and its namespace, 63 characters each, in a DNS name of 253.
const maxDomain = 253 - len(".svc.") - 2*63 - 1

// Check returns the error that [Injector.UseDNS] would return.
func (d DNS) Check() error {
	if d.Domain != "" && (len(d.Domain) > maxDomain || len(validation.IsDNS1123Subdomain(d.Domain)) > 0) {
		return fmt.Errorf("cluster domain %.100q is not a DNS domain such as cluster.local", d.Domain)
	}
	return nil
}

// UseDNS applies d to all further pods. If [DNS.Check] returns an error, UseDNS returns it and changes nothing. It may be
// called while Inject runs.
func (i *Injector) UseDNS(d DNS) error {
	if err := d.Check(); err != nil {
		return err
	}
	d.Servers = slices.Clone(d.Servers)
	i.dns.Store(&d)
	return nil
}

// nodeLocalDNS is the address of NodeLocal DNSCache in its own manifests. It forwards to the cluster's DNS.
var nodeLocalDNS = netip.MustParseAddr("169.254.20.10")

// knows reports whether server is a name server of the cluster.
func (d DNS) knows(server string) bool {
	addr, err := netip.ParseAddr(server)
	return err == nil && (addr.Unmap() == nodeLocalDNS || slices.Contains(d.Servers, addr.Unmap()))
}

// fullName returns the full DNS name of broker, HOST:PORT, with a final dot; empty if it is unknown.
func (d DNS) fullName(broker string) string {
	host, ok := serviceHost(broker)
	switch {
	case !ok:
		return ""
	case strings.HasSuffix(host, ".svc"):
		if d.Domain == "" {
			return ""
		}
		return host + "." + d.Domain + "."
	default:
		return strings.TrimSuffix(host, ".") + "." // It includes its domain.
	}
}

// serviceHost returns the host of broker. It reports whether the host is the name of a Service: NAME.NAMESPACE.svc,
// with or without the cluster's domain. Addresses and names outside the cluster are not.
func serviceHost(broker string) (host string, ok bool) {
	host, _, err := net.SplitHostPort(broker)
	labels := strings.Split(host, ".")
	return host, err == nil && len(labels) >= 3 && labels[2] == "svc"
}

// checkDNS refuses pods whose DNS cannot resolve the broker's Service, and warns if it may not. Such pods would start
// without credentials after their start timeout.
func (p *plan) checkDNS(spec *podview.Spec, w *warnings) error {
	host, ok := serviceHost(p.cfg.Broker)
	if !ok {
		return nil // Any DNS may know the host.
	}
	switch spec.DNSPolicy {
	case corev1.DNSDefault:
		return unsupported("the pod has dnsPolicy Default: it uses the DNS of its node, which does not know the broker's Service %s; "+
			"remove dnsPolicy, or set it to None with the cluster's DNS server first in dnsConfig.nameservers", host)
	case corev1.DNSNone:
		servers := spec.DNSConfig.Nameservers
		switch {
		case len(servers) == 0: // The API server refuses it.
		case p.dnsName == "" && len(spec.DNSConfig.Searches) == 0:
			return unsupported("the pod has dnsPolicy None and no dnsConfig.searches: its DNS cannot resolve the broker's Service %s; "+
				"add the cluster's domain, such as cluster.local, to dnsConfig.searches", host)
		// Resolvers query the other servers only if the first one does not respond.
		case !p.dns.knows(servers[0]):
			w.addf("name server %.45q may not know %.60s, and the pod would start without credentials. "+
				"Put the cluster's DNS server first in dnsConfig.nameservers.", servers[0], host)
		}
	default: // ClusterFirst, or ClusterFirstWithHostNet, which is the same without hostNetwork
	}
	return nil
}
