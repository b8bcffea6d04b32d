//go:build unix

package integration

import (
	"context"
	"errors"
	"net"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	eventsv1 "k8s.io/api/events/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/credence-iam/credence/broker/debugapi"
	"github.com/credence-iam/credence/integration/await"
	"github.com/credence-iam/credence/integration/chart"
	"github.com/credence-iam/credence/integration/kubelettest"
	"github.com/credence-iam/credence/integration/process"
	"github.com/credence-iam/credence/integration/stack"
	cockpit "github.com/credence-iam/credence/operator/dashboard"
	"github.com/credence-iam/credence/operator/dashboard/view"
	"github.com/credence-iam/credence/operator/installation"
)

// commandAccount is the ServiceAccount of which commands need a token.
const commandAccount = "credence-commands"

// TestViewer gives two people the chart's roles for people: with that of viewers, the dashboard reads all that it needs, and
// nothing else is in reach. Only with the role for commands can a person command a broker.
func TestViewer(t *testing.T) {
	installPeople(t)
	as := func(user string, roles ...string) *installation.Client {
		t.Helper()
		config, err := control.User(user)
		if err != nil {
			t.Fatal(err)
		}
		subjects := []rbacv1.Subject{{Kind: rbacv1.UserKind, APIGroup: rbacv1.GroupName, Name: user}}
		for _, role := range roles {
			binding := &rbacv1.RoleBinding{ObjectMeta: metav1.ObjectMeta{Name: user + "-" + role}, Subjects: subjects, RoleRef: rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "Role", Name: role}}
			if _, err := credence.Client.RbacV1().RoleBindings(stack.SystemNamespace).Create(t.Context(), binding, metav1.CreateOptions{}); err != nil {
				t.Fatal(err)
			}
		}
		binding := &rbacv1.ClusterRoleBinding{ObjectMeta: metav1.ObjectMeta{Name: user}, Subjects: subjects, RoleRef: rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: "credence-viewer"}}
		if _, err := credence.Client.RbacV1().ClusterRoleBindings().Create(t.Context(), binding, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
		client, err := installation.NewClient(config)
		if err != nil {
			t.Fatal(err)
		}
		return client
	}
	viewer, commander := as("viewer", "credence-viewer"), as("commander", "credence-viewer", commandAccount)
	namespace := namespace(t, ".*")
	now := metav1.NowMicro()
	if _, err := credence.Client.EventsV1().Events(namespace).Create(t.Context(), &eventsv1.Event{
		ObjectMeta: metav1.ObjectMeta{Name: "app.1"}, EventTime: now, ReportingController: "credence-iam.github.io/broker", ReportingInstance: "b", Action: "GetCredentials",
		Reason: "CredentialsRefused", Type: "Warning", Note: "ROLE_NOT_PERMITTED: change the role", Regarding: corev1.ObjectReference{Kind: "Pod", Namespace: namespace, Name: "app"},
	}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}

	var found *installation.Installation
	await.Until(t, "the rights are in force", func() (err error) {
		found, err = viewer.Find(t.Context(), "")
		return err
	})
	gatherer := cockpit.Gatherer{Client: viewer, Cluster: "test", Namespace: found.Namespace}
	s := gatherer.Gather(t.Context())
	if len(s.Problems) > 0 || s.Broker == nil || s.Broker.Want != 2 || s.Webhook == nil || found.Namespace != stack.SystemNamespace {
		t.Errorf("in %s, a viewer sees %+v, with the problems %q", found.Namespace, s, s.Problems)
	}
	at := slices.IndexFunc(s.Refused, func(r view.Refused) bool { return r.Namespace == namespace })
	if at < 0 || s.Refused[at].Reason != "ROLE_NOT_PERMITTED" || s.Refused[at].Message != "change the role" || s.Refused[at].Pod != "app" || !s.RefusedKnown {
		t.Errorf("a viewer sees the refusals %+v", s.Refused)
	}
	if _, err := viewer.Kube.CoreV1().Secrets(stack.SystemNamespace).List(t.Context(), metav1.ListOptions{}); !apierrors.IsForbidden(err) {
		t.Errorf("a viewer lists Secrets: %v", err)
	}
	if err := viewer.Kube.CoreV1().Pods(stack.SystemNamespace).Delete(t.Context(), "any", metav1.DeleteOptions{}); !apierrors.IsForbidden(err) {
		t.Errorf("a viewer deletes pods: %v", err)
	}
	if token, err := viewer.CommandToken(t.Context(), found); !apierrors.IsForbidden(err) || token != "" {
		t.Errorf("a viewer creates a token for commands: %v", err)
	}

	free, err := process.FreePort(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	address := net.JoinHostPort("127.0.0.1", strconv.Itoa(free))
	restartBroker(t, "--debug-listen="+address, "--command-account="+commandAccount)
	pod := create(t, namespace, "app", role("viewed"))
	if _, err := call(t, token(t, pod)); err != nil {
		t.Fatal(err)
	}
	running := kubelettest.Start(t, credence.Client).Run(t, stack.SystemNamespace, brokerPod("credence-broker-1-viewed"), kubelettest.Pod{
		Ports: map[int]string{installation.BrokerDebugPort: address, installation.BrokerAdminPort: credence.Broker.Admin},
	})
	t.Cleanup(func() {
		if err := credence.Client.CoreV1().Pods(running.Namespace).Delete(context.WithoutCancel(t.Context()), running.Name, metav1.DeleteOptions{}); err != nil {
			t.Error(err)
		}
	})
	s = gatherer.Gather(t.Context())
	if at := slices.IndexFunc(s.Sessions, func(s view.Session) bool { return s.Role == arn("viewed") }); at < 0 || s.Sessions[at].RemainingSeconds < 60 || s.Sessions[at].Pods != 1 {
		t.Errorf("a viewer sees the sessions %+v, with the problems %q", s.Sessions, s.Problems)
	}
	if at := slices.IndexFunc(s.Pods, func(p view.Pod) bool { return p.Name == "credence-broker-1-viewed" }); at < 0 || s.Pods[at].Err != "" || s.Pods[at].Metrics["credence_broker_ready"] != 1 {
		t.Errorf("a viewer sees the pods %+v, with the problems %q", s.Pods, s.Problems)
	}

	own, err := credence.Token(t.Context(), pod, stack.Audience+"-commands", stack.TokenSeconds) // of another account
	if err != nil {
		t.Fatal(err)
	}
	good, err := commander.CommandToken(t.Context(), found)
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name, token string
		client      *installation.Client
		refused     bool
	}{
		{"a viewer without a token", "", viewer, true},
		{"a viewer with a token of a pod", own, viewer, true},
		{"a commander without a token", "", commander, true},
		{"a commander with a token", good, commander, false},
	} {
		brokers, err := tt.client.Brokers(t.Context(), stack.SystemNamespace)
		if err != nil || len(brokers) != 1 {
			t.Fatalf("%s finds %d brokers: %v", tt.name, len(brokers), err)
		}
		result, err := brokers[0].Post(t.Context(), debugapi.DropPath, arn("viewed"), tt.token)
		status, _ := errors.AsType[*installation.StatusError](err)
		if refused := status != nil && strings.Contains(err.Error(), "a command needs a token"); refused != tt.refused || !refused && (err != nil || result.Sessions != 1) {
			t.Errorf("%s drops %d sessions: %v", tt.name, result.Sessions, err)
		}
	}
}

// installPeople creates the objects for people, and the Deployments, of a chart with rbac.viewer.create until the test ends.
func installPeople(t *testing.T) {
	t.Helper()
	rendered, err := os.ReadFile("chart/testdata/everything.golden.yaml")
	if err != nil {
		t.Fatal(err)
	}
	objects, err := chart.Decode(rendered)
	if err != nil {
		t.Fatal(err)
	}
	core, rbac, apps, create := credence.Client.CoreV1(), credence.Client.RbacV1(), credence.Client.AppsV1(), metav1.CreateOptions{}
	created := 0
	for _, object := range objects {
		var err error
		switch o := object.(type) {
		case *corev1.ServiceAccount:
			if o.Name != commandAccount {
				continue
			}
			o.Namespace = stack.SystemNamespace
			_, err = core.ServiceAccounts(stack.SystemNamespace).Create(t.Context(), o, create)
		case *rbacv1.ClusterRole:
			if o.Name != "credence-viewer" {
				continue
			}
			_, err = rbac.ClusterRoles().Create(t.Context(), o, create)
		case *rbacv1.Role:
			if o.Name != "credence-viewer" && o.Name != commandAccount {
				continue
			}
			o.Namespace = stack.SystemNamespace
			_, err = rbac.Roles(stack.SystemNamespace).Create(t.Context(), o, create)
		case *appsv1.Deployment:
			// Nothing but their size and arguments is of interest. There are no nodes for their pods.
			o.Namespace, o.Spec.Paused = stack.SystemNamespace, true
			replicas := int32(2)
			o.Spec.Replicas = &replicas
			for n := range o.Spec.Template.Spec.Containers[0].Args {
				if arg := &o.Spec.Template.Spec.Containers[0].Args[n]; strings.HasPrefix(*arg, "--audience=") {
					*arg = "--audience=" + stack.Audience
				}
			}
			_, err = apps.Deployments(stack.SystemNamespace).Create(t.Context(), o, create)
			t.Cleanup(func() {
				_ = apps.Deployments(stack.SystemNamespace).Delete(context.WithoutCancel(t.Context()), o.Name, metav1.DeleteOptions{})
			})
		default:
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		created++
	}
	if created != 6 {
		t.Fatalf("created %d objects: the account, three roles and two Deployments are 6", created)
	}
}
