package main

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"os"
	"slices"
	"strings"

	"github.com/credence-iam/credence/webhook/inject"
)

const (
	// resolvConf is the file in which the kubelet configures DNS for the webhook's pod.
	resolvConf = "/etc/resolv.conf"
	// maxResolvConf is far above what a kubelet writes: 32 search domains with 2,048 characters in total.
	maxResolvConf = 64 << 10
)

// readDNS returns the cluster's DNS from a resolv.conf. For dnsPolicy ClusterFirst, the kubelet writes the search domains
// NAMESPACE.svc.DOMAIN, svc.DOMAIN and DOMAIN. Without exactly one DOMAIN that has svc.DOMAIN, too, readDNS returns the zero
// value: the file may be the node's, whose name servers do not know Services.
func readDNS(file string) (inject.DNS, error) {
	f, err := os.Open(file) //nolint:gosec // G304: constant except in tests
	if err != nil {
		return inject.DNS{}, err
	}
	defer f.Close()
	var (
		servers  []netip.Addr
		searches []string
	)
	text, err := io.ReadAll(io.LimitReader(f, maxResolvConf+1))
	if err != nil {
		return inject.DNS{}, err
	}
	if len(text) > maxResolvConf {
		return inject.DNS{}, fmt.Errorf("%s is longer than %d bytes", file, maxResolvConf)
	}
	for line := range strings.Lines(string(text)) {
		fields := strings.Fields(line)
		if len(fields) < 2 {
			continue
		}
		switch fields[0] {
		case "nameserver":
			if addr, err := netip.ParseAddr(fields[1]); err == nil {
				servers = append(servers, addr.Unmap())
			}
		case "search":
			searches = fields[1:] // The last line applies: resolv.conf(5).
		}
	}
	var domains []string
	for _, search := range searches {
		domain, ok := strings.CutPrefix(strings.TrimSuffix(search, "."), "svc.")
		if ok && slices.ContainsFunc(searches, func(s string) bool { return strings.TrimSuffix(s, ".") == domain }) && !slices.Contains(domains, domain) {
			domains = append(domains, domain)
		}
	}
	if len(domains) != 1 {
		return inject.DNS{}, nil
	}
	dns := inject.DNS{Domain: domains[0], Servers: servers}
	if err := dns.Check(); err != nil {
		return inject.DNS{}, fmt.Errorf("reading %s: %w", file, err)
	}
	return dns, nil
}

// useDNS configures the injector with the cluster's DNS from the webhook's own resolv.conf. --cluster-domain takes
// precedence.
func useDNS(ctx context.Context, o options, log *slog.Logger) error {
	dns, err := readDNS(o.resolvConf)
	if err != nil {
		log.WarnContext(ctx, "Could not read the DNS configuration of this pod", "error", err)
	}
	if o.ClusterDomain != "" && dns.Domain != "" && o.ClusterDomain != dns.Domain {
		// With a wrong domain, each sidecar first looks up a name that no server of the cluster has.
		log.WarnContext(ctx, "Found another cluster domain in the DNS configuration, remove --cluster-domain unless it is right",
			"cluster_domain", o.ClusterDomain, "found", dns.Domain, "file", o.resolvConf)
	}
	dns.Domain = cmp.Or(o.ClusterDomain, dns.Domain)
	if err := o.Injector.UseDNS(dns); err != nil {
		return fmt.Errorf("%s: %w", o.resolvConf, err)
	}
	if dns.Domain == "" {
		log.WarnContext(ctx, "Found no cluster domain, so sidecars use search domains to find the brokers, set --cluster-domain", "file", o.resolvConf)
	} else {
		log.InfoContext(ctx, "Configured the cluster domain", "domain", dns.Domain, "name_servers", dns.Servers)
	}
	return nil
}
