package explain

import (
	"strings"

	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/operator/snapshot"
)

// sidecarState is what the sidecar said last.
type sidecarState struct {
	// session is the line about the current session; zero if it has none, or did not log it.
	session snapshot.LogLine
	// failure is why it has no new session; zero if the last attempt succeeded.
	failure snapshot.LogLine
}

// sidecarState returns the state by the log. Without a log it takes the newest Event of the broker about the pod.
func (s subject) sidecarState() (state sidecarState) {
	for _, l := range s.Log {
		switch {
		case l.AccessKeyID != "" && l.Reason == "":
			state = sidecarState{session: l}
		case l.Reason == "", l.Level == "WARN" && l.Error == "": // about something else
		case l.Level == "WARN": // It serves the current session.
			state.failure = l
			if state.session.Expiration.IsZero() {
				state.session.Expiration = l.Expiration
			}
		default:
			state = sidecarState{failure: l}
		}
	}
	if s.Log == nil {
		if m, ok := s.message(func(m snapshot.Message) bool { return m.Reason == "CredentialsRefused" }); ok {
			reason, text, _ := strings.Cut(m.Text, ": ")
			state.failure = snapshot.LogLine{Time: m.Time, Reason: credential.Reason(reason), Error: text}
		}
	}
	return state
}

// hasCredentials reports whether the pod's containers get credentials now, as far as that is known.
func (s subject) hasCredentials() bool {
	status := s.SidecarStatus()
	if status == nil || status.State.Running == nil {
		return false
	}
	switch state := s.sidecarState(); {
	case !state.session.Expiration.IsZero():
		return s.Now.Before(state.session.Expiration)
	case state.failure.Reason != "":
		return false
	}
	// It logs nothing at level warn, or the user may not read the log. The startup probe passes with the first session.
	return status.Started != nil && *status.Started
}
