package inject

import (
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"

	"github.com/credence-iam/credence/webhook/inject/podview"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/validation"
)

// DNS describes the cluster's DNS. The zero value knows nothing.
type DNS struct {
	// Domain is that of the cluster's Services, such as cluster.local, without a final dot. With it, sidecars look the
	// brokers up by their full name, which takes one or two queries; without it, they depend on the search domains of
	// their pod. Empty: it is not known.
	Domain string
	// Servers are name servers that know the cluster's Services. Pods that name others get a warning.
	Servers []netip.Addr
}

// maxDomain leaves room for the names of the Service and its namespace, 63 characters each, in a DNS name of 253.
const maxDomain = 253 - len(".svc.") - 2*63 - 1

// Check returns the error for which [Injector.UseDNS] would refuse d.
func (d DNS) Check() error {
	if d.Domain != "" && (len(d.Domain) > maxDomain || len(validation.IsDNS1123Subdomain(d.Domain)) > 0) {
		return fmt.Errorf("cluster domain %.100q is not a DNS domain such as cluster.local", d.Domain)
	}
	return nil
}

// UseDNS makes d what pods are injected by from now on. It returns an error, and changes nothing, if [DNS.Check] does. It
// may be called while Inject runs.
func (i *Injector) UseDNS(d DNS) error {
	if err := d.Check(); err != nil {
		return err
	}
	d.Servers = slices.Clone(d.Servers)
	i.dns.Store(&d)
	return nil
}

// nodeLocalDNS is the address of NodeLocal DNSCache in its own manifests, which forwards to the cluster's DNS.
var nodeLocalDNS = netip.MustParseAddr("169.254.20.10")

// knows reports whether server is one of the cluster's.
func (d DNS) knows(server string) bool {
	addr, err := netip.ParseAddr(server)
	return err == nil && (addr.Unmap() == nodeLocalDNS || slices.Contains(d.Servers, addr.Unmap()))
}

// fullName returns the full DNS name of broker, HOST:PORT, with a final dot; empty if it is not known.
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
		return strings.TrimSuffix(host, ".") + "." // It has its domain.
	}
}

// serviceHost returns the host of broker if it is the name of a Service, NAME.NAMESPACE.svc with or without the cluster's
// domain. Addresses and names outside of the cluster are not.
func serviceHost(broker string) (host string, ok bool) {
	host, _, err := net.SplitHostPort(broker)
	labels := strings.Split(host, ".")
	return host, err == nil && len(labels) >= 3 && labels[2] == "svc"
}

// checkDNS refuses pods whose DNS cannot resolve the broker's Service, and warns of pods for which that is not known.
// Such pods would start without credentials once their start timeout has passed.
func (p *plan) checkDNS(spec *podview.Spec) (warnings []string, err error) {
	host, ok := serviceHost(p.cfg.Broker)
	if !ok {
		return nil, nil // Any DNS may know it.
	}
	switch spec.DNSPolicy {
	case corev1.DNSDefault:
		return nil, unsupported("the pod has dnsPolicy Default: it uses the DNS of its node, which does not know the broker's Service %s. "+
			"Remove dnsPolicy, or set it to None with the cluster's DNS server first in dnsConfig.nameservers", host)
	case corev1.DNSNone:
		servers := spec.DNSConfig.Nameservers
		switch {
		case len(servers) == 0: // which the API server refuses
		case p.dnsName == "" && len(spec.DNSConfig.Searches) == 0:
			return nil, unsupported("the pod has dnsPolicy None and no dnsConfig.searches: its DNS cannot resolve the broker's Service %s. "+
				"Add the cluster's domain, such as cluster.local, to dnsConfig.searches", host)
		// Resolvers ask the others only if the first one does not respond.
		case !p.dns.knows(servers[0]):
			return []string{fmt.Sprintf("dnsPolicy None: name server %.45q may not know %.60s; if so, the pod starts without credentials. "+
				"Put the cluster's DNS server first in dnsConfig.nameservers", servers[0], host)}, nil
		}
	default: // ClusterFirst, and ClusterFirstWithHostNet, which means the same without hostNetwork
	}
	return nil, nil
}
