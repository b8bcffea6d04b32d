//go:build unix

package release

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"github.com/credence-iam/credence/integration/tools"
)

// helmLabels match the labels that say that Helm manages an object. They are not part of any selector.
var helmLabels = regexp.MustCompile(`(?m)^\s+(helm\.sh/chart|app\.kubernetes\.io/managed-by): .*\n`)

// writeManifest renders the chart with its default values and the images by digest, for installations without Helm.
func (r *release) writeManifest(ctx context.Context) error {
	helm, err := tools.Path(ctx, tools.Helm, r.Progress)
	if err != nil {
		return err
	}
	// Every supported cluster accepts what the oldest one does.
	oldest := regexp.MustCompile(`^>=(\d+\.\d+\.\d+)`).FindStringSubmatch(r.chart.KubeVersion)
	if oldest == nil {
		return fmt.Errorf("kubeVersion of %s/Chart.yaml is %q; write it as >=MAJOR.MINOR.PATCH", chartFolder, r.chart.KubeVersion)
	}
	// The check is a hook, which only Helm runs. Without it, its identity and its webhook have no use.
	rendered, err := run(ctx, r.Folder, helm, "template", "credence", r.chartArchive(),
		"--namespace="+namespace, "--values="+digestsFile, "--kube-version="+oldest[1], "--set=check.enabled=false")
	if err != nil {
		return err
	}
	var manifest strings.Builder
	_, _ = fmt.Fprintf(&manifest, `# Credence %[1]s without Helm, with the chart's default values. It needs cert-manager: see docs/install.md.
#   kubectl apply --server-side -f %[2]s/releases/download/%[3]s/%[4]s
apiVersion: v1
kind: Namespace
metadata:
  name: %[5]s
  labels:
    pod-security.kubernetes.io/enforce: restricted
`, r.version, repository, r.tag(), manifestFile, namespace)
	manifest.WriteString(helmLabels.ReplaceAllString(rendered, ""))
	return r.write(manifestFile, []byte(manifest.String()+"\n"))
}

// writeNotes writes the notes for the release's page: the section of the changelog, and the digests.
func (r *release) writeNotes(context.Context) error {
	var notes strings.Builder
	// Links in the changelog are relative to the repository.
	_, _ = fmt.Fprintf(&notes, "%s\n\n## Install\n\nSee [how to install, and how to verify what you downloaded](%[2]s/blob/%[3]s/docs/install.md).\n\n| image or chart | digest |\n|---|---|\n",
		regexp.MustCompile(`\]\(([a-zA-Z][^):]*)\)`).ReplaceAllString(r.changes, "]("+repository+"/blob/"+r.tag()+"/$1)"), repository, r.tag())
	chart, err := r.chartDigest()
	if err != nil {
		return err
	}
	for _, image := range r.images {
		_, _ = fmt.Fprintf(&notes, "| `%s` | `%s` |\n", image.Reference, image.Digest)
	}
	_, _ = fmt.Fprintf(&notes, "| `%s:%s` | `%s` |\n", chartRepository, r.version, chart)
	return r.write(notesFile, []byte(notes.String()))
}

// writeChecksums writes the checksums of all files so far, as sha256sum --check reads them.
func (r *release) writeChecksums(context.Context) error {
	slices.Sort(r.files)
	var list strings.Builder
	for _, file := range r.files {
		content, err := os.ReadFile(filepath.Join(r.Folder, file))
		if err != nil {
			return err
		}
		_, _ = fmt.Fprintf(&list, "%s  %s\n", sum(content), file)
	}
	return r.write(checksumsFile, []byte(list.String()))
}

// subject is a result of a build.
type subject struct {
	Name   string            `json:"name"`
	Digest map[string]string `json:"digest"`
}

// writeProvenance writes an in-toto statement with the predicate SLSA provenance 1: which files and images came of which
// commit. It is not in the checksums, because it names the builder, and they must be equal for all builders. It has no
// time, so that equal builds give equal statements.
func (r *release) writeProvenance(context.Context) error {
	var subjects []subject
	for _, file := range r.files {
		content, err := os.ReadFile(filepath.Join(r.Folder, file))
		if err != nil {
			return err
		}
		subjects = append(subjects, subject{file, map[string]string{"sha256": sum(content)}})
	}
	for _, image := range r.images {
		name, _, _ := strings.Cut(image.Reference, ":")
		subjects = append(subjects, subject{name, map[string]string{"sha256": strings.TrimPrefix(image.Digest, "sha256:")}})
	}
	chart, err := r.chartDigest()
	if err != nil {
		return err
	}
	subjects = append(subjects, subject{chartRepository, map[string]string{"sha256": chart.Hex}})
	builder := r.Builder
	if builder == "" {
		builder = repository + "/blob/main/docs/release.md#build-by-hand"
	}
	run := map[string]any{"builder": map[string]any{"id": builder}}
	if r.Invocation != "" {
		run["metadata"] = map[string]any{"invocationId": r.Invocation}
	}
	ref := "refs/tags/" + r.tag()
	var statement bytes.Buffer
	encoder := json.NewEncoder(&statement)
	encoder.SetEscapeHTML(false)
	encoder.SetIndent("", " ")
	if err := encoder.Encode(map[string]any{
		"_type":         "https://in-toto.io/Statement/v1",
		"subject":       subjects,
		"predicateType": "https://slsa.dev/provenance/v1",
		"predicate": map[string]any{
			"buildDefinition": map[string]any{
				"buildType": repository + "/blob/main/docs/release.md#build-type",
				"externalParameters": map[string]any{
					"repository": repository, "ref": ref, "version": r.tag(), "platforms": r.Platforms,
				},
				"internalParameters": map[string]any{"go": r.goVer},
				"resolvedDependencies": []map[string]any{
					{"uri": "git+" + repository + "@" + ref, "digest": map[string]string{"gitCommit": r.commit}},
				},
			},
			"runDetails": run,
		},
	}); err != nil {
		return fmt.Errorf("encoding the provenance: %w", err)
	}
	return r.write(provenanceFile, statement.Bytes())
}
