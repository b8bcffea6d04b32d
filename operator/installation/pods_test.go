package installation_test

import (
	"testing"

	corev1 "k8s.io/api/core/v1"

	"github.com/credence-iam/credence/operator/installation"
)

func TestTrouble(t *testing.T) {
	ended := &corev1.ContainerStateTerminated{ExitCode: 2, Reason: "Error", Message: "no config"}
	container := func(state, last corev1.ContainerState) corev1.PodStatus {
		return corev1.PodStatus{ContainerStatuses: []corev1.ContainerStatus{{Name: "broker", State: state, LastTerminationState: last}}}
	}
	waiting := func(reason, message string) corev1.ContainerState {
		return corev1.ContainerState{Waiting: &corev1.ContainerStateWaiting{Reason: reason, Message: message}}
	}
	for want, status := range map[string]corev1.PodStatus{
		"": {Phase: corev1.PodRunning},
		"container broker waits with ImagePullBackOff: no such image":                                       container(waiting("ImagePullBackOff", "no such image"), corev1.ContainerState{}),
		"container broker waits with CrashLoopBackOff: back-off 5m0s; it ended with exit code 2: no config": container(waiting("CrashLoopBackOff", "back-off 5m0s"), corev1.ContainerState{Terminated: ended}),
		"container broker does not run: it ended with exit code 137: OOMKilled":                             container(corev1.ContainerState{Terminated: &corev1.ContainerStateTerminated{ExitCode: 137, Reason: "OOMKilled"}}, corev1.ContainerState{}),
		"it is not scheduled: 0/3 nodes are available":                                                      {Conditions: []corev1.PodCondition{{Type: corev1.PodScheduled, Status: corev1.ConditionFalse, Message: "0/3 nodes are available"}}},
	} {
		if got := installation.Trouble(&corev1.Pod{Status: status}); got != want {
			t.Errorf("trouble is %q, want %q", got, want)
		}
	}
	if got := installation.Trouble(&corev1.Pod{Status: container(waiting("ContainerCreating", ""), corev1.ContainerState{})}); got != "" {
		t.Errorf("a pod that starts has the trouble %q", got)
	}
}

func TestPort(t *testing.T) {
	for arg, want := range map[string]int{"": 9443, "--listen=:1": 1, "--listen=127.0.0.1:2": 2, "--listen=[::1]:3": 3, "--listen=": 0, "--listen=x": 0, "--listen=:https": 0, "--listener=:4": 9443} {
		if got := installation.Port([]string{"--a=:5", arg}, "listen", 9443); got != want {
			t.Errorf("%s: port %d, want %d", arg, got, want)
		}
	}
}
