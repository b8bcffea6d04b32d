//go:build unix

package admission

import (
	"context"
	"fmt"
	"os"
	"regexp"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
	"sigs.k8s.io/yaml"

	"github.com/credence-iam/credence/integration/await"
)

// TestWhoMayPermit applies the manifests of docs/annotations.md as they are, and tests what they allow to whom.
func TestWhoMayPermit(t *testing.T) {
	text, err := os.ReadFile("../../../docs/annotations.md")
	if err != nil {
		t.Fatal(err)
	}
	_, section, _ := strings.Cut(string(text), "\n## Who may permit roles\n")
	section, _, _ = strings.Cut(section, "\n## ")
	blocks := regexp.MustCompile("(?s)```yaml\n(.*?)```").FindAllStringSubmatch(section, -1)
	if len(blocks) != 2 {
		t.Fatalf("the section has %d manifests, want the roles and the policy", len(blocks))
	}
	for _, name := range []string{"team-a", "team-b"} {
		if _, err := client.CoreV1().Namespaces().Create(t.Context(), &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name}}, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	patch := func(who kubernetes.Interface, namespace, metadata string) error {
		_, err := who.CoreV1().Namespaces().Patch(t.Context(), namespace, types.MergePatchType, []byte(`{"metadata":`+metadata+`}`), metav1.PatchOptions{})
		return err
	}
	as := func(name string, groups ...string) kubernetes.Interface {
		config, err := control.User(name, groups...)
		if err != nil {
			t.Fatal(err)
		}
		who, err := kubernetes.NewForConfig(config)
		if err != nil {
			t.Fatal(err)
		}
		return who
	}
	const permit = `{"annotations":{"iam.amazonaws.com/permitted":".*"}}`

	applyAll(t, blocks[0][1])
	permitter, other := as("ann", "cloud-team"), as("bob")
	await.Until(t, "cloud-team may permit in team-a", func() error { return patch(permitter, "team-a", permit) })
	if err := patch(permitter, "team-b", permit); !apierrors.IsForbidden(err) {
		t.Errorf("cloud-team in team-b: got %v", err)
	}
	// The ClusterRole admin of Kubernetes does not let a team permit roles to itself.
	applyAll(t, `{apiVersion: rbac.authorization.k8s.io/v1, kind: RoleBinding, metadata: {name: admin, namespace: team-a},
  subjects: [{kind: User, name: bob, apiGroup: rbac.authorization.k8s.io}],
  roleRef: {kind: ClusterRole, name: admin, apiGroup: rbac.authorization.k8s.io}}`)
	await.Until(t, "the admin of team-a has its rights", func() error {
		_, err := other.CoreV1().Pods("team-a").List(t.Context(), metav1.ListOptions{})
		return err
	})
	if err := patch(other, "team-a", permit); !apierrors.IsForbidden(err) {
		t.Errorf("an admin of team-a permits a role: got %v", err)
	}

	// With the policy, the right to update namespaces is not the right to permit roles.
	applyAll(t, blocks[1][1])
	t.Cleanup(func() {
		if err := client.AdmissionregistrationV1().ValidatingAdmissionPolicyBindings().Delete(context.WithoutCancel(t.Context()), "credence-permit", metav1.DeleteOptions{}); err != nil {
			t.Error(err)
		}
	})
	tries := 0
	await.Until(t, "the policy refuses cloud-team", func() error {
		tries++ // each time another value, because an equal one is no change
		err := patch(permitter, "team-a", fmt.Sprintf(`{"annotations":{"iam.amazonaws.com/permitted":"x%d"}}`, tries))
		if err == nil || !strings.Contains(err.Error(), "the verb permit") {
			return fmt.Errorf("got %w", err)
		}
		return nil
	})
	for _, metadata := range []string{
		`{"annotations":{"iam.amazonaws.com/permitted":null}}`,
		`{"annotations":null}`,
		`{"annotations":{"iam.amazonaws.com/allowed-roles":"[]"}}`,
		`{"annotations":{"iam.amazonaws.com/default-role":"x"}}`,
		`{"annotations":{"iam.amazonaws.com/permitted-tags":"x"}}`,
		`{"labels":{"iam.amazonaws.com/inject":"enabled"}}`,
	} {
		if err := patch(permitter, "team-a", metadata); err == nil || !strings.Contains(err.Error(), "the verb permit") {
			t.Errorf("%s: got %v", metadata, err)
		}
	}
	if err := patch(permitter, "team-a", `{"annotations":{"example.com/note":"x"}}`); err != nil {
		t.Errorf("another annotation: %v", err)
	}
	admins := as("eve", "cloud-admins")
	for _, metadata := range []string{permit, `{"labels":{"iam.amazonaws.com/inject":"enabled"}}`} {
		await.Until(t, "cloud-admins may write "+metadata, func() error { return patch(admins, "team-b", metadata) })
	}
}

// applyAll applies manifests.
func applyAll(t *testing.T, manifests string) {
	t.Helper()
	for manifest := range strings.SplitSeq(manifests, "\n---\n") {
		var object unstructured.Unstructured
		if err := yaml.Unmarshal([]byte(manifest), &object.Object); err != nil {
			t.Fatalf("%v in\n%s", err, manifest)
		}
		if err := apply(t, &object); err != nil {
			t.Fatal(err)
		}
	}
}

// apply applies an object. Unknown fields are an error.
func apply(t *testing.T, object runtime.Object, dryRun ...string) error {
	t.Helper()
	kind := object.GetObjectKind().GroupVersionKind()
	resource, _ := meta.UnsafeGuessKindToResource(kind)
	m := object.(metav1.Object)
	_, err := objects.Resource(resource).Namespace(m.GetNamespace()).Patch(t.Context(), m.GetName(), types.ApplyPatchType, encode(t, object), metav1.PatchOptions{
		DryRun: dryRun, FieldManager: "test", FieldValidation: metav1.FieldValidationStrict,
	})
	if err != nil {
		return fmt.Errorf("%s %s: %w", kind.Kind, m.GetName(), err)
	}
	return nil
}
