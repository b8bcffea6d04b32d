package main

import (
	"flag"

	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/broker/policy"
	"github.com/credence-iam/credence/broker/rulesfile"
	"github.com/credence-iam/credence/cmd/internal/injectflags"
	"github.com/credence-iam/credence/operator/installation"
	"github.com/credence-iam/credence/operator/snapshot"
	"github.com/credence-iam/credence/webhook/settingsfile"
)

// judgeOf returns what decides as the webhook of the cluster does. If the webhook's arguments are not known, or this version
// of the command does not understand them, it decides on roles only, by the default keys and without a rules file.
func judgeOf(found *installation.Installation) snapshot.Judge {
	if found == nil {
		return snapshot.Judge{}
	}
	file, invalid := policy.File{}, error(nil)
	if found.Rules != "" {
		file, invalid = rulesfile.Parse([]byte(found.Rules))
	}
	options := func(base credential.RoleBase) (injectflags.Options, bool) {
		f := flag.NewFlagSet("", flag.ContinueOnError)
		finish := injectflags.Define(f)
		values, _ := injectflags.OfWebhook(f, found.WebhookArgs()) // A newer webhook may have flags that are not known here.
		if !base.IsZero() {
			values["base-arn"] = base.String()
		}
		for name, value := range values {
			if f.Set(name, value) != nil {
				return injectflags.Options{}, false
			}
		}
		o, err := finish()
		if err != nil {
			return o, false
		}
		if found.Rules != "" && invalid == nil {
			invalid = o.Rules.Use(file)
		}
		if settings, err := settingsfile.Parse([]byte(found.Settings), o.Injector.Settings(), o.Rules.Keys()); err == nil {
			_ = o.Injector.Use(settings) // Parse has checked it. The webhook keeps its last settings, too.
		}
		return o, true
	}
	o, ok := options(credential.RoleBase{})
	if !ok {
		return snapshot.Judge{Rules: defaultRules(credential.RoleBase{}), Rebase: defaultRules}
	}
	return snapshot.Judge{Injector: o.Injector, Rules: o.Rules, RulesErr: invalid, Rebase: func(base credential.RoleBase) *policy.Rules {
		if rebased, ok := options(base); ok {
			return rebased.Rules
		}
		return o.Rules
	}}
}

// defaultRules returns the rules of a webhook without arguments.
func defaultRules(base credential.RoleBase) *policy.Rules {
	keys, err := policy.NewKeys(policy.DefaultPrefix)
	if err != nil {
		return nil
	}
	rules, err := policy.New(policy.Config{Keys: keys, Base: base})
	if err != nil {
		return nil
	}
	return rules
}
