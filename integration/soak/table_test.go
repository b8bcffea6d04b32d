//go:build linux

package soak

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/credence-iam/credence/integration/await"
	"github.com/credence-iam/credence/integration/deployment"
)

// failures are all failures, in the order of the page.
var failures = []failure{
	{
		name: "nothing", title: "Nothing fails", does: "For 90 seconds, nothing fails.",
		means: "Compare the waits below with these.", do: nothing,
	},
	{
		name: "kill-sidecar", title: "A sidecar is killed",
		does:    "The sidecars of all applications are killed with SIGKILL, and a second time when they are back.",
		means:   "The kubelet restarts a sidecar at once. After a second failure, it first waits some seconds. The session is in its memory, so the new one calls a broker. An SDK that holds credentials notices nothing.",
		allowed: "cli",
		why: "It calls the sidecar for each call, and gives up after three attempts within three seconds. So a program that starts while the kubelet holds back the second restart fails. " +
			"A program that runs longer has its credentials already.",
		do: killTwice(loadNamespace, "load=true", sidecarName),
	},
	{
		name: "kill-broker", title: "All brokers are killed",
		does:  "Both brokers are killed at once with SIGKILL, and a second time when they are back.",
		means: "Sidecars serve the sessions that they have. Each new broker fetches the sessions of running pods before it is ready.",
		do:    killTwice(deployment.Namespace, deployment.Selector("broker"), "broker"),
	},
	{
		name: "kill-webhook", title: "All webhooks are killed",
		does:  "Both webhooks are killed at once with SIGKILL, and a second time when they are back.",
		means: "Running pods do not need the webhook. The API server refuses new annotated pods until one is back, and controllers try again.",
		do:    killTwice(deployment.Namespace, deployment.Selector("webhook"), "webhook"),
	},
	{
		name: "kill-api-server", title: "The API server is killed",
		does:  "The API server is killed with SIGKILL and started again after 5 seconds, twice.",
		means: "Brokers verify tokens and find pods without the API server. Nobody can create pods meanwhile, whatever is installed.",
		do: func(t *testing.T) {
			for range 2 {
				withoutAPIServer(t, func() { time.Sleep(5 * time.Second) })
			}
		},
	},
	{
		name: "kill-controllers", title: "The controller manager and the scheduler are killed",
		does:  "Both are killed with SIGKILL and started again after 5 seconds, twice.",
		means: "Credence does not need them to serve pods.",
		do:    crashTwice(5*time.Second, "kube-controller-manager", "kube-scheduler"),
	},
	{
		name: "kill-kubelet", title: "A kubelet is killed",
		does:  "The kubelet of each node is killed with SIGKILL and started again after 15 seconds, twice.",
		means: "Containers continue to run. New pods of the node wait for the kubelet.",
		do:    crashTwice(15*time.Second, "node1-kubelet", "node2-kubelet"),
	},
	{
		name: "kill-containerd", title: "containerd is killed",
		does:  "The containerd of each node is killed with SIGKILL and started again after 5 seconds, twice.",
		means: "Containers continue to run, because their shims do. New pods of the node wait for containerd.",
		do:    crashTwice(5*time.Second, "node1-containerd", "node2-containerd"),
	},
	{
		name: "kill-dns", title: "The cluster's DNS is killed",
		does:  "CoreDNS, of which there is one, is killed with SIGKILL and started again after 30 seconds, twice.",
		means: "A running sidecar calls the addresses of its last look-up. A new one waits for DNS.",
		do:    crashTwice(30*time.Second, "coredns"),
	},
	{
		name: "kill-cert-manager", title: "cert-manager is killed",
		does:  "All parts of cert-manager are killed with SIGKILL, and a second time when they are back.",
		means: "Pods do not need it. It renews certificates a month before they expire, with the chart's values.",
		do: func(t *testing.T) {
			for _, part := range []string{"cert-manager-controller", "cert-manager-cainjector", "cert-manager-webhook"} {
				component := strings.TrimPrefix(part, "cert-manager-")
				killTwice(certManagerNamespace, deployment.Selector(component), part)(t)
			}
		},
	},
	{
		name: "network", title: "A node loses its network",
		does: "All packets from and to node1 are dropped for 2 minutes 30 seconds, so that Kubernetes takes the node for lost.",
		means: "Its pods keep their credentials: sidecars serve the sessions that they have. On other nodes, sidecars call the other owner of their session. " +
			"A new pod that was assigned to the lost node waits for the network.",
		do: func(t *testing.T) {
			network(t, "node1", true)
			time.Sleep(150 * time.Second)
			network(t, "node1", false)
			healthy(t)
		},
	},
	{
		name: "disk", title: "The disk of a broker's log is full",
		does:  "A broker's container log gets a file system without free space. The broker is killed, so that the new one logs to it. After two minutes there is space again.",
		means: "The broker serves as before. The container runtime discards what it cannot write, without an error for the broker. So audit lines are lost and not counted, with `broker.audit: required` too: watch the disks of nodes. The log continues when there is space.",
		do:    fullDisk,
	},
	{
		name: "memory", title: "A broker exceeds its memory",
		does:  "The memory limit of a broker is lowered until the kernel kills it.",
		means: "The other broker serves its sidecars. The kubelet restarts the killed one.",
		do:    outOfMemory,
	},
	{
		name: "etcd", title: "etcd is restored from a backup",
		does: "etcd and the API server are stopped, and start again with data of 90 seconds before. The controller manager, the scheduler and the kubelets are restarted, as Kubernetes advises. No part of Credence is.",
		means: "Pods that were created since the backup are lost. A watch from before the restore delivers nothing until etcd's revision is as high as it was, in every client of Kubernetes: " +
			"meanwhile brokers find new pods by live reads, and take deleted pods for running ones. So restart brokers and webhooks after a restore, like all controllers, " +
			"or restore with `etcdutl snapshot restore --bump-revision --mark-compacted`.",
		do: restore,
	},
	{
		name: "api-server", title: "The API server is unavailable for 10 minutes",
		does:  "The API server is killed with SIGKILL and started again after 10 minutes.",
		means: "Brokers verify tokens with the keys that they have, and renew the sessions of the pods that they know. Nobody can create pods meanwhile, whatever is installed.",
		do:    func(t *testing.T) { withoutAPIServer(t, func() { time.Sleep(10 * time.Minute) }) },
	},
	{
		name: "sts", title: "STS is unavailable for 25 minutes of an hour",
		does: "STS closes each connection of brokers without a response for 25 of 60 parts of the session duration. This starts at the worst time, when renewals are due.",
		means: "Brokers renew sessions when at least half of the duration is left, so each session outlives the outage. A new pod whose session a broker has gets it. " +
			"A pod of a new role waits. Do not restart brokers meanwhile.",
		do: func(t *testing.T) {
			awaitRenewals(t)
			stsDown.Store(true)
			defer stsDown.Store(false)
			time.Sleep(part(25 * time.Minute))
		},
	},
	{
		name: "brokers", title: "All brokers are unavailable for 25 minutes of an hour",
		does:  "The Deployment of the brokers has no replicas for 25 of 60 parts of the session duration. This starts at the worst time, when renewals are due.",
		means: "Each sidecar renews its session when at least 0.45 of the duration are left, so each session outlives the outage. New pods wait.",
		do: func(t *testing.T) {
			awaitRenewals(t)
			scaled(t, deployment.Namespace, []string{"credence-broker"}, func() { time.Sleep(part(25 * time.Minute)) })
		},
	},
	{
		name: "webhooks", title: "All webhooks are unavailable",
		does:  "The Deployment of the webhooks has no replicas for a minute.",
		means: "Annotated pods of opted-in namespaces are refused, so that none starts with the role of its node. Controllers try again. All other pods start.",
		do: func(t *testing.T) {
			scaled(t, deployment.Namespace, []string{"credence-webhook"}, func() { time.Sleep(time.Minute) })
		},
	},
	{
		name: "leaf", title: "Certificates are renewed",
		does:  "cert-manager renews the certificates of brokers and webhooks.",
		means: "Programs read their certificates at each handshake.",
		do:    func(t *testing.T) { replaced(t, func() { renew(t) }) },
	},
	{
		name: "secret", title: "The Secrets of certificates are deleted",
		does:  "The Secrets with the certificates of brokers and webhooks are deleted.",
		means: "Running programs keep their certificates, and cert-manager issues new ones at once. With `certificates.source: secrets`, a broker or webhook that restarts before you restore them does not start.",
		do: func(t *testing.T) {
			replaced(t, func() { deleteSecrets(t, "credence-broker-tls", "credence-webhook-tls") })
		},
	},
	{
		name: "ca", title: "The CA is replaced",
		does:  "The Secret of the CA is deleted. cert-manager makes another CA with a new key, and renews the certificates of brokers and webhooks.",
		means: "The leading broker publishes the new root beside the old one. Each broker serves its old certificate until pods have had three minutes to get the new root.",
		do: func(t *testing.T) {
			replaced(t, func() {
				deleteSecrets(t, "credence-ca")
				renew(t)
			})
		},
	},
	{
		name: "issuer", title: "The issuer is replaced",
		does:  "A Helm upgrade chooses another issuer, with another CA. Another upgrade chooses the first one again.",
		means: "It is the same as with a new CA. The roots of both stay published while pods may need them.",
		do: func(t *testing.T) {
			if out, err := d.Run(t.Context(), otherIssuer, d.Kubectl, "apply", "--namespace="+deployment.Namespace, "-f", "-"); err != nil {
				t.Fatalf("%v\n%s", err, out)
			}
			replaced(t, func() {
				if err := upgrade(t.Context(), "--set=certificates.source=issuer", "--set=certificates.issuerRef.kind=Issuer", "--set=certificates.issuerRef.name=other"); err != nil {
					t.Fatal(err)
				}
			})
			replaced(t, func() {
				if err := upgrade(t.Context()); err != nil {
					t.Fatal(err)
				}
			})
		},
	},
	{
		name: "cert-manager", title: "cert-manager is unavailable during a renewal",
		does:  "All parts of cert-manager have no replicas for a minute, while certificates are due for renewal.",
		means: "Programs serve the certificates that they have. cert-manager renews them when it is back.",
		do: func(t *testing.T) {
			replaced(t, func() {
				scaled(t, certManagerNamespace, certManager, func() {
					renew(t)
					time.Sleep(time.Minute)
				})
			})
		},
	},
	{
		name: "clock", title: "The nodes' clocks are wrong",
		does:  "The clock of AWS is 4 minutes ahead of the cluster for 2 minutes, and 4 minutes behind for 2 minutes more. AWS refuses signatures that are 5 minutes off.",
		means: "Sessions seem longer or shorter than they are. Correct the clocks before they are 5 minutes off: not every AWS client corrects its signatures by itself.",
		do: func(t *testing.T) {
			defer d.STS.SetClock(0)
			for _, ahead := range []time.Duration{4 * time.Minute, -4 * time.Minute} {
				d.STS.SetClock(ahead)
				time.Sleep(2 * time.Minute)
			}
		},
	},
	{
		name: "drain", title: "Each node is drained",
		does:  "Each node is drained, one after the other. Only the four applications stay.",
		means: "A PodDisruptionBudget keeps one broker and one webhook. The new broker is ready before the last old one stops.",
		do: func(t *testing.T) {
			for _, name := range []string{"node1", "node2"} {
				kubectl(t, "drain", name, "--ignore-daemonsets", "--delete-emptydir-data", "--force", "--pod-selector=load!=true", "--timeout=5m")
				kubectl(t, "uncordon", name)
				healthy(t)
			}
		},
	},
	{
		name: "upgrade", title: "Helm upgrades and rolls back",
		does:  "A Helm upgrade replaces all brokers and webhooks, and a rollback replaces them again.",
		means: "A new broker or webhook is ready before an old one stops.",
		do: func(t *testing.T) {
			old := aBroker(t)
			if err := upgrade(t.Context(), "--set=logLevel=debug"); err != nil {
				t.Fatal(err)
			}
			healthy(t)
			if now, err := d.Client.CoreV1().Pods(old.Namespace).Get(t.Context(), old.Name, metav1.GetOptions{}); !apierrors.IsNotFound(err) && (err != nil || now.DeletionTimestamp == nil) {
				t.Errorf("broker %s was not replaced (%v)", old.Name, err)
			}
			if _, err := d.Run(t.Context(), "", d.Helm, "rollback", "credence", "--namespace="+deployment.Namespace, "--wait", "--timeout=5m"); err != nil {
				t.Fatal(err)
			}
			healthy(t)
		},
	},
	{
		name: "uninstall", title: "Credence is uninstalled and installed again",
		does:  "Helm uninstalls Credence, and installs it again a minute later.",
		means: "Sidecars of running pods serve the sessions that they have, and renew them with the new brokers. Meanwhile new pods start without a sidecar, as in any cluster without Credence.",
		do: func(t *testing.T) {
			if err := d.Uninstall(t.Context()); err != nil {
				t.Fatal(err)
			}
			time.Sleep(time.Minute)
			if err := upgrade(t.Context()); err != nil {
				t.Fatal(err)
			}
			healthy(t)
		},
	},
}

// otherIssuer is an issuer with a CA of its own.
const otherIssuer = `apiVersion: cert-manager.io/v1
kind: Issuer
metadata: {name: other-self-signed}
spec: {selfSigned: {}}
---
apiVersion: cert-manager.io/v1
kind: Certificate
metadata: {name: other-ca}
spec: {isCA: true, commonName: other, secretName: other-ca, issuerRef: {name: other-self-signed}}
---
apiVersion: cert-manager.io/v1
kind: Issuer
metadata: {name: other}
spec: {ca: {secretName: other-ca}}
`

// aBroker returns one of the brokers.
func aBroker(t *testing.T) corev1.Pod {
	t.Helper()
	list, err := d.Pods(t.Context(), "broker")
	if err != nil || len(list) == 0 {
		t.Fatalf("there are no brokers: %v", err)
	}
	return list[0]
}

// fullDisk mounts a small file system over the logs of a broker, and fills it. Later it has space again. Other pods of the
// node keep their disk: the load reports its errors there.
func fullDisk(t *testing.T) {
	broker := aBroker(t)
	on := broker.Spec.NodeName
	logs := filepath.Join(d.Cluster.Logs(), on+"-pods", fmt.Sprintf("%s_%s_%s", broker.Namespace, broker.Name, broker.UID))
	size := func() (total int64) {
		files, _ := filepath.Glob(filepath.Join("/proc", strconv.Itoa(node(on).PID()), "root", logs, "broker", "*.log"))
		for _, file := range files {
			if info, err := os.Stat(file); err == nil {
				total += info.Size()
			}
		}
		return total
	}
	onNode(t, on, "mount", "-t", "tmpfs", "-o", "size=16m,mode=755", "full", logs)
	onNode(t, on, "sh", "-c", `head -c 32M /dev/zero > "$0/full" 2> /dev/null || true`, logs)
	kill(t, "broker", broker)
	time.Sleep(2 * time.Minute)
	if size() > 0 {
		t.Errorf("the broker could log %d bytes", size())
	}
	onNode(t, on, "rm", filepath.Join(logs, "full"))
	await.Until(t, "the broker's log has lines again", func() error {
		if size() == 0 {
			return errors.New("it is empty")
		}
		return nil
	})
	onNode(t, on, "umount", "-l", logs)
	now, err := d.Client.CoreV1().Pods(broker.Namespace).Get(t.Context(), broker.Name, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	kill(t, "broker", *now) // its log is on the file system that was removed
}

// outOfMemory lowers the memory limit of a broker until the kernel kills it.
func outOfMemory(t *testing.T) {
	victim := aBroker(t)
	cgroup := memoryCgroup(t, processOf(t, victim, "broker"))
	await.Until(t, "the kernel kills the broker", func() error {
		// In version 1, the limit cannot be below the usage. The broker then exceeds it with its next allocation.
		usage, err := cgroup.read()
		if err != nil {
			return nil //nolint:nilerr // the cgroup has ended with the broker
		}
		_ = os.WriteFile(cgroup.limit, []byte(usage), 0)
		return errors.New("it runs with " + usage)
	})
	awaitRestart(t, "broker", victim)
}

// restore takes a backup of etcd, and later starts etcd with it.
func restore(t *testing.T) {
	data := filepath.Join(d.Cluster.Run().Dir(), "etcd")
	backup := data + "-backup"
	withoutAPIServer(t, func() {
		etcd, err := d.Cluster.Run().Kill("etcd")
		if err == nil {
			err = os.CopyFS(backup, os.DirFS(data))
		}
		if err == nil {
			_, err = d.Cluster.Run().Start(etcd)
		}
		if err != nil {
			t.Fatal(err)
		}
	})
	time.Sleep(90 * time.Second)
	withoutAPIServer(t, func() {
		etcd, err := d.Cluster.Run().Kill("etcd")
		if err == nil {
			err = errors.Join(os.RemoveAll(data), os.Rename(backup, data))
		}
		if err == nil {
			_, err = d.Cluster.Run().Start(etcd)
		}
		if err != nil {
			t.Fatal(err)
		}
	})
	for _, name := range []string{"kube-controller-manager", "kube-scheduler", "node1-kubelet", "node2-kubelet"} {
		if err := crash(name, 0); err != nil {
			t.Fatal(err)
		}
	}
	healthy(t)
}
