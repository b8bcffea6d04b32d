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
	// resolvConf is the file in which the kubelet tells the webhook's pod about DNS.
	resolvConf = "/etc/resolv.conf"
	// maxResolvConf is far above what a kubelet writes: 32 search domains of 2,048 characters together.
	maxResolvConf = 64 << 10
)

// learnDNS returns what the resolv.conf in file says of the cluster's DNS. The kubelet writes the search domains
// NAMESPACE.svc.DOMAIN, svc.DOMAIN and DOMAIN into pods with the dnsPolicy ClusterFirst. If there is no svc.DOMAIN with
// its DOMAIN, or more than one, nothing is known: the file may be a node's, whose name servers know no Service.
func learnDNS(file string) (inject.DNS, error) {
	f, err := os.Open(file) //nolint:gosec // G304: a constant, but in tests
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
			searches = fields[1:] // The last line counts: resolv.conf(5).
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

// useDNS tells the injector what the webhook's own resolv.conf says of the cluster's DNS. A domain that was given counts
// more than one that is read there.
func useDNS(ctx context.Context, o options, log *slog.Logger) error {
	dns, err := learnDNS(o.resolvConf)
	if err != nil {
		log.WarnContext(ctx, "Could not read what this pod is told about DNS", "error", err)
	}
	if o.ClusterDomain != "" && dns.Domain != "" && o.ClusterDomain != dns.Domain {
		// A wrong one costs each pod time at its start: sidecars look up a name that no server of the cluster has.
		log.WarnContext(ctx, "Cluster domain is not the one that the kubelet told this pod: remove --cluster-domain unless it is right",
			"cluster_domain", o.ClusterDomain, "told", dns.Domain, "file", o.resolvConf)
	}
	dns.Domain = cmp.Or(o.ClusterDomain, dns.Domain)
	if err := o.Injector.UseDNS(dns); err != nil {
		return fmt.Errorf("%s: %w", o.resolvConf, err)
	}
	if dns.Domain == "" {
		log.WarnContext(ctx, "Cluster domain is unknown, so sidecars look the broker up with their pods' search domains: set --cluster-domain", "file", o.resolvConf)
	} else {
		log.InfoContext(ctx, "Using the cluster domain", "domain", dns.Domain, "name_servers", dns.Servers)
	}
	return nil
}
