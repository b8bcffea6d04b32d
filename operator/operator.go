// Package operator is what the credence command does, for those who write manifests and those who run a
// cluster: so far [Inject], which does to files what the webhook does to pods.
//
// It promises that
//   - it comes to the webhook's results, because it decides by the webhook's own code, and checks of all that
//     it writes that the webhook would add nothing to it;
//   - what it does not add to comes out byte for byte as it came in, and to the rest it adds lines: comments,
//     order, numbers and quotes stay as somebody wrote them;
//   - it writes all or nothing: when one document is refused, no other is written.
//
// It asks no cluster. What it is not told of namespaces it does not judge, and says so.
package operator

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"unicode/utf8"

	"github.com/credence-iam/credence/broker/policy"
	"github.com/credence-iam/credence/broker/rulesfile"
	"github.com/credence-iam/credence/webhook/inject"
	"github.com/credence-iam/credence/webhook/settingsfile"
)

// InjectConfig configures [Inject].
type InjectConfig struct {
	// Files are read in this order; - is Stdin. Required.
	Files []string
	// Namespace is that of documents that name none. Empty: it is not known.
	Namespace string
	// NamespacesFile has Namespace documents, besides those in Files, which count more. Empty: there is none.
	NamespacesFile string
	// Injector injects. Required.
	Injector *inject.Injector
	// Rules judge, with the keys of Injector. Required.
	Rules *policy.Rules
	// RulesFile is loaded into Rules. Empty: there is none.
	RulesFile string
	// SettingsFile is loaded into Injector. Empty: there is none.
	SettingsFile string
	// Diff asks for the difference between the files and what would become of them, instead of the latter.
	Diff bool

	Stdin          io.Reader // read for the file -
	Stdout, Stderr io.Writer // what was made; and what is to be said of it, a line each
}

// Inject reads files, injects the pods and the templates of pods that they hold, and writes what has come of it.
// Refusals are written to Stderr, and make it fail without any output.
func Inject(ctx context.Context, cfg InjectConfig) error {
	if cfg.RulesFile != "" {
		_, err := rulesfile.New(rulesfile.Config{Path: cfg.RulesFile, Rules: cfg.Rules, Logger: slog.New(slog.DiscardHandler)})
		if err != nil {
			return fmt.Errorf("--rules-file: %w", err)
		}
	}
	if cfg.SettingsFile != "" {
		_, err := settingsfile.New(settingsfile.Config{Path: cfg.SettingsFile, Injector: cfg.Injector, Logger: slog.New(slog.DiscardHandler)})
		if err != nil {
			return fmt.Errorf("--sidecar-settings-file: %w", err)
		}
	}
	in := injection{injector: cfg.Injector, rules: cfg.Rules, namespace: cfg.Namespace, namespaces: map[string]policy.Namespace{}}
	left := int64(maxSize)
	read := func(name string) ([]*document, error) {
		text, err := readFile(ctx, name, cfg.Stdin, left)
		if err != nil {
			return nil, err
		}
		left -= int64(len(text))
		return parseDocuments(ctx, shown(name), text)
	}
	if cfg.NamespacesFile != "" {
		documents, err := read(cfg.NamespacesFile)
		if err == nil {
			err = in.learn(ctx, documents)
		}
		if err == nil && len(in.namespaces) == 0 {
			err = fmt.Errorf("%s holds no Namespace", cfg.NamespacesFile)
		}
		if err != nil {
			return fmt.Errorf("--namespaces: %w", err)
		}
	}
	files := make([][]*document, len(cfg.Files))
	for i, name := range cfg.Files {
		var err error
		if files[i], err = read(name); err == nil {
			err = in.learn(ctx, files[i])
		}
		if err != nil {
			return err
		}
	}

	var out bytes.Buffer
	total, refused := 0, 0
	for _, documents := range files {
		var before, after bytes.Buffer
		var edits []edit
		for _, d := range documents {
			if err := ctx.Err(); err != nil {
				return err
			}
			result, err := in.document(ctx, d)
			if err != nil {
				return err
			}
			for _, line := range result.said {
				_, _ = fmt.Fprintln(cfg.Stderr, line) // where nobody listens, nobody is to be told
			}
			if d.root != nil {
				total++
			}
			if result.refused {
				refused++
			}
			for _, e := range result.edits {
				edits = append(edits, edit{e.start + before.Len(), e.end + before.Len(), e.text})
			}
			before.Write(d.text)
			after.Write(apply(d.text, result.edits))
		}
		if cfg.Diff {
			if len(documents) > 0 {
				writeDiff(&out, documents[0].file, before.Bytes(), edits)
			}
			continue
		}
		join(&out, after.Bytes())
	}
	if refused > 0 {
		return fmt.Errorf("%d of %d documents refused: nothing is written", refused, total)
	}
	if _, err := cfg.Stdout.Write(out.Bytes()); err != nil {
		return fmt.Errorf("writing what was made: %w", err)
	}
	return nil
}

// join writes the text of one more file, as documents of their own.
func join(out *bytes.Buffer, text []byte) {
	if written := out.Bytes(); len(written) > 0 && len(text) > 0 {
		if written[len(written)-1] != '\n' {
			out.WriteByte('\n')
		}
		if !marks(text, "---") {
			out.WriteString("---\n")
		}
	}
	out.Write(text)
}

// shown is how messages name a file.
func shown(name string) string {
	if name == "-" {
		return "standard input"
	}
	return name
}

// readFile reads a file, or all of stdin, of at most limit bytes. It waits no longer than ctx lasts: nobody may
// ever write to a terminal or a pipe.
func readFile(ctx context.Context, name string, stdin io.Reader, limit int64) ([]byte, error) {
	type result struct {
		text []byte
		err  error
	}
	done := make(chan result, 1)
	go func() { // it ends with the process, should ctx end first
		reader := stdin
		if name != "-" {
			file, err := os.Open(name) //nolint:gosec // G304: whoever runs the command names this file
			if err != nil {
				done <- result{err: err}
				return
			}
			defer file.Close()
			reader = file
		}
		text, err := io.ReadAll(io.LimitReader(reader, limit+1))
		done <- result{text, err}
	}()
	select {
	case <-ctx.Done():
		return nil, fmt.Errorf("reading %s: %w", shown(name), context.Cause(ctx))
	case r := <-done:
		switch {
		case r.err != nil:
			return nil, r.err
		case int64(len(r.text)) > limit:
			return nil, fmt.Errorf("%s: the input is longer than %d MiB, far more than the manifests of a cluster", shown(name), maxSize>>20)
		case !utf8.Valid(r.text):
			return nil, errors.New(shown(name) + " is not UTF-8 text")
		}
		return r.text, nil
	}
}
