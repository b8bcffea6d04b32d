//go:build unix

package release

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"github.com/credence-iam/credence/integration/tools"
)

// check checks that the checkout can be released as the version, and reads what describes it.
func (r *release) check(ctx context.Context) error {
	root, err := tools.Checkout()
	if err != nil {
		return err
	}
	for _, check := range []func(context.Context, string) error{r.checkGit, r.checkChart, r.checkChangelog, r.checkToolchain} {
		if err := check(ctx, root); err != nil {
			return fmt.Errorf("checking the checkout of %s: %w", r.tag(), err)
		}
	}
	return nil
}

// checkGit requires a clean work tree at the tag.
func (r *release) checkGit(ctx context.Context, root string) error {
	changes, err := run(ctx, root, "git", "status", "--porcelain")
	if err != nil {
		return err
	}
	if changes != "" {
		return fmt.Errorf("the work tree has changes; commit or remove them:\n%s", changes)
	}
	if r.commit, err = run(ctx, root, "git", "rev-parse", "HEAD"); err != nil {
		return err
	}
	tagged, err := run(ctx, root, "git", "rev-parse", "--verify", "--quiet", "refs/tags/"+r.tag()+"^{commit}")
	if err != nil {
		return fmt.Errorf("tag %[1]s does not exist; create it with git tag --sign %[1]s, or fetch it with git fetch --tags", r.tag())
	}
	if tagged != r.commit {
		return fmt.Errorf("tag %[1]s is at commit %.12[2]s, and the work tree at %.12[3]s; run git checkout %[1]s", r.tag(), tagged, r.commit)
	}
	date, err := run(ctx, root, "git", "log", "-1", "--format=%cI")
	if err != nil {
		return err
	}
	if r.date, err = time.Parse(time.RFC3339, date); err != nil {
		return fmt.Errorf("reading the date of the commit: %w", err)
	}
	r.date = r.date.UTC()
	return nil
}

// checkChart requires the chart to have the version, for itself and for the images.
func (r *release) checkChart(_ context.Context, root string) error {
	var err error
	if r.chart, err = readChart(filepath.Join(root, chartFolder)); err != nil {
		return err
	}
	for field, value := range map[string]string{"version": r.chart.Version, "appVersion": r.chart.AppVersion} {
		if value != r.version {
			return fmt.Errorf("%s of %s/Chart.yaml is %q; set it to %s and commit that before the tag", field, chartFolder, value, r.version)
		}
	}
	return nil
}

// heading matches the heading of a version, of which the changelog's form requires a date.
var heading = regexp.MustCompile(`(?m)^## \[(.+?)\](?: - (\d{4}-\d{2}-\d{2}))?$`)

// checkChangelog requires a section with a date and content, and keeps it.
func (r *release) checkChangelog(_ context.Context, root string) error {
	text, err := os.ReadFile(filepath.Join(root, "CHANGELOG.md"))
	if err != nil {
		return err
	}
	changelog := string(text)
	sections := heading.FindAllStringSubmatchIndex(changelog, -1)
	for n, at := range sections {
		if changelog[at[2]:at[3]] != r.version || at[4] < 0 {
			continue
		}
		end := len(changelog)
		if n+1 < len(sections) {
			end = sections[n+1][0]
		}
		// The definitions of links at the end of the file are not part of the last section.
		if links := regexp.MustCompile(`(?m)^\[.+\]: `).FindStringIndex(changelog[at[1]:end]); links != nil {
			end = at[1] + links[0]
		}
		r.changes = strings.TrimSpace(changelog[at[1]:end])
	}
	if r.changes == "" {
		return fmt.Errorf("CHANGELOG.md has no section %q with content; move the lines of [Unreleased] there and commit that before the tag",
			"## ["+r.version+"] - YYYY-MM-DD")
	}
	return nil
}

// checkToolchain requires the version of Go that go.mod names. Another one would make other programs.
func (r *release) checkToolchain(ctx context.Context, root string) error {
	text, err := os.ReadFile(filepath.Join(root, "go.mod"))
	if err != nil {
		return err
	}
	pinned := regexp.MustCompile(`(?m)^toolchain (go\S+)$`).FindSubmatch(text)
	if pinned == nil {
		return errors.New("go.mod has no line toolchain; add one with go get toolchain@latest")
	}
	if r.goVer, err = run(ctx, root, "go", "env", "GOVERSION"); err != nil {
		return err
	}
	if r.goVer != string(pinned[1]) {
		return fmt.Errorf("go.mod names the toolchain %[1]s, and %[2]s runs; set GOTOOLCHAIN=%[1]s", pinned[1], r.goVer)
	}
	return nil
}

// run runs a command in a folder, and returns its output without the space around it.
func run(ctx context.Context, folder, name string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, name, args...) //nolint:gosec // the callers above
	cmd.Dir = folder
	output, err := cmd.Output()
	if err != nil {
		var stderr []byte
		if exit, ok := errors.AsType[*exec.ExitError](err); ok {
			stderr = exit.Stderr
		}
		return "", fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, strings.TrimSpace(string(stderr)))
	}
	return strings.TrimSpace(string(output)), nil
}
