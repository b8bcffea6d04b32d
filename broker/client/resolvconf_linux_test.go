package client_test

import (
	"crypto/tls"
	"errors"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/credence-iam/credence/broker/client"
	"github.com/credence-iam/credence/broker/client/dnstest"
	"github.com/credence-iam/credence/certs/certstest"
)

// resolvConf is the file of a pod in namespace shop with DNS policy ClusterFirst.
const resolvConf = `search shop.svc.cluster.local svc.cluster.local cluster.local
nameserver 127.0.0.1
options ndots:5
`

// TestResolvConf uses Go's resolver with the resolv.conf of a pod, as sidecars do. It runs in kernel namespaces in which
// that file and port 53 belong to the test.
func TestResolvConf(t *testing.T) {
	if file := os.Getenv(insideEnv); file != "" {
		if err := enter(file); err != nil {
			t.Fatal(err)
		}
		resolveAsPods(t)
		return
	}
	file := filepath.Join(t.TempDir(), "resolv.conf")
	if err := os.WriteFile(file, []byte(resolvConf), 0o600); err != nil {
		t.Fatal(err)
	}
	child := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestResolvConf$", "-test.v")
	child.Env = append(os.Environ(), insideEnv+"="+file)
	child.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  syscall.CLONE_NEWUSER | syscall.CLONE_NEWNS | syscall.CLONE_NEWNET,
		UidMappings: []syscall.SysProcIDMap{{HostID: os.Getuid(), Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{HostID: os.Getgid(), Size: 1}},
	}
	out, err := child.CombinedOutput()
	if _, ended := errors.AsType[*exec.ExitError](err); err != nil && !ended {
		t.Skipf("not run: this system does not permit a process to have its own namespaces: %v", err)
	}
	if err != nil || !strings.Contains(string(out), "--- PASS: TestResolvConf ") {
		t.Errorf("%v\n%s", err, out)
	}
	t.Logf("%s", out)
}

// enter mounts file as resolv.conf, and enables the loopback interface.
func enter(file string) error {
	if err := unix.Mount("none", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return err
	}
	if err := unix.Mount(file, "/etc/resolv.conf", "", unix.MS_BIND, ""); err != nil {
		return err
	}
	socket, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM, 0)
	if err != nil {
		return err
	}
	defer unix.Close(socket)
	loopback, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	loopback.SetUint16(unix.IFF_UP)
	return unix.IoctlIfreq(socket, unix.SIOCSIFFLAGS, loopback)
}

// resolveAsPods calls a broker with each kind of resolver.
func resolveAsPods(t *testing.T) {
	tests := map[string]struct {
		full    bool // the client has the full name
		treat   func(n int, q dnstest.Query) dnstest.Treatment
		queries int // maximum; 0: no limit
	}{
		"full-name":             {true, nil, 1},
		"full-name-slow":        {true, slowly, 2},
		"full-name-no-aaaa":     {true, dropping("AAAA"), 1},
		"full-name-odd":         {true, odd, 0},
		"full-name-even":        {true, even, 1},
		"search-domains":        {false, nil, 3},
		"search-domains-slow":   {false, slowly, 0},
		"search-domains-odd":    {false, odd, 0},
		"search-domains-even":   {false, even, 0},
		"search-domains-noaaaa": {false, dropping("AAAA"), 3},
	}
	var mu sync.Mutex
	counts := make(map[string]int) // :: namespace in the queried name, which identifies the test → queries
	records := make(map[string][]netip.Addr)
	for name := range tests {
		records["credence-broker."+name+".svc.cluster.local."] = []netip.Addr{netip.MustParseAddr("127.0.0.1")}
	}
	dns := dnstest.New(records, func(_ int, q dnstest.Query) dnstest.Treatment {
		namespace := strings.Split(q.Name, ".")[1]
		mu.Lock()
		defer mu.Unlock()
		counts[namespace]++
		if treat := tests[namespace].treat; treat != nil {
			return treat(counts[namespace], q)
		}
		return dnstest.Treatment{}
	})
	dns.Listen(t, "127.0.0.1:53")
	ca := certstest.NewCA(t)
	tokenFile := filepath.Join(t.TempDir(), "token")
	writeToken(t, tokenFile, token)

	t.Run("resolver", func(t *testing.T) {
		for name, tt := range tests {
			t.Run(name, func(t *testing.T) {
				t.Parallel()
				host := "credence-broker." + name + ".svc"
				s := &server{respond: responding(good())}
				_, port, err := net.SplitHostPort(s.listen(t, ca.Leaf(host)))
				if err != nil {
					t.Fatal(err)
				}
				cfg := client.Config{
					Target: host + ":" + port, TokenFile: tokenFile, TLS: &tls.Config{MinVersion: tls.VersionTLS13, RootCAs: ca.Pool()},
				}
				if tt.full {
					cfg.DNSName = host + ".cluster.local."
				}
				c, err := client.New(cfg)
				if err != nil {
					t.Fatal(err)
				}
				began := time.Now()
				_, err = c.Credentials(t.Context())
				for calls := 1; err != nil && !tt.full && calls < 3; calls++ {
					_, err = c.Credentials(t.Context())
				}
				if err != nil {
					t.Error(err)
				}
				mu.Lock()
				defer mu.Unlock()
				t.Logf("%d queries in %v", counts[name], time.Since(began).Round(time.Millisecond))
				if tt.queries > 0 && counts[name] > tt.queries {
					t.Errorf("%d queries, want %d at most", counts[name], tt.queries)
				}
			})
		}
	})
}
