// Package settingsfile reads the optional file with sidecar settings and follows it on disk: an [inject.Injector] uses a
// replaced file without a restart.
//
// It guarantees that an invalid or unreadable file changes nothing, see package configfile. Flags set the fields that the
// file lacks. Package inject defines what the settings mean.
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
	// Path is the file. It may be a symbolic link, or be reached through one that is swapped, as in a mounted ConfigMap.
	// Required.
	Path string
	// Injector uses the file. Its settings at the call of New apply to fields that the file lacks. Required.
	Injector *inject.Injector
	// Logger logs each new file and each new error, once. Required.
	Logger *slog.Logger
}

// New reads the file and applies it to the injector. Its error names the place in the file.
func New(cfg Config) (*configfile.Follower, error) {
	if cfg.Path == "" || cfg.Injector == nil || cfg.Logger == nil {
		return nil, errors.New("following a sidecar settings file: Path, Injector and Logger are required")
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
			OnLoad: func(digest string) { log.Info("Loaded the sidecar settings file", "digest", digest) },
			OnInvalid: func(digest string, err error) {
				log.Warn("Could not use the sidecar settings file, keeping the settings in force", "digest", digest, "error", err)
			},
			OnRecover: func(digest string) {
				log.Info("Recovered the sidecar settings file, which is again the one in force", "digest", digest)
			},
		},
	})
}

// Parse decodes the text of a file with sidecar settings, in YAML or JSON. base has the fields that the file lacks. Parse is
// strict, see [configfile.Decode], and returns errors of inject.Settings.Check with these annotation keys, too.
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
