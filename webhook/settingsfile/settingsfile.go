// Package settingsfile reads the optional file with settings of the sidecar and follows it on disk: it makes an
// [inject.Injector] inject by what the file says now, without a restart.
//
// It promises that a file which is wrong, or cannot be read, changes nothing: see package configfile. What the file
// does not say is as the flags said. It decides nothing by itself; what the settings mean is up to package inject.
package settingsfile

import (
	"errors"
	"log/slog"

	"github.com/credence-iam/credence/broker/configfile"
	"github.com/credence-iam/credence/broker/policy"
	"github.com/credence-iam/credence/webhook/inject"
)

// Config configures [New].
type Config struct {
	// Path is the file. It may be a symbolic link, or lie behind one that is swapped, as in a mounted
	// ConfigMap. Required.
	Path string
	// Injector injects by the file. The settings that it has when New is called are for what the file does not
	// say. Required.
	Injector *inject.Injector
	// Logger is told of each new file and of each new error, once. Required.
	Logger *slog.Logger
}

// New reads the file for the first time and has the injector inject by it. Its errors say what is wrong, and
// where in the file.
func New(cfg Config) (*configfile.Follower, error) {
	if cfg.Path == "" || cfg.Injector == nil || cfg.Logger == nil {
		return nil, errors.New("following a sidecar settings file: needs a Path, an Injector and a Logger")
	}
	base := cfg.Injector.Settings()
	log := cfg.Logger.With("file", cfg.Path)
	return configfile.New(configfile.Config{
		Path: cfg.Path, Name: "sidecar settings file",
		Use: func(text []byte) error {
			settings, err := Parse(text, base, cfg.Injector.Keys())
			if err != nil {
				return err
			}
			return cfg.Injector.Use(settings)
		},
		Hooks: configfile.Hooks{
			OnLoad: func(digest string) { log.Info("Sidecar settings file loaded", "digest", digest) },
			OnInvalid: func(digest string, err error) {
				log.Warn("Keeping the sidecar settings as they were: the sidecar settings file cannot be used", "digest", digest, "error", err)
			},
			OnRecover: func(digest string) { log.Info("The sidecar settings file is again as it was loaded", "digest", digest) },
		},
	})
}

// Parse reads the text of a file with settings, in YAML or JSON, and checks it for those annotation keys. What it does not
// say is as in base. It is strict: see [configfile.Decode]; and whatever inject.Settings.Check refuses is an error, too.
func Parse(text []byte, base inject.Settings, keys policy.Keys) (inject.Settings, error) {
	settings := base
	if err := configfile.Decode(text, &settings); err != nil {
		return inject.Settings{}, err
	}
	if err := settings.Check(keys); err != nil {
		return inject.Settings{}, err
	}
	return settings, nil
}
