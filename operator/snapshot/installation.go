package snapshot

import (
	"context"
	"crypto/x509"
	"net/netip"
	"net/url"
	"slices"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/credence-iam/credence/broker/placement"
	"github.com/credence-iam/credence/operator/installation"
	"github.com/credence-iam/credence/sidecar/contract"
)

// Names of the chart.
const (
	identityReason = "AWSIdentityUnconfirmed" // of the Event on a broker's own pod
	rootsKey       = "roots.pem"
)

const (
	// maxBrokers bounds the brokers that are called. The owners of the pod's session are among them.
	maxBrokers = 8
	// tlsPort is the default of --listen of broker and webhook.
	tlsPort = 9443
)

// aboutInstallation reads the state of webhook and brokers. The parts that call brokers begin when these are listed.
func (g *gatherer) aboutInstallation(ctx context.Context, found *installation.Installation) {
	kube, ns := g.client.Kube, found.Namespace
	g.aboutPolicies(ctx, ns)
	g.part(ctx, SourceConfiguration, func(ctx context.Context) (func(), error) {
		c, err := kube.AdmissionregistrationV1().MutatingWebhookConfigurations().Get(ctx, installation.Configuration, metav1.GetOptions{})
		if apierrors.IsNotFound(err) {
			return func() { g.Installation.ConfigurationGone = true }, nil
		}
		return func() { g.Installation.Configuration = c }, err
	})
	g.rights(ctx, ns)
	g.part(ctx, "", func(ctx context.Context) (func(), error) {
		identity := g.identity(ctx, found)
		return func() { g.Installation.Identity = identity }, nil
	})
	limited, cancel := context.WithTimeout(ctx, partTimeout)
	defer cancel()
	webhooks, brokers, err := g.client.Pods(limited, ns)
	if err != nil {
		g.fail(SourceBrokers, err)
		return
	}
	g.mu.Lock()
	g.Installation.WebhookPods = webhooks
	for _, p := range g.ranked(brokers) {
		g.Installation.Brokers = append(g.Installation.Brokers, Broker{Pod: p})
	}
	brokerStates := g.Installation.Brokers
	g.mu.Unlock()
	if at := slices.IndexFunc(webhooks, func(p corev1.Pod) bool { return p.Status.Phase == corev1.PodRunning }); at >= 0 {
		g.part(ctx, SourceCertificate, func(ctx context.Context) (func(), error) {
			s, err := g.serving(ctx, &webhooks[at], portOf(found.Webhook), installation.WebhookName+"."+ns+".svc")
			return func() { g.Installation.WebhookTLS = s }, err
		})
	}
	for i := range brokerStates[:min(len(brokerStates), maxBrokers)] {
		g.broker(ctx, &brokerStates[i])
	}
}

func (g *gatherer) fail(source string, err error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.Problems[source] = ProblemOf(err)
}

// ranked returns the brokers, those first that sidecars of the pod call first.
func (g *gatherer) ranked(pods []corev1.Pod) []corev1.Pod {
	key, sidecar := "", g.Sidecar()
	if sidecar == nil {
		return pods
	}
	for _, v := range sidecar.Env {
		if v.Name == contract.Env(contract.RoutingKey) {
			key = v.Value
		}
	}
	var addresses []netip.Addr
	for i := range pods {
		if a, err := netip.ParseAddr(pods[i].Status.PodIP); err == nil {
			addresses = append(addresses, a)
		}
	}
	order := placement.Rank(key, addresses)
	at := func(p *corev1.Pod) int {
		if n := slices.IndexFunc(order, func(a netip.Addr) bool { return a.String() == p.Status.PodIP }); n >= 0 {
			return n
		}
		return len(order)
	}
	slices.SortStableFunc(pods, func(a, b corev1.Pod) int { return at(&a) - at(&b) })
	return pods
}

// broker reads what one broker says. It stores into b, which only its own parts change.
func (g *gatherer) broker(ctx context.Context, b *Broker) {
	pod, ns := &b.Pod, b.Pod.Namespace
	if !installation.Ready(pod) {
		g.part(ctx, "", func(ctx context.Context) (func(), error) {
			text := g.unready(ctx, pod)
			return func() { b.Problem = text }, nil
		})
	}
	if pod.Status.Phase != corev1.PodRunning {
		return
	}
	g.part(ctx, SourceGrants, func(ctx context.Context) (func(), error) {
		query := url.Values{}
		if g.Judge.Rules != nil {
			// Without a role, because only the brokers know its account, explain looks for its name in all.
			if basis, _ := g.Judge.Rules.Basis(g.PolicyPod(), g.PolicyNamespace()); !basis.Role.IsZero() {
				query.Set("role", basis.Role.String())
			}
		}
		before := time.Now()
		page, err := g.client.BrokerOf(pod).Grants(ctx, query)
		took := time.Since(before)
		return func() {
			b.Grants, b.Known = page.Grants, true
			// The page is of the middle of the call. Now has aged since the API server said it.
			b.Clock = page.Time.Sub(g.Now.Add(before.Sub(g.asked) + took/2))
		}, err
	})
	g.part(ctx, "", func(ctx context.Context) (func(), error) {
		s, err := g.serving(ctx, pod, tlsPort, installation.BrokerName+"."+ns+".svc")
		return func() { b.TLS = s }, err
	})
}

// unready returns why a broker is not ready: by its own check, or else by its newest Event about AWS.
func (g *gatherer) unready(ctx context.Context, pod *corev1.Pod) string {
	if pod.Status.Phase == corev1.PodRunning {
		if text := g.client.Unready(ctx, pod, installation.BrokerAdminPort); text != "" {
			return text
		}
	}
	list, err := g.client.Kube.CoreV1().Events(pod.Namespace).List(ctx, metav1.ListOptions{
		FieldSelector: "reason=" + identityReason + ",involvedObject.name=" + pod.Name, Limit: maxEvents,
	})
	if err != nil || len(list.Items) == 0 {
		return ""
	}
	newest := slices.MaxFunc(list.Items, func(a, b corev1.Event) int { return messageOf(&a).Time.Compare(messageOf(&b).Time) })
	return newest.Message
}

// rights looks for the objects that give the brokers their rights.
func (g *gatherer) rights(ctx context.Context, ns string) {
	rbac := g.client.Kube.RbacV1()
	const name = installation.BrokerName
	for what, get := range map[string]func(context.Context) error{
		"ClusterRole " + name: func(ctx context.Context) error {
			_, err := rbac.ClusterRoles().Get(ctx, name, metav1.GetOptions{})
			return err
		},
		"ClusterRoleBinding " + name: func(ctx context.Context) error {
			_, err := rbac.ClusterRoleBindings().Get(ctx, name, metav1.GetOptions{})
			return err
		},
		"Role " + ns + "/" + name: func(ctx context.Context) error {
			_, err := rbac.Roles(ns).Get(ctx, name, metav1.GetOptions{})
			return err
		},
		"RoleBinding " + ns + "/" + name: func(ctx context.Context) error {
			_, err := rbac.RoleBindings(ns).Get(ctx, name, metav1.GetOptions{})
			return err
		},
	} {
		g.part(ctx, SourceRBAC, func(ctx context.Context) (func(), error) {
			err := get(ctx)
			if apierrors.IsNotFound(err) {
				return func() {
					g.Installation.MissingRights = append(g.Installation.MissingRights, what)
					slices.Sort(g.Installation.MissingRights)
				}, nil
			}
			return func() {}, err
		})
	}
}

// identity returns the role of the brokers, as far as the cluster shows it.
func (g *gatherer) identity(ctx context.Context, found *installation.Installation) string {
	if role := installation.Arg(found.BrokerArgs(), "assume-role"); role != "" || found.Broker == nil {
		return role
	}
	spec := &found.Broker.Spec.Template.Spec
	for _, c := range spec.Containers {
		for _, v := range c.Env {
			if v.Name == "AWS_ROLE_ARN" && v.Value != "" {
				return v.Value
			}
		}
	}
	account, err := g.client.Kube.CoreV1().ServiceAccounts(found.Namespace).Get(ctx, spec.ServiceAccountName, metav1.GetOptions{})
	if err != nil {
		return ""
	}
	return account.Annotations["eks.amazonaws.com/role-arn"]
}

func portOf(d *appsv1.Deployment) int {
	if d != nil {
		for _, c := range d.Spec.Template.Spec.Containers {
			for _, p := range c.Ports {
				if p.Name == "https" {
					return int(p.ContainerPort)
				}
			}
		}
	}
	return tlsPort
}

// serving returns the certificate that a pod presents for a name. It does not verify the certificate: see verify.
func (g *gatherer) serving(ctx context.Context, pod *corev1.Pod, port int, name string) (*Serving, error) {
	chain, err := g.client.Certificates(ctx, pod, port, name)
	if err != nil {
		return nil, err
	}
	return &Serving{From: chain[0].NotBefore, Until: chain[0].NotAfter, name: name, chain: chain}, nil
}

// verify compares the certificates with the roots that their clients have.
func (g *gatherer) verify() {
	if c := g.Installation.Configuration; c != nil && len(c.Webhooks) > 0 {
		g.Installation.WebhookTLS.verify(c.Webhooks[0].ClientConfig.CABundle)
	}
	if g.Trust != nil {
		for i := range g.Installation.Brokers {
			g.Installation.Brokers[i].TLS.verify([]byte(g.Trust.Data[rootsKey]))
		}
	}
}

func (s *Serving) verify(roots []byte) {
	if s == nil {
		return
	}
	options := x509.VerifyOptions{
		DNSName: s.name, Roots: x509.NewCertPool(), Intermediates: x509.NewCertPool(),
		CurrentTime: s.From.Add(s.Until.Sub(s.From) / 2), // Expiration is another failure.
	}
	options.Roots.AppendCertsFromPEM(roots)
	for _, c := range s.chain[1:] {
		options.Intermediates.AddCert(c)
	}
	if _, err := s.chain[0].Verify(options); err != nil {
		s.Untrusted = err.Error()
	}
}
