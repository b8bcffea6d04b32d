// Package rulesfile reads the optional rules file and follows it on disk: [policy.Rules] decides by a replaced file without
// a restart. The broker, the webhook and the operator's command read the same file.
//
// It guarantees that an invalid or unreadable file changes nothing, see package configfile. It decides nothing: package
// policy does.
package rulesfile

import (
	"errors"
	"log/slog"

	"github.com/credence-iam/credence/broker/configfile"
	"github.com/credence-iam/credence/broker/policy"
)

// Config configures [New].
type Config struct {
	// Path is the file. It may be a symbolic link, or be reached through one that is swapped, as in a mounted ConfigMap.
	// Required.
	Path string
	// Rules apply the file. Required.
	Rules *policy.Rules
	// OnChange is called by Run after the rules have changed, so earlier decisions may be outdated. It must not block. It
	// may be nil.
	OnChange func()
	// Logger logs each new file and each new error, once. Required.
	Logger *slog.Logger
}

// Follower follows one file.
type Follower = configfile.Follower

const name = "rules file"

// New reads the file and applies it to the rules. Its error names the place in the file.
func New(cfg Config) (*Follower, error) {
	if cfg.Path == "" || cfg.Rules == nil || cfg.Logger == nil {
		return nil, errors.New("following a rules file: Path, Rules and Logger are required")
	}
	log, entries := cfg.Logger.With("file", cfg.Path), 0
	return configfile.New(configfile.Config{
		Path: cfg.Path, Name: name, OnChange: cfg.OnChange,
		Use: func(text []byte) error {
			file, err := Parse(text)
			if err != nil {
				return err
			}
			entries = len(file.Namespaces)
			return cfg.Rules.Use(file)
		},
		Hooks: configfile.Hooks{
			OnLoad: func(digest string) { log.Info("Loaded the rules file", "digest", digest, "entries", entries) },
			OnInvalid: func(digest string, err error) {
				log.Warn("Could not use the rules file, keeping the rules in force", "digest", digest, "error", err)
			},
			OnRecover: func(digest string) {
				log.Info("Recovered the rules file, which is again the one in force", "digest", digest)
			},
		},
	})
}

// Check returns the error that [New] would return for the file.
func Check(path string) error {
	return configfile.Check(path, name, func(text []byte) error {
		_, err := Parse(text)
		return err
	})
}

// Parse decodes the text of a rules file, in YAML or JSON. It is strict, see [configfile.Decode], and returns errors of
// policy.File.Check, too.
func Parse(text []byte) (policy.File, error) {
	var file policy.File
	if err := configfile.Decode(text, &file); err != nil {
		return policy.File{}, err
	}
	if err := file.Check(); err != nil {
		return policy.File{}, err
	}
	return file, nil
}
