//go:build linux

// Package ipv6 tests Credence on clusters with nodes that have IPv6 only, and on those that have both IP families.
//
// "make e2e" runs it and sets CREDENCE_E2E. It needs root and some minutes. It covers what depends on addresses. Package e2e
// has all else, with IPv4.
package ipv6

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/credence-iam/credence/integration/await"
	"github.com/credence-iam/credence/integration/cluster"
	"github.com/credence-iam/credence/integration/deployment"
	"github.com/credence-iam/credence/integration/kubetest"
	"github.com/credence-iam/credence/integration/stack"
)

// world is one installation.
type world struct {
	*deployment.Deployment

	families  []corev1.IPFamily
	namespace string
}

func TestIPv6Only(t *testing.T) {
	w := install(t, corev1.IPv6Protocol)
	w.addresses(t)
	w.works(t)
	w.replaceBrokers(t)
}

func TestDualStack(t *testing.T) {
	w := install(t, corev1.IPv4Protocol, corev1.IPv6Protocol)
	w.addresses(t)
	w.works(t)
	// Some platforms give all Services both families. Each broker then has two addresses, and must count once.
	both := []byte(`{"spec":{"ipFamilyPolicy":"RequireDualStack"}}`)
	if _, err := w.Client.CoreV1().Services(deployment.Namespace).
		Patch(t.Context(), "credence-broker", types.MergePatchType, both, metav1.PatchOptions{}); err != nil {
		t.Fatal(err)
	}
	await.Until(t, "the brokers have addresses of both families", func() error {
		found, err := w.Client.DiscoveryV1().EndpointSlices(deployment.Namespace).
			List(t.Context(), metav1.ListOptions{LabelSelector: "kubernetes.io/service-name=credence-broker"})
		if err == nil && len(found.Items) != 2 {
			err = fmt.Errorf("there are %d EndpointSlices", len(found.Items))
		}
		return err
	})
	w.replaceBrokers(t)
}

func TestDualStackWithIPv6Preferred(t *testing.T) {
	w := install(t, corev1.IPv6Protocol, corev1.IPv4Protocol)
	w.addresses(t)
	w.works(t)
}

// install installs Credence on a new cluster with these families, and makes an opted-in namespace.
func install(t *testing.T, families ...corev1.IPFamily) world {
	t.Helper()
	if os.Getenv(deployment.Variable) == "" {
		t.Skipf("this test runs by make e2e, which sets %s", deployment.Variable)
	}
	c, err := cluster.Start(t.Context(), cluster.Config{Nodes: 1, IPFamilies: families, Progress: os.Stderr})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			c.Run().KeepLogs()
			t.Log("the cluster's logs are in", c.Logs())
		}
		if err := c.Stop(); err != nil {
			t.Error(err)
		}
	})
	d, err := deployment.Prepare(t.Context(), deployment.Config{Cluster: c, Progress: os.Stderr})
	if err != nil {
		t.Fatal(err)
	}
	if err := d.Install(t.Context(), "--set=networkPolicy.enabled=true"); err != nil {
		t.Fatal(err)
	}
	return world{d, families, d.Namespace(t)}
}

// addresses checks that the cluster has the families that it should have: otherwise the other checks show nothing.
func (w world) addresses(t *testing.T) {
	t.Helper()
	all, err := w.Client.CoreV1().Pods(deployment.Namespace).List(t.Context(), metav1.ListOptions{})
	if err != nil || len(all.Items) == 0 {
		t.Fatalf("there are no pods of Credence: %v", err)
	}
	for _, pod := range all.Items {
		var found []corev1.IPFamily
		for _, ip := range pod.Status.PodIPs {
			found = append(found, familyOf(t, ip.IP))
		}
		if !slices.Equal(found, w.families) {
			t.Errorf("pod %s has addresses of %v, want %v", pod.Name, found, w.families)
		}
	}
	services, err := w.Client.CoreV1().Services(deployment.Namespace).List(t.Context(), metav1.ListOptions{})
	if err != nil || len(services.Items) == 0 {
		t.Fatalf("there are no Services of Credence: %v", err)
	}
	for _, service := range services.Items {
		if !slices.Equal(service.Spec.IPFamilies, w.families[:1]) {
			t.Errorf("Service %s has %v, want %v", service.Name, service.Spec.IPFamilies, w.families[:1])
		}
	}
	if sts, err := netip.ParseAddrPort(strings.TrimPrefix(w.STS.URL(), "http://")); err != nil || familyOf(t, sts.Addr().String()) != w.families[0] {
		t.Errorf("STS is at %s (%v), want %s", w.STS.URL(), err, w.families[0])
	}
}

func familyOf(t *testing.T, address string) corev1.IPFamily {
	t.Helper()
	addr, err := netip.ParseAddr(address)
	if err != nil {
		t.Fatal(err)
	}
	if addr.Is4() {
		return corev1.IPv4Protocol
	}
	return corev1.IPv6Protocol
}

// works checks that a pod gets credentials, that the webhook refuses, and that the brokers know each other.
func (w world) works(t *testing.T) {
	t.Helper()
	w.getsCredentials(t, "cart")
	_, err := kubetest.Dry(t, w.Client, w.namespace, stack.Pod("wrong", map[string]string{"iam.amazonaws.com/roel": "cart"}))
	if err == nil || !strings.Contains(err.Error(), "iam.amazonaws.com/roel") {
		t.Errorf("a pod with a misspelled annotation: got %v, want a refusal that names it", err)
	}
	w.brokersKnowEachOther(t)
}

// getsCredentials runs a pod with a role of its own. So its credentials cannot be those of an earlier pod.
func (w world) getsCredentials(t *testing.T, role string) {
	t.Helper()
	pod := deployment.Once(w.App(role, map[string]string{"iam.amazonaws.com/role": role}, "whoami"))
	kubetest.Create(t, w.Client, w.namespace, pod)
	kubetest.AwaitEnd(t, w.Client, w.namespace, role)
	want := "arn:aws:sts::" + stack.Account + ":assumed-role/" + role + "/credence"
	if got := strings.TrimSpace(kubetest.Logs(t, w.Client, w.namespace, role, "app")); got != want {
		t.Errorf("an SDK in pod %s is %q, want %q", role, got, want)
	}
}

// brokersKnowEachOther waits until both brokers have half of the rate of STS calls.
func (w world) brokersKnowEachOther(t *testing.T) {
	t.Helper()
	await.Until(t, "each of two brokers has half of the rate", func() error {
		brokers, err := w.Pods(t.Context(), "broker")
		if err == nil && len(brokers) != 2 {
			err = fmt.Errorf("there are %d brokers", len(brokers))
		}
		if err != nil {
			return err
		}
		for _, broker := range brokers {
			metrics, err := w.Client.CoreV1().Pods(deployment.Namespace).
				ProxyGet("http", broker.Name, "8080", "metrics", nil).DoRaw(t.Context())
			if err == nil && !strings.Contains(string(metrics), "\ncredence_broker_fetch_rate_share 200\n") {
				err = errors.New(broker.Name + " has another share")
			}
			if err != nil {
				return err
			}
		}
		return nil
	})
}

// replaceBrokers replaces all brokers, one after the other.
func (w world) replaceBrokers(t *testing.T) {
	t.Helper()
	for _, args := range [][]string{{"rollout", "restart"}, {"rollout", "status", "--timeout=5m"}} {
		args = append(args, "--namespace="+deployment.Namespace, "deployment/credence-broker")
		if _, err := w.Run(t.Context(), "", w.Kubectl, args...); err != nil {
			t.Fatal(err)
		}
	}
	w.getsCredentials(t, "after-replacement")
	w.brokersKnowEachOther(t)
}
