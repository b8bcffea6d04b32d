// Package rulesfile reads the optional rules file and follows it on disk: it makes [policy.Rules]
// decide by what the file says now, without a restart.
//
// It promises that a file which is wrong, or cannot be read, changes nothing: see package configfile. It decides
// nothing by itself; what the file means is up to package policy.
package rulesfile

import (
	"errors"
	"log/slog"

	"github.com/credence-iam/credence/broker/configfile"
	"github.com/credence-iam/credence/broker/policy"
)

// Interval is how often the file is looked at.
const Interval = configfile.Interval

// Config configures [New].
type Config struct {
	// Path is the file. It may be a symbolic link, or lie behind one that is swapped, as in a mounted
	// ConfigMap. Required.
	Path string
	// Rules decide by the file. Required.
	Rules *policy.Rules
	// OnChange is called after the rules have changed, by Run: what was decided before may be decided
	// differently now. It must not block. Default: nobody is told.
	OnChange func()
	// Logger is told of each new file and of each new error, once. Required.
	Logger *slog.Logger
}

// Follower follows one file.
type Follower = configfile.Follower

const name = "rules file"

// New reads the file for the first time and has the rules decide by it. Its errors say what is wrong, and
// where in the file.
func New(cfg Config) (*Follower, error) {
	if cfg.Path == "" || cfg.Rules == nil || cfg.Logger == nil {
		return nil, errors.New("following a rules file: needs a Path, Rules and a Logger")
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
			OnLoad: func(digest string) { log.Info("Rules file loaded", "digest", digest, "entries", entries) },
			OnInvalid: func(digest string, err error) {
				log.Warn("Keeping the rules as they were: the rules file cannot be used", "digest", digest, "error", err)
			},
			OnRecover: func(digest string) { log.Info("The rules file is again as it was loaded", "digest", digest) },
		},
	})
}

// Check returns the error for which [New] would refuse the file.
func Check(path string) error {
	return configfile.Check(path, name, func(text []byte) error {
		_, err := Parse(text)
		return err
	})
}

// Parse reads the text of a rules file, in YAML or JSON, and checks it. It is strict: see [configfile.Decode]; and
// whatever policy.File.Check refuses is an error, too.
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
