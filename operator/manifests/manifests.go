// Package manifests changes files as the webhook changes pods at their creation. It guarantees:
//   - the webhook's result, because it runs the webhook's code and checks that the webhook would add nothing to the output;
//   - an unchanged document stays byte-identical, and other documents only gain lines: comments, order, numbers and quotes
//     stay;
//   - if one document is refused, none is written.
//
// It contacts no cluster, except by [Config.LookUp]. It does not check roles against namespaces that it has no data for, and
// reports that.
package manifests

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
	"github.com/credence-iam/credence/operator/yamledit"
	"github.com/credence-iam/credence/webhook/inject"
	"github.com/credence-iam/credence/webhook/settingsfile"
)

// Config configures [Inject].
type Config struct {
	// Files are read in this order. The file "-" is Stdin. Required.
	Files []string
	// Namespace is the namespace of objects without one. Default: it is not known.
	Namespace string
	// NamespacesFile has Namespace objects. Those in Files have precedence. Default: none.
	NamespacesFile string
	// LookUp reads a Namespace that neither Files nor NamespacesFile have, and whose annotated pods need it. If it cannot be
	// known, LookUp returns why, as in "its role is not checked, because" why. Default: it is not known.
	LookUp func(ctx context.Context, name string) (ns policy.Namespace, why string, err error)
	// Injector injects. Required.
	Injector *inject.Injector
	// Rules decide on roles, with the annotation keys of Injector. Required.
	Rules *policy.Rules
	// RulesFile is loaded into Rules. Default: none.
	RulesFile string
	// SettingsFile is loaded into Injector. Default: none.
	SettingsFile string
	// Diff writes the difference between the files and the output, instead of the output.
	Diff bool

	Stdin          io.Reader // the file "-"
	Stdout, Stderr io.Writer // the output; and messages, one per line
}

// Inject reads files, injects their pods and pod templates, and writes the result. If it refuses a document, it writes the
// reason to Stderr, writes no output and returns an error.
func Inject(ctx context.Context, cfg Config) error {
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
	in := injection{injector: cfg.Injector, rules: cfg.Rules, namespace: cfg.Namespace, lookUp: cfg.LookUp, namespaces: map[string]policy.Namespace{}, unknown: map[string]string{}}
	remaining := int64(maxSize)
	read := func(name string) ([]*document, error) {
		text, err := readFile(ctx, name, cfg.Stdin, remaining)
		if err != nil {
			return nil, err
		}
		remaining -= int64(len(text))
		return parseDocuments(ctx, shown(name), text)
	}
	if cfg.NamespacesFile != "" {
		documents, err := read(cfg.NamespacesFile)
		if err == nil {
			err = in.learn(ctx, documents)
		}
		if err == nil && len(in.namespaces) == 0 {
			err = fmt.Errorf("%s has no Namespace; use the output of kubectl get namespaces -o yaml", cfg.NamespacesFile)
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
		var edits []yamledit.Edit
		for _, d := range documents {
			if err := ctx.Err(); err != nil {
				return err
			}
			result, err := in.document(ctx, d)
			if err != nil {
				return err
			}
			for _, line := range result.messages {
				_, _ = fmt.Fprintln(cfg.Stderr, line) // Without a reader, there is nobody to report the error to.
			}
			if d.root != nil {
				total++
			}
			if result.refused {
				refused++
			}
			for _, e := range result.edits {
				edits = append(edits, yamledit.Edit{Start: e.Start + before.Len(), End: e.End + before.Len(), Text: e.Text})
			}
			before.Write(d.text)
			after.Write(yamledit.Apply(d.text, result.edits))
		}
		if cfg.Diff {
			if len(documents) > 0 {
				yamledit.WriteDiff(&out, documents[0].file, before.Bytes(), edits)
			}
			continue
		}
		join(&out, after.Bytes())
	}
	if refused > 0 {
		return fmt.Errorf("%d of %d documents refused; nothing is written", refused, total)
	}
	if _, err := cfg.Stdout.Write(out.Bytes()); err != nil {
		return fmt.Errorf("writing the output: %w", err)
	}
	return nil
}

// join appends the text of one more file as separate documents.
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

// shown names a file in messages.
func shown(name string) string {
	if name == "-" {
		return "standard input"
	}
	return name
}

// readFile reads a file, or all of stdin, up to limit bytes. It returns when ctx ends, because a terminal or a pipe may never
// deliver anything.
func readFile(ctx context.Context, name string, stdin io.Reader, limit int64) ([]byte, error) {
	type result struct {
		text []byte
		err  error
	}
	done := make(chan result, 1)
	go func() { // If ctx ends first, it ends with the process.
		reader := stdin
		if name != "-" {
			file, err := os.Open(name) //nolint:gosec // G304: the user of the command names this file.
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
			return nil, fmt.Errorf("%s: the input is longer than %d MiB, much more than the manifests of a cluster; split it", shown(name), maxSize>>20)
		case !utf8.Valid(r.text):
			return nil, errors.New(shown(name) + " is not UTF-8 text")
		}
		return r.text, nil
	}
}
