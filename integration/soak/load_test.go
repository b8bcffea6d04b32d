//go:build linux

package soak

import (
	"cmp"
	"context"
	_ "embed" // for the program in Python
	"fmt"
	"os"
	"strconv"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/credence-iam/credence/integration/await"
	"github.com/credence-iam/credence/integration/deployment"
)

//go:embed testdata/load.py
var loadPy string

const (
	loadNamespace = "load"
	sidecarName   = "credence-sidecar"
	prefix        = "iam.amazonaws.com/"
	usual         = time.Hour // the default session duration
)

// clients are the applications that run all the time, each as a pod of its own role.
var clients = []struct {
	name, about, node string
	session           func() time.Duration
	script            []string // arguments of load.py; nil: the program sdk
}{
	{"go-1", "SDK for Go v2, twice a second", "node1", func() time.Duration { return session }, nil},
	{"go-2", "SDK for Go v2, twice a second", "node2", func() time.Duration { return session }, nil},
	{"botocore", "botocore, once a second, with a session of an hour", "node1", func() time.Duration { return usual }, []string{"kept", "1"}},
	{"cli", "botocore, every 5 seconds with a new client, as in each start of the AWS CLI", "node2", func() time.Duration { return session }, []string{"new", "5"}},
}

// startLoad starts the recorder, the applications, and the creation of new pods. All end with ctx.
func startLoad(ctx context.Context) error {
	seen = newRecorder()
	go seen.run(ctx)
	if _, err := d.Client.CoreV1().Namespaces().Create(ctx, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{
		Name: loadNamespace, Labels: map[string]string{prefix + "inject": "enabled"}, Annotations: map[string]string{prefix + "permitted": ".*"},
	}}, metav1.CreateOptions{}); err != nil {
		return err
	}
	if err := await.Poll(ctx, func() error {
		_, err := d.Client.CoreV1().ServiceAccounts(loadNamespace).Get(ctx, "default", metav1.GetOptions{})
		return err
	}); err != nil {
		return err
	}
	for _, c := range clients {
		pod := pod(c.name, c.name, c.session())
		pod.Labels = map[string]string{"load": "true"}
		pod.Spec.NodeSelector = map[string]string{corev1.LabelHostname: c.node}
		pod.Spec.Containers[0].Image = sdkImage
		if c.script != nil {
			runOnNode(pod, append([]string{"/usr/bin/python3", "-c", loadPy}, c.script...))
		}
		if _, err := d.Client.CoreV1().Pods(loadNamespace).Create(ctx, pod, metav1.CreateOptions{}); err != nil {
			return err
		}
	}
	if err := await.Poll(ctx, func() error {
		for _, c := range clients {
			if seen.callsOf(c.name) == 0 {
				return fmt.Errorf("application %s has made no calls: %v", c.name, seen.failures(time.Time{}, time.Now()))
			}
		}
		return nil
	}); err != nil {
		return err
	}
	go create(ctx, known)
	go create(ctx, fresh)
	return nil
}

// pod returns a pod with one container.
func pod(name, role string, duration time.Duration) *corev1.Pod {
	return &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: name, Annotations: map[string]string{
			prefix + "role": role, prefix + "duration": strconv.Itoa(int(duration.Minutes())) + "m",
		}},
		Spec: corev1.PodSpec{
			TerminationGracePeriodSeconds: new(int64(1)),
			Containers:                    []corev1.Container{{Name: "app", ImagePullPolicy: corev1.PullNever, Env: d.AppEnv()}},
		},
	}
}

// runOnNode makes the pod's container run a program of its node.
func runOnNode(pod *corev1.Pod, command []string) {
	pod.Spec.Volumes = []corev1.Volume{{Name: "node", VolumeSource: corev1.VolumeSource{HostPath: &corev1.HostPathVolumeSource{Path: "/"}}}}
	c := &pod.Spec.Containers[0]
	c.Image, c.Args = chrootImage, append([]string{"/node"}, command...)
	c.SecurityContext = &corev1.SecurityContext{RunAsUser: new(int64(0))} // for chroot
	c.VolumeMounts = []corev1.VolumeMount{{Name: "node", MountPath: "/node", ReadOnly: true}}
	c.Env = append(c.Env, corev1.EnvVar{Name: "AWS_CONFIG_FILE", Value: os.DevNull}, corev1.EnvVar{Name: "AWS_SHARED_CREDENTIALS_FILE", Value: os.DevNull})
}

// Kinds of new pods.
const (
	known = "known" // its role is that of a running pod, so brokers have its session
	fresh = "new"   // no pod had its role before
)

// create creates pods of a kind, one after the other, until ctx ends. Each runs one call and ends.
func create(ctx context.Context, kind string) {
	for n := 0; ctx.Err() == nil; n++ {
		role := clients[0].name
		if kind == fresh {
			role = "role-" + strconv.Itoa(n)
		}
		p := pod(kind+"-"+strconv.Itoa(n), role, session)
		p.Annotations[prefix+"start-timeout"] = "0" // otherwise a long wait would be a failed call
		p.Spec.RestartPolicy = corev1.RestartPolicyNever
		p.Spec.Containers[0].Image, p.Spec.Containers[0].Args = deployment.AppImage, []string{"whoami"}
		w := wait{kind: kind, began: time.Now()}
		seen.begin(&w)
		for ctx.Err() == nil {
			problem := lifetime(ctx, p)
			if problem == "" {
				break
			}
			seen.add(&w, problem)
			pause(ctx, time.Second)
		}
		seen.end(&w)
		pause(ctx, 4*time.Second)
	}
}

// lifetime creates the pod, waits until it has succeeded, and deletes it. It returns why another one must be created.
func lifetime(ctx context.Context, p *corev1.Pod) (problem string) {
	pods := d.Client.CoreV1().Pods(loadNamespace)
	stored, err := pods.Create(ctx, p, metav1.CreateOptions{})
	switch {
	case apierrors.IsAlreadyExists(err): // the response was lost
		stored = p
	case apierrors.ReasonForError(err) != metav1.StatusReasonUnknown:
		return "refused: " + err.Error()
	case err != nil:
		return "no API server"
	case len(stored.Spec.InitContainers) == 0:
		problem = "admitted without a sidecar"
	}
	for problem == "" && ctx.Err() == nil {
		pause(ctx, 250*time.Millisecond)
		now, err := pods.Get(ctx, p.Name, metav1.GetOptions{})
		switch {
		case apierrors.IsNotFound(err):
			return "deleted"
		case err != nil:
			continue
		case now.Status.Phase == corev1.PodSucceeded:
			_ = pods.Delete(ctx, p.Name, metav1.DeleteOptions{})
			return ""
		case now.Status.Phase == corev1.PodFailed:
			problem = "failed: " + cmp.Or(now.Status.Reason, seen.lastLine(p.Name), "exit")
		}
	}
	_ = pods.Delete(ctx, p.Name, metav1.DeleteOptions{GracePeriodSeconds: new(int64(0))})
	return problem
}

func pause(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}
