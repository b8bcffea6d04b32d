//go:build unix

package main

import (
	"time"

	xrate "golang.org/x/time/rate"
)

// metric is one row of the report, and how it is measured.
type metric struct {
	name, unit string
	goal       goal
	// about says what is measured, how, and what is left out.
	about string
	// measure returns the runs. It ends with a notRun error if this machine cannot measure the metric.
	measure func(*world) []measurement
}

// metrics is every metric, in the order of the report.
var metrics = []metric{
	// What each pod pays. No container limits apply unless the metric says so.
	{
		// The node of each pod pulls the program once. gRPC, TLS and HTTP are 10 MB.
		"sidecar_binary_bytes_amd64", "bytes", atMost(11e6),
		`Size of the program for linux/amd64, built as for a release. It is exact, so there is one run.`,
		func(w *world) []measurement { return w.binarySize("amd64") },
	},
	{
		"sidecar_binary_bytes_arm64", "bytes", atMost(11e6),
		`The same for linux/arm64.`,
		func(w *world) []measurement { return w.binarySize("arm64") },
	},
	{
		// Each pod pays it, and a node has a hundred pods.
		"sidecar_rss_anon_bytes", "bytes", atMost(3 << 20),
		`RssAnon of an idle sidecar that has fetched and served its credentials once. Baseline: a bare net/http server
			that has served once. Each run is another process. File-backed pages of the program are not counted: all pods
			of a node share them.`,
		(*world).sidecarMemory,
	},
	{
		// What time limits, routing and header checks may cost.
		"sidecar_get_c1_p50", "us", ratioAtMost(1.15),
		`Median latency of GET /v1/credentials on one open connection. Baseline: a bare net/http server with a body of
			the same size. The client writes prepared bytes, so that its own work hides no difference. Each run starts
			both programs again.`,
		func(w *world) []measurement {
			return w.besideBare(func(s *server) side { return timed(time.Microsecond, s.get) })
		},
	},
	{
		// SDKs of several programs, or many clients of one, at a start.
		"sidecar_get_c16_rps", "requests/s", ratioAtLeast(0.85),
		`The same requests per second on 16 open connections, each with one request at a time.`,
		func(w *world) []measurement { return w.besideBare(w.throughput) },
	},
	{
		"sidecar_start_to_first_200_ms", "ms", noGoal("watched only: a pod's start takes seconds"),
		`From the start of the program to the first 200 with credentials, from a broker that responds at once over
			TLS. Baseline: the start of a bare net/http server. Both include starting a process and noticing that it
			listens.`,
		func(w *world) []measurement { return w.startTime(0) },
	},
	{
		"sidecar_start_to_first_200_50m_ms", "ms", noGoal("watched only: CPU time beyond 5 ms waits for the next period of 100 ms"),
		`The same with a CPU limit of 50m, which the sidecar of a Guaranteed pod has: a cgroup with the quota that a
			kubelet sets. Each start has a cgroup of its own. A shell enters it and then becomes the program.`,
		func(w *world) []measurement { return w.startTime(50) },
	},
	{
		"sidecar_start_to_first_200_100m_ms", "ms", noGoal("watched only: CPU time beyond 10 ms waits for the next period of 100 ms"),
		`The same with a CPU limit of 100m, which other sidecars have.`,
		func(w *world) []measurement { return w.startTime(100) },
	},
	{
		// A node has a hundred sidecars.
		"sidecar_wakeups_per_minute", "1/min", atMost(5),
		`How often an idle sidecar wakes that has fetched and served its credentials once: voluntary context switches
			of all its threads in 2 minutes. Baseline, for information: a bare net/http server that has served once. The
			runs are processes side by side. Renewals, two per hour, are not included.`,
		(*world).wakeups,
	},

	// What each annotated pod costs when it is created. Policy and patch may take half as long as decoding and
	// encoding.
	{
		"webhook_review_small_p50", "us", ratioAtMost(1.5),
		`Median time of one admission review of a pod with one container, without network: decode, check policy,
			inject, respond. Baseline: decode the same review, with the pod as its Go type, and encode both again. A
			webhook that does this changes nothing, and loses fields that are newer than its types.`,
		func(w *world) []measurement { return w.reviews(1, microseconds) },
	},
	{
		"webhook_review_small_allocs", "allocations", noGoal("watched beside webhook_review_small_p50, which has one"),
		`Allocations of the same review.`,
		func(w *world) []measurement { return w.reviews(1, allocations) },
	},
	{
		"webhook_review_100c_p50", "us", ratioAtMost(1.5),
		`The same for a pod with 100 containers, each of which gets its variables.`,
		func(w *world) []measurement { return w.reviews(100, microseconds) },
	},
	{
		"webhook_review_100c_allocs", "allocations", noGoal("watched beside webhook_review_100c_p50, which has one"),
		`Allocations of the same review.`,
		func(w *world) []measurement { return w.reviews(100, allocations) },
	},
	{
		"webhook_tls_rps", "reviews/s", noGoal("watched only: webhook_review_small_p50 is the difference between it and the baseline"),
		`Reviews of the small pod per second over TLS 1.3 and HTTP/1.1, which the webhook serves, on 8 open connections.
			Baseline: a server that reads the review and responds with a fixed text. Client and servers are one process.`,
		(*world).reviewsOverTLS,
	},

	// What the broker adds to the work that no broker can avoid, with sessions cached.
	{
		// What reading claims, policy, the cache and audit may take of the whole.
		"broker_get_rps", "calls/s", ratioAtLeast(0.80),
		`Calls per second of GetCredentials with a cached session, by 8 callers that wait for each response. Each
			caller has its own connection and its own pod-bound RS256 token. Baseline: a gRPC server over the same TLS
			that verifies the signature of each token and responds with a fixed message of the same size. Broker, callers
			and baseline are one process, so both figures include the callers' work. Real in the broker: token
			verification with keys from an API server's endpoints, policy, cache, and audit lines, which are discarded.
			Not included: handshakes, and finding the pod, which is in a map here and not in watch caches.`,
		warmBroker(func(s scene) (ours, bare side) { return rate(s.ours.open), rate(s.bare.open) }),
	},
	{
		// The inverse of the goal for calls per second.
		"broker_get_p99", "us", ratioAtMost(1.25),
		`The same calls and the same baseline: the latency that one call in a hundred exceeds under the full load of
			all callers, as the median over tenths of a second.`,
		warmBroker(func(s scene) (ours, bare side) { return p99(s.ours.open), p99(s.bare.open) }),
	},
	{
		"broker_fresh_connection_rps", "calls/s", ratioAtLeast(0.80),
		`The same with a connection for each call, through the client that sidecars use: their calls are half an hour
			apart, and they keep no connection open. The handshake is most of the time, on both sides.`,
		warmBroker(func(s scene) (ours, bare side) { return rate(s.ours.fresh), rate(s.bare.fresh) }),
	},
	{
		"broker_verify_ns", "ns", noGoal("a part of broker_get_rps, which has one"),
		`Verifying one pod-bound RS256 token, signature and claims. Baseline: the signature alone.`,
		warmBroker(func(s scene) (ours, bare side) {
			return timed(time.Nanosecond, s.verify), timed(time.Nanosecond, s.verifySignature)
		}),
	},

	// What the broker does with many pods at once.
	{
		// 64 concurrent calls of 100 ms each are 640 per second.
		"broker_cold_5000_roles_per_second", "roles/s", atLeast(500),
		`Sessions fetched per second when a broker starts among 5,000 pods with as many roles in 20 namespaces, until
			all are warm. STS over HTTP takes 100 ms; 64 calls run at once, with no rate limit. STS and broker are one
			process.`,
		func(w *world) []measurement {
			return w.coldStarts(5000, 5000, xrate.Inf, func(f coldStart) float64 { return 5000 / f.took.Seconds() })
		},
	},
	{
		"broker_cold_10000_pods_sts_calls", "calls", atMost(500),
		`STS calls when a broker starts among 10,000 pods with 500 roles in 20 namespaces, until all are warm.`,
		func(w *world) []measurement {
			return w.coldStarts(10_000, 500, 0, func(f coldStart) float64 { return float64(f.calls) })
		},
	},
	{
		// 0.45 of an hour.
		"broker_renewal_5000_min_remaining_seconds", "s", atLeast(1620),
		`The shortest time left of any of 5,000 sessions of one hour. They were created within seconds, fall due
			together and are renewed at no more than 400 calls per second. In virtual time, by
			TestManyIdleGrantsFallDueTogether of package broker.`,
		func(w *world) []measurement {
			return w.repeat(w.runs, func(w *world, _ int) measurement {
				out := w.test("", "-run=^TestManyIdleGrantsFallDueTogether$", "./broker")
				return measurement{Value: figure(out, "least_remaining_seconds")}
			})
		},
	},
	{
		// kiam's server took 286 MB for as many pods, kube2iam 148 MB.
		"broker_rss_10k_pods_bytes", "bytes", atMost(60e6),
		`VmRSS of the broker's program with 10,000 injected pods of 500 roles in 20 namespaces, when it is ready and
			has a warm session for each role. Its API server sends the metadata of pods of 6 kB as a real one does: over
			TLS, in protobuf, as streamed lists. All pages of the program in memory count.`,
		func(w *world) []measurement { return w.resident(10_000, "VmRSS", false, true) },
	},
	{
		"broker_rss_100k_pods_bytes", "bytes", atMost(250e6),
		`The highest VmRSS (VmHWM) of the broker's program with 100,000 such pods, from its start until after a relist
			that the API server forces (410 Gone). Each run is the larger of two: with an API server that streams lists,
			and with one that serves pages, as before Kubernetes 1.34.`,
		func(w *world) []measurement { return w.resident(100_000, "VmHWM", true, true, false) },
	},

	// What several brokers demand of STS, and what the loss of one costs. The first three come from the simulator,
	// integration/scale: the same code in virtual time, without sockets and Kubernetes.
	{
		// Two owners of each role, which renew with between 0.5 and 0.6 of an hour left.
		"scale_sts_calls_per_hour_3_brokers", "calls/h", atMost(22_500),
		`STS calls per hour for 5,000 roles with sessions of one hour, used by 100,000 pods on 1,000 nodes with 3
			brokers, in the steady state.`,
		func(w *world) []measurement { return w.simulate("scale_sts_calls_per_hour_3_brokers") },
	},
	{
		"scale_sts_calls_per_hour_10_brokers", "calls/h", atMost(22_500),
		`The same with 10 brokers.`,
		func(w *world) []measurement { return w.simulate("scale_sts_calls_per_hour_10_brokers") },
	},
	{
		"scale_min_remaining_fraction", "of life", atLeast(0.45),
		`The smallest fraction of a session's duration that was left in any response of all scenarios: rolling
			updates, more and fewer brokers, the loss of one and of a third of them, and replaced pods.`,
		func(w *world) []measurement { return w.simulate("scale_min_remaining_fraction") },
	},
	{
		"scale_failover_failed_calls", "calls", atMost(0),
		`Failed calls of 600 sidecars' clients while they lose one of three brokers, all programs of their own. The
			broker is killed in one run and stopped in the next (SIGSTOP: it accepts connections and does not respond).
			DNS and the other brokers notice after 5 s. Each client makes one call in that time, within its hedge budget.`,
		func(w *world) []measurement {
			return w.failovers(func(f failover) float64 { return float64(f.failed) })
		},
	},
	{
		"scale_failover_p99_ms", "ms", atMost(1000),
		`The latency that one in a hundred of those calls exceeded that began in that time. Each run is the larger
			figure of a killed and of a stopped broker.`,
		func(w *world) []measurement {
			return w.failovers(func(f failover) float64 { return f.p99.Seconds() * 1000 })
		},
	},

	// What attackers without a token can do to pods that have one.
	{
		"broker_besieged_p99_ms", "ms", atMost(1000),
		`The latency that one in a hundred calls of a pod exceeds while attackers hold as many connections to its
			broker as they can, from four other addresses: the largest of all attacks of integration/siege, 15 s each.`,
		func(w *world) []measurement {
			out := w.test("CREDENCE_SIEGE=15s", "-timeout=20m", "-run=^TestConnectionsToTheBroker$", "./integration/siege")
			return []measurement{{Value: figure(out, "broker_besieged_p99_ms")}}
		},
	},
}

// simulate returns a figure of the simulator, which runs once for all of them.
func (w *world) simulate(name string) []measurement {
	if w.simulated == nil {
		w.simulated = w.test("CREDENCE_SCALE=full", "-timeout=40m", "./integration/scale")
	}
	return []measurement{{Value: figure(w.simulated, name)}}
}
