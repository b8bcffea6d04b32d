//go:build unix

package skew_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/credentials"
	"github.com/aws/aws-sdk-go-v2/credentials/endpointcreds"
	"github.com/aws/aws-sdk-go-v2/service/sts"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/yaml"

	"github.com/credence-iam/credence/integration/await"
	"github.com/credence-iam/credence/integration/process"
	"github.com/credence-iam/credence/integration/skew"
	"github.com/credence-iam/credence/integration/stack"
)

const roleKey = "iam.amazonaws.com/role"

// pod returns an annotated pod, as a user writes it. Its role has the pod's name. It uses what the parts tell each other: its
// sidecar adds the UID to the routing key, and the webhook writes a warning on it, for the broker.
func pod(name string) *corev1.Pod {
	p := stack.Pod(name, map[string]string{
		roleKey: name, "iam.amazonaws.com/session-scope": "pod", "iam.amazonaws.com/session-tags": "team=shop",
		"iam.amazonaws.com/region": stack.Region, "iam.amazonaws.com/imds": "v1", "iam.amazonaws.com/start-timeout": "30s",
	})
	p.TypeMeta = metav1.TypeMeta{APIVersion: "v1", Kind: "Pod"}
	p.Spec.Containers = append(p.Spec.Containers, corev1.Container{
		Name: "legacy", Image: "app:1", Env: []corev1.EnvVar{{Name: "AWS_ACCESS_KEY_ID", Value: "x"}},
	})
	return p
}

// namespace makes an opted-in namespace that permits all that pods request.
func namespace(t *testing.T, name string) string {
	t.Helper()
	if err := credence.Namespace(t.Context(), name, map[string]string{
		"iam.amazonaws.com/permitted": ".*", "iam.amazonaws.com/permitted-tags": "team",
	}); err != nil {
		t.Fatal(err)
	}
	return name
}

func dryRun(ctx context.Context, ns string, p *corev1.Pod) (*corev1.Pod, error) {
	return credence.Client.CoreV1().Pods(ns).Create(ctx, p, metav1.CreateOptions{DryRun: []string{metav1.DryRunAll}})
}

// origin is the version of what injected a pod, and that of its sidecar's image.
type origin struct{ injector, image version }

// originOf returns the origin of an injected pod.
func originOf(p *corev1.Pod) (o origin, err error) {
	if len(p.Spec.InitContainers) != 1 || p.Spec.InitContainers[0].Name != stack.SidecarName || p.Labels["iam.amazonaws.com/injected"] != "true" {
		return o, fmt.Errorf("pod %s has init containers %v and labels %v, want those of an injected pod", p.Name, p.Spec.InitContainers, p.Labels)
	}
	sidecar := p.Spec.InitContainers[0]
	for _, v := range versions {
		if sidecar.Resources.Limits.Memory().String() == v.memory {
			o.injector = v
		}
		if sidecar.Image == v.image() {
			o.image = v
		}
	}
	if o.injector.name == "" || o.image.name == "" {
		return o, fmt.Errorf("pod %s has a sidecar of neither version, with image %s", p.Name, sidecar.Image)
	}
	return o, nil
}

// pods are the pods that were injected in the states of a tour.
type pods struct {
	world     *world
	namespace string
	manifests map[string]*corev1.Pod // of "credence inject", by name
	restarted []*corev1.Pod          // each check starts their sidecars again
	lasting   []*lasting             // their sidecars run until the end
	names     map[string]bool
	called    map[version]bool // has a caller
}

// lasting is a pod whose application uses credentials all the time.
type lasting struct {
	pod     *corev1.Pod
	sidecar *stack.Sidecar
	caller  *process.Process
	keys    atomic.Int64 // distinct access keys
	stop    func()
	ended   sync.WaitGroup
}

// newPods injects manifests with "credence inject" of both versions, each with both images.
func newPods(t *testing.T, w *world) *pods {
	t.Helper()
	p := &pods{world: w, namespace: namespace(t, "pods"), manifests: map[string]*corev1.Pod{}, names: map[string]bool{}, called: map[version]bool{}}
	for n, v := range versions {
		for _, image := range versions {
			name := fmt.Sprintf("%s-command-%s-image", v.name, image.name)
			manifest, err := yaml.Marshal(pod(name))
			if err != nil {
				t.Fatal(err)
			}
			injected := w.inject(t, v, image, manifest)
			var decoded corev1.Pod
			// The command of the other version keeps the sidecar of this one, as its webhook does.
			for _, text := range [][]byte{w.inject(t, versions[1-n], versions[1-n], injected), injected} {
				decoded = corev1.Pod{}
				if err := yaml.UnmarshalStrict(text, &decoded); err != nil {
					t.Fatal(err)
				}
				if got, err := originOf(&decoded); err != nil || got != (origin{v, image}) {
					t.Fatalf("%s: got %v, %v", name, got, err)
				}
			}
			p.manifests[name] = &decoded
		}
	}
	return p
}

func (w *world) inject(t *testing.T, v, image version, manifest []byte) []byte {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), filepath.Join(v.programs, "credence"), append([]string{"inject"}, w.flags(v, image)...)...)
	var out, messages bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(manifest), &out, &messages
	if err := cmd.Run(); err != nil {
		t.Fatalf("credence inject of the %s version: %v\n%s", v.name, err, messages.String())
	}
	return out.Bytes()
}

// awaitWebhook waits until the API server calls the webhook of a state only. It keeps connections to the one before, which
// closes each after its next response.
func (p *pods) awaitWebhook(t *testing.T, now state) {
	t.Helper()
	want := origin{versions[now[webhookPart]], versions[now[imagePart]]}
	await.Until(t, "the API server calls "+now.String(), func() error {
		const burst = 4 // more than the connections of the load
		var results [burst]error
		var all sync.WaitGroup
		for n := range results {
			all.Go(func() {
				admitted, err := dryRun(t.Context(), p.namespace, pod("p"))
				if err != nil {
					results[n] = await.Never{Err: err}
				} else if got, err := originOf(admitted); err != nil {
					results[n] = await.Never{Err: err}
				} else if got != want {
					results[n] = fmt.Errorf("a pod has %v", got)
				}
			})
		}
		all.Wait()
		return errors.Join(results[:]...)
	})
}

// create creates pods in a state: one without a sidecar, and those of all manifests.
func (p *pods) create(t *testing.T, now state) {
	t.Helper()
	webhook, image := versions[now[webhookPart]], versions[now[imagePart]]
	p.admit(t, fmt.Sprintf("%s-webhook-%s-image", webhook.name, image.name), origin{webhook, image}, pod("cart"))
	for name, manifest := range p.manifests {
		o, err := originOf(manifest)
		if err != nil {
			t.Fatal(err)
		}
		p.admit(t, webhook.name+"-webhook-"+name, o, manifest)
	}
}

// admit creates a pod that is admitted with the sidecar of the origin. The first ones of a name stay.
func (p *pods) admit(t *testing.T, name string, want origin, pod *corev1.Pod) {
	t.Helper()
	admitted, err := dryRun(t.Context(), p.namespace, pod)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := originOf(admitted); err != nil || got != want {
		t.Fatalf("pod %s has %v, want %v; %v", name, got, want, err)
	}
	if p.names[name] {
		return
	}
	p.names[name] = true
	for _, kind := range []string{"restarted", "lasting"} {
		copied := pod.DeepCopy()
		copied.Name = name + "-" + kind
		if kind == "lasting" {
			copied.Annotations["iam.amazonaws.com/duration"] = "15m"
		}
		stored, err := credence.Client.CoreV1().Pods(p.namespace).Create(t.Context(), copied, metav1.CreateOptions{})
		if err != nil {
			t.Fatal(err)
		}
		if kind == "restarted" {
			p.restarted = append(p.restarted, stored)
		} else {
			p.last(t, stored)
		}
	}
}

// run runs the sidecar of a pod, in the version of its image.
func (p *pods) run(ctx context.Context, pod *corev1.Pod) (*stack.Sidecar, version, error) {
	o, err := originOf(pod)
	if err != nil {
		return nil, version{}, err
	}
	beside, err := credence.Beside(ctx, "", o.image.programs)
	if err != nil {
		return nil, version{}, err
	}
	sidecar, err := beside.RunSidecar(ctx, pod)
	return sidecar, o.image, err
}

// check runs a new sidecar of each restarted pod, as a kubelet does after the sidecar has failed, and uses its credentials.
func (p *pods) check(t *testing.T, when string) {
	t.Helper()
	if len(p.restarted) == 0 {
		t.Fatal("there are no pods")
	}
	var all sync.WaitGroup
	for _, pod := range p.restarted {
		all.Go(func() {
			sidecar, _, err := p.run(t.Context(), pod)
			if err != nil {
				t.Errorf("%s: %v", when, err)
				return
			}
			defer sidecar.Stop(10 * time.Second)
			if _, err := use(t.Context(), pod, sidecar, ""); err != nil {
				t.Errorf("%s: pod %s: %v", when, pod.Name, err)
			}
		})
	}
	all.Wait()
	for _, l := range p.lasting {
		if l.sidecar.Ended() {
			t.Errorf("%s: the sidecar of pod %s has ended: %v", when, l.pod.Name, l.sidecar.Err())
		}
	}
}

// last runs a pod until the end: its sidecar, its application, and a caller of the sidecar's version.
func (p *pods) last(t *testing.T, pod *corev1.Pod) {
	t.Helper()
	l := &lasting{pod: pod}
	sidecar, v, err := p.run(t.Context(), pod)
	if err != nil {
		t.Fatal(err)
	}
	l.sidecar = sidecar
	env, err := sidecar.Env(pod.Spec.InitContainers[0])
	if err != nil {
		t.Fatal(err)
	}
	if !p.called[v] {
		p.called[v] = true
		if l.caller, err = control.Run().Start(process.Command{Name: "caller-" + v.name, Path: filepath.Join(v.programs, skew.CallerProgram), Env: env}); err != nil {
			t.Fatal(err)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	l.stop = cancel
	l.ended.Go(func() {
		for key := ""; ctx.Err() == nil; time.Sleep(200 * time.Millisecond) {
			got, err := use(ctx, pod, sidecar, key)
			if err != nil && ctx.Err() == nil {
				t.Errorf("pod %s, which runs: %v", pod.Name, err)
				return
			}
			if got != key {
				l.keys.Add(1)
			}
			key = got
		}
	})
	p.lasting = append(p.lasting, l)
}

// direct opens a connection for each request. Servers close idle ones, which SDKs hide by another try, as they would hide
// failures that matter here.
var direct = &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}

// use gets credentials as an AWS SDK does, and calls STS with them if their access key is not the known one. It returns the
// key.
func use(ctx context.Context, pod *corev1.Pod, sidecar *stack.Sidecar, known string) (string, error) {
	env, err := sidecar.AppEnv()
	if err != nil {
		return "", err
	}
	variables := make(map[string]string)
	for _, e := range env {
		name, value, _ := strings.Cut(e, "=")
		variables[name] = value
	}
	got, err := endpointcreds.New(variables["AWS_CONTAINER_CREDENTIALS_FULL_URI"], func(o *endpointcreds.Options) {
		o.AuthorizationToken, o.Retryer, o.HTTPClient = variables["AWS_CONTAINER_AUTHORIZATION_TOKEN"], aws.NopRetryer{}, direct
	}).Retrieve(ctx)
	if err != nil || got.AccessKeyID == known {
		return known, err
	}
	identity, err := sts.New(sts.Options{
		Region: stack.Region, BaseEndpoint: new(credence.STS.URL()), Retryer: aws.NopRetryer{}, HTTPClient: direct,
		Credentials: credentials.NewStaticCredentialsProvider(got.AccessKeyID, got.SecretAccessKey, got.SessionToken),
	}).GetCallerIdentity(ctx, nil)
	if err != nil {
		return "", err
	}
	if want := ":assumed-role/" + pod.Annotations[roleKey] + "/"; !strings.Contains(aws.ToString(identity.Arn), want) {
		return "", fmt.Errorf("the credentials are those of %s, want %s", aws.ToString(identity.Arn), want)
	}
	return got.AccessKeyID, nil
}

// end waits until each lasting sidecar has renewed its credentials, and checks that nothing has failed.
func (p *pods) end(t *testing.T) {
	t.Helper()
	if len(p.restarted) != 12 || len(p.lasting) != 12 {
		t.Errorf("the tour made %d and %d pods, want 12", len(p.restarted), len(p.lasting))
	}
	callers := 0
	for _, l := range p.lasting {
		await.Until(t, "the sidecar of pod "+l.pod.Name+" renews", func() error {
			if t.Failed() {
				return await.Never{Err: errors.New("the test has failed")}
			}
			if n := l.keys.Load(); n < 2 {
				return fmt.Errorf("it has had %d sessions", n)
			}
			return nil
		})
	}
	for _, l := range p.lasting {
		l.stop()
		l.ended.Wait()
		if l.caller != nil {
			callers++
			l.caller.Stop(10 * time.Second)
			freeOfErrors(t, "the caller of the sidecar "+l.pod.Spec.InitContainers[0].Image, l.caller.Log())
			output, err := os.ReadFile(l.caller.Log())
			if err != nil || !bytes.Contains(output, []byte("calls ")) {
				t.Errorf("a caller output %q, %v", output, err)
			}
		}
		l.sidecar.Stop(10 * time.Second)
		freeOfErrors(t, "the sidecar of pod "+l.pod.Name, l.sidecar.Log())
	}
	if callers != 2 {
		t.Errorf("%d callers ran, want one of each version", callers)
	}
}

// load creates pods and opts namespaces in all the time.
type load struct {
	stop             func()
	ended            sync.WaitGroup
	pods, namespaces atomic.Int64
	roots            sync.Mutex // locked while a namespace waits for the roots, or while they change
}

func startLoad(t *testing.T, ns string) *load {
	t.Helper()
	l := &load{}
	ctx, cancel := context.WithCancel(t.Context())
	l.stop = cancel
	l.ended.Go(func() {
		for ; ctx.Err() == nil; time.Sleep(50 * time.Millisecond) {
			admitted, err := dryRun(ctx, ns, pod("load"))
			if err == nil {
				_, err = originOf(admitted)
			}
			if ctx.Err() == nil && err != nil {
				t.Errorf("creating pods all the time: %v", err)
				return
			}
			l.pods.Add(1)
		}
	})
	l.ended.Go(func() {
		for n := 0; ctx.Err() == nil; n++ {
			time.Sleep(200 * time.Millisecond)
			l.roots.Lock()
			err := credence.Namespace(ctx, fmt.Sprintf("load-%d", n), nil)
			l.roots.Unlock()
			if err != nil && ctx.Err() == nil {
				t.Errorf("opting namespaces in all the time: %v", err)
				return
			}
			l.namespaces.Add(1)
		}
	})
	return l
}

// check waits until some pods have been created since its call.
func (l *load) check(t *testing.T, when string) {
	t.Helper()
	before := l.pods.Load()
	await.Until(t, when+": pods are created", func() error {
		if t.Failed() {
			return await.Never{Err: errors.New("the test has failed")}
		}
		if n := l.pods.Load() - before; n < 3 {
			return fmt.Errorf("%d pods were created", n)
		}
		return nil
	})
}

func (l *load) end(t *testing.T) {
	t.Helper()
	l.stop()
	l.ended.Wait()
	t.Logf("%d pods were created and %d namespaces opted in during the tour", l.pods.Load(), l.namespaces.Load())
	if l.namespaces.Load() < 5 {
		t.Errorf("%d namespaces were opted in: too few to show anything", l.namespaces.Load())
	}
}
