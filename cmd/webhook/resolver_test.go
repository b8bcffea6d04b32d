package main

import (
	"bytes"
	"encoding/json"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/credence-iam/credence/cmd/internal/program"
	"github.com/credence-iam/credence/operator/installation"
	"github.com/credence-iam/credence/webhook/inject"
)

// TestReadDNS: only a resolv.conf that a kubelet wrote has the cluster's domain.
func TestReadDNS(t *testing.T) {
	servers := []netip.Addr{netip.MustParseAddr("10.96.0.10")}
	cluster := inject.DNS{Domain: "cluster.local", Servers: servers}
	for name, tt := range map[string]struct {
		text string
		want inject.DNS
		fail bool
	}{
		"from a kubelet": {text: "search credence.svc.cluster.local svc.cluster.local cluster.local\nnameserver 10.96.0.10\noptions ndots:5\n", want: cluster},
		"with the node's domains, and final dots": {
			text: "nameserver 10.96.0.10\nsearch credence.svc.cluster.local. svc.cluster.local. cluster.local. eu-central-1.compute.internal", want: cluster},
		"another domain": {
			text: "search a.svc.k8s.corp.example svc.k8s.corp.example k8s.corp.example corp.example\nnameserver 169.254.20.10\nnameserver fd00::a\n",
			want: inject.DNS{Domain: "k8s.corp.example", Servers: []netip.Addr{netip.MustParseAddr("169.254.20.10"), netip.MustParseAddr("fd00::a")}}},
		"two search lines":         {text: "search svc.a a\nsearch svc.cluster.local cluster.local\nnameserver 10.96.0.10\n", want: cluster},
		"comments":                 {text: "# search svc.a a\n; nameserver 192.0.2.1\nsearch svc.cluster.local cluster.local\nnameserver 10.96.0.10\n", want: cluster},
		"from a node":              {text: "search corp.example\nnameserver 192.0.2.53\n"},
		"empty":                    {},
		"no search":                {text: "nameserver 10.96.0.10\n"},
		"svc alone":                {text: "search svc cluster.local\nnameserver 10.96.0.10\n"},
		"without the domain alone": {text: "search svc.cluster.local\nnameserver 10.96.0.10\n"},
		"two domains":              {text: "search svc.cluster.local cluster.local svc.corp.example corp.example\nnameserver 10.96.0.10\n"},
		"no domain":                {text: "search svc.Cluster_Local Cluster_Local\nnameserver 10.96.0.10\n", fail: true},
		"no address":               {text: "search svc.cluster.local cluster.local\nnameserver dns\n", want: inject.DNS{Domain: "cluster.local"}},
		"a long line":              {text: "search svc.cluster.local cluster.local\n#" + strings.Repeat("x", 70_000), fail: true},
		"a long file":              {text: strings.Repeat("# nothing\n", 7_000) + "search svc.cluster.local cluster.local\n", fail: true},
	} {
		t.Run(name, func(t *testing.T) {
			file := filepath.Join(t.TempDir(), "resolv.conf")
			if err := os.WriteFile(file, []byte(tt.text), 0o600); err != nil {
				t.Fatal(err)
			}
			got, err := readDNS(file)
			if (err != nil) != tt.fail || !reflect.DeepEqual(got, tt.want) {
				t.Errorf("learned %+v, %v; want %+v", got, err, tt.want)
			}
		})
	}
}

// TestUseDNS: the flag takes precedence over the file, and both are optional.
func TestUseDNS(t *testing.T) {
	file := filepath.Join(t.TempDir(), "resolv.conf")
	if err := os.WriteFile(file, []byte("search svc.cluster.local cluster.local\nnameserver 10.96.0.10\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	const pod = `{"metadata":{"annotations":{"iam.amazonaws.com/role":"r"}},"spec":{"containers":[{"name":"c"}]}}`
	for name, tt := range map[string]struct {
		flags      []string
		file, want string
		differ     bool // the log reports the difference
	}{
		"file":          {nil, file, "b.credence.svc.cluster.local.", false},
		"flag":          {[]string{"--cluster-domain=corp.example"}, file, "b.credence.svc.corp.example.", true},
		"flag with dot": {[]string{"--cluster-domain=corp.example."}, file, "b.credence.svc.corp.example.", true},
		"both agree":    {[]string{"--cluster-domain=cluster.local."}, file, "b.credence.svc.cluster.local.", false},
		"flag alone":    {[]string{"--cluster-domain=corp.example"}, file + ".missing", "b.credence.svc.corp.example.", false},
		"nothing":       {nil, file + ".missing", "", false},
	} {
		t.Run(name, func(t *testing.T) {
			o, err := parse(append(tt.flags, "--broker=b.credence.svc:9443", "--sidecar-image=i"))
			if err != nil {
				t.Fatal(err)
			}
			if o.resolvConf != "/etc/resolv.conf" {
				t.Errorf("webhook reads %q, want /etc/resolv.conf", o.resolvConf)
			}
			o.resolvConf = tt.file
			var log bytes.Buffer
			if err := useDNS(t.Context(), o, program.NewLogger(&log, o.level)); err != nil {
				t.Fatal(err)
			}
			result, err := o.Injector.Inject([]byte(pod), "shop")
			if err != nil {
				t.Fatal(err)
			}
			patch, err := json.Marshal(result.Patch)
			if err != nil {
				t.Fatal(err)
			}
			if has := strings.Contains(string(patch), `{"name":"CREDENCE_BROKER_DNS_NAME","value":"`+tt.want+`"}`); has != (tt.want != "") {
				t.Errorf("patch lacks the name %q: %s", tt.want, patch)
			}
			if unknown := strings.Contains(log.String(), "set --cluster-domain"); unknown != (tt.want == "") {
				t.Errorf("log is %s", log.String())
			}
			if dns, err := installation.LoggedDNS(strings.NewReader(log.String())); err != nil || (dns.Domain == "") != (tt.want == "") || !strings.HasSuffix(tt.want, dns.Domain+".") && tt.want != "" {
				t.Errorf("the credence command reads domain %q (%v), the webhook uses %q", dns.Domain, err, tt.want)
			}
			if differ := strings.Contains(log.String(), "remove --cluster-domain"); differ != tt.differ {
				t.Errorf("log is %s", log.String())
			}
		})
	}
	if diff := cmp.Diff(`--cluster-domain: cluster domain "a b" is not a DNS domain such as cluster.local`, errorOf(parse([]string{
		"--broker=b:1", "--sidecar-image=i", "--cluster-domain=a b",
	}))); diff != "" {
		t.Errorf("error (-want +got):\n%s", diff)
	}
}

func errorOf(_ options, err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}
