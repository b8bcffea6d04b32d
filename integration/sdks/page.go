//go:build unix

package main

import (
	"bytes"
	_ "embed" // of asksTheNode
	"fmt"
	"regexp"
	"slices"
	"strings"
	"time"
)

// pagePath is the page, from the root of the checkout.
const pagePath = "docs/sdk-compatibility.md"

// words are what the page's table says of an outcome. A reader finds them explained below the table.
var words = map[Outcome]string{
	Works:       "yes",
	NextCall:    "next call",
	NewSession:  "new session",
	Reason:      "reason",
	Hidden:      "no reason",
	Expired:     "keeps expired",
	Metadata:    "by metadata",
	Hangs:       "hangs",
	NotFound:    "not found",
	Unusable:    "cannot",
	Unsupported: "none",
	Fails:       "**no**",
}

// explained are the words that need it, in the order of the page.
var explained = []struct {
	outcome Outcome
	text    string
}{
	{Works, "every call succeeded, with the pod's role; for the region, the SDK found the right one by itself"},
	{NextCall, "the first call failed, and one of the next, a second apart, succeeded"},
	{Reason, "the call failed, as it has to, and the error that the program sees has the code or the message of the sidecar, which [errors](errors.md) explains"},
	{Hidden, "the call failed, as it has to, and the error has neither: look at the Events of the pod, or at `kubectl logs POD -c credence-sidecar`; " +
		"for a wrong token, which neither knows of, compare `AWS_CONTAINER_AUTHORIZATION_TOKEN` in the container with the pod's UID (`kubectl get pod POD -o jsonpath='{.metadata.uid}'`)"},
	{Expired, "the client made up a later end for its credentials and went on using them, and AWS refused them with `ExpiredToken`: " +
		"see [what is compressed](#what-is-compressed)"},
	{NewSession, "a client that is kept goes on failing for minutes, and a new one, or a restart of the program, succeeds: see [what is compressed](#what-is-compressed)"},
	{Hangs, "a call did not come back within a minute, and none after it: see [what is compressed](#what-is-compressed)"},
	{Metadata, "refused by the container-credentials endpoint, the client went on to instance metadata, where that token is not asked for, and has its credentials from there"},
	{NotFound, "the client's look-up found nothing: set `AWS_REGION`, or the pod's annotation `region`"},
	{Unusable, "the client cannot use this path as it is, and nothing else was tried on it: [see the error](#what-you-see-when-something-is-wrong)"},
	{Unsupported, "the client has no such look-up: set `AWS_REGION`, or the pod's annotation `region`"},
	{Fails, "not as it should be"},
}

// elsewhere are SDKs that have no driver here.
var elsewhere = []string{"Java", ".NET", "PHP", "C++", "Rust", "Kotlin", "Swift"}

// asksTheNode lists the results of trials by hand: these clients have no driver here, or one of another version.
//
//go:embed asks-the-node.txt
var asksTheNode string

// page renders the whole page. It holds no figure that changes from run to run.
func page(r *Report) []byte {
	var b bytes.Buffer
	line := func(format string, args ...any) { _, _ = fmt.Fprintf(&b, format+"\n", args...) }
	line(`# SDK compatibility

<!-- Written by "make sdks" (integration/sdks). Changes by hand are lost. -->

For whoever asks: does my SDK work, and what will I see when something is wrong?

Real clients were run, with the environment of an injected pod and nothing else, against the real sidecar and the
real broker. ` + "`make sdks`" + ` does it again, with the versions that are installed where it runs.`)
	line("\n## What was run\n")
	line("| client | what it is | version |\n|---|---|---|")
	for _, c := range clients {
		i := slices.IndexFunc(r.Rows, func(row Row) bool { return row.Client == c.name })
		what := "not run"
		if i >= 0 {
			what = state(r.Rows[i])
		}
		line("| %s | %s | %s |", c.name, c.about, what)
	}
	line("\nEach finds its credentials on these paths:\n")
	line("- `%s`: the environment as it is injected, with `%s`.", Container, fullURIVariable)
	line("- `%s`: the same without `AWS_CONTAINER_*`, so that `%s` and the emulation of instance metadata are what is left.", MetadataV2, metadataVariable)
	line("- `%s`: the same in a pod with the annotation `imds: v1`, for a client that knows no session tokens.", MetadataV1)
	line("\n**Leave clients the `%s` path where they have it**, as these do: %s.\n"+
		"It is what they choose by themselves in a pod as it is injected. On it more of them show why they fail, none goes on with\n"+
		"credentials that have ended, and these serve to their end, of which the metadata path states one that is five minutes earlier.\n"+
		"Instance metadata is for clients that know nothing else.", Container, strings.Join(both(), ", "))
	line("\n`minio-go` does not read `%s`: its program hands it over.\n\nThe SDK for Ruby before 3.171 does not know "+
		"`%s`, and of the other variable it takes the\nhost and not the port. That it \"cannot\" is said where no connection of it came to "+
		"the sidecar. As `ruby` it is run as it is,\nand as `ruby-port` in a program that makes its credentials with "+
		"`Aws::InstanceProfileCredentials.new(port: …)`.", metadataVariable, fullURIVariable)
	line("\nThe pods have the label `topology.kubernetes.io/zone`, as Kubernetes sets it from 1.35 on. Without it botocore and the AWS CLI v2\nfind no region: " +
		"they make it of the zone.")

	line("\n## What works\n")
	table(&b, r)
	line("\nThe columns:\n")
	for _, s := range scenarios {
		line("- **%s**: %s.", s.title, s.about)
	}
	line("\nThe words:\n")
	for _, e := range explained {
		if used(r, e.outcome) {
			line("- %s: %s.", words[e.outcome], e.text)
		}
	}
	if asking := asked(r); len(asking) > 0 {
		line("- %s: the region was found, by a program that asks for it, which the client does not do by itself (%s). With `AWS_REGION`, or the annotation `region`, there is no need to.",
			ifAsked, strings.Join(asking, "; "))
	}
	if len(r.storms()) == 0 {
		line("\nNo client, whatever it did, made its sidecar ask the broker more often than once in 0.4 of the life of a session, at its start, and once more when the broker is back; nor, where the role is refused, than once in %v. STS was asked no more often for the session that all of them share.", refusedEvery)
	}

	line("\n## What you see when something is wrong\n")
	line("The error as the client gave it. `PORT`, `ID` and `TIME` stand for what differs from case to case.")
	for _, c := range clients {
		seen(&b, r, c)
	}

	line(`
## What is compressed

Sessions lasted %s here, so that a run takes minutes. Real ones last an hour, or what the annotation
[duration](annotations.md) says, and while the broker is there the sidecar serves none with less than 25
minutes left, or 0.45 of its life where that is less.

- Most SDKs renew what has 5 to 15 minutes left. All that they got here had less, so they asked the sidecar at nearly every
  call, which it answered from memory. With sessions of an hour they ask when it is due. Not so the SDK for JavaScript v2 (15
  seconds), minio-go (a fifth of the life) and, on the metadata path, the SDK for Go v2 (none).
- On the metadata path some clients take credentials for valid beyond their end, because EC2 forgives that. STS does
  not: those are the ones with "%s". botocore does so when it gets credentials with less than some 25 minutes
  left; with sessions of an hour it does not get such while the broker is there. The SDKs for Go v2 and Ruby do so when they cannot
  renew what has ended, so with any session, after the broker has been away for longer than it lasts. Container credentials
  are never prolonged.
- The SDK for JavaScript v2 hangs on the metadata path with credentials that have less than 15 seconds left, and only a new process
  helps: it wants to warn of that, and has no `+"`AWS.config.logger`"+` unless the program sets one. A pod comes to that when the broker
  is away until the stated end of a session.
- The sidecar states an end five minutes earlier on the metadata path. It cannot do so for sessions this short.`,
		life(r), words[Expired])

	line("\n%s", strings.TrimSpace(asksTheNode))

	line("\n## What was not run\n")
	var absent []string
	for _, row := range r.Rows {
		if s := row.Client + " (" + state(row) + ")"; !row.run() && !slices.Contains(absent, s) {
			absent = append(absent, s)
		}
	}
	if len(absent) > 0 {
		line("Here, though `make sdks` knows them: %s.\n", strings.Join(absent, "; "))
	}
	line("The SDKs for %s and %s, the SDK for Ruby from 3.171 on, and programs that bring a provider of their own, but for those named above, were never run: "+
		"nothing on this page says anything of them.", strings.Join(elsewhere[:len(elsewhere)-1], ", "), elsewhere[len(elsewhere)-1])
	return b.Bytes()
}

// state is what was run of a row, or why it was not.
func state(row Row) string {
	switch {
	case row.Failed != "":
		return "could not be run: " + fixed(row.Failed)
	case row.NotRun != "":
		return "not run: " + row.NotRun
	default:
		return row.Version
	}
}

// both are the clients that can choose between container credentials and instance metadata.
func both() (names []string) {
	for _, c := range clients {
		if slices.Contains(c.paths, Container) && slices.Contains(c.paths, MetadataV2) && c.unusable == nil {
			names = append(names, c.name)
		}
	}
	return names
}

// ifAsked is what the table says of a region that is found by a program that asks for it.
const ifAsked = "if asked"

// asked says what programs have to ask for the region, of clients for which the table says so.
func asked(r *Report) (texts []string) {
	var names, all []string // of those who ask, and what
	for _, c := range clients {
		if c.asks == "" || !slices.ContainsFunc(r.Rows, func(row Row) bool {
			found, ok := row.cell(region)
			return row.Client == c.name && ok && found.Outcome == Works
		}) {
			continue
		}
		if i := slices.Index(all, c.asks); i >= 0 {
			names[i] += ", " + c.name
			continue
		}
		names, all = append(names, c.name), append(all, c.asks)
	}
	for i := range names {
		texts = append(texts, names[i]+": "+all[i])
	}
	return texts
}

// table writes the table client × path by scenario.
func table(b *bytes.Buffer, r *Report) {
	b.WriteString("| client | path |")
	for _, s := range scenarios {
		b.WriteString(" " + s.title + " |")
	}
	b.WriteString("\n|---|---|" + strings.Repeat("---|", len(scenarios)) + "\n")
	for _, c := range clients {
		for _, path := range c.paths {
			i := slices.IndexFunc(r.Rows, func(row Row) bool { return row.Client == c.name && row.Path == path })
			_, _ = fmt.Fprintf(b, "| %s | %s |", c.name, path)
			for _, s := range scenarios {
				text := "not run"
				switch {
				case !c.tries(path, s):
					text = "–"
				case i >= 0 && r.Rows[i].run():
					text = r.Rows[i].word(s)
				}
				b.WriteString(" " + text + " |")
			}
			b.WriteString("\n")
		}
	}
}

// word is what the table says of a scenario. What may come out one way or another is said as such, whichever it
// was.
func (r Row) word(s scenario) string {
	c, ok := r.cell(s.name)
	if !ok {
		return "not run"
	}
	if !c.Met() {
		return words[c.Outcome] + " (not as expected)"
	}
	if s.name == region && c.Outcome == Works && clientOf(r.Client).asks != "" {
		return ifAsked
	}
	var all []string
	for _, o := range c.Expected {
		all = append(all, words[o])
	}
	return strings.Join(all, ", or ")
}

// used says whether an outcome is in the table.
func used(r *Report, o Outcome) bool {
	return slices.ContainsFunc(r.Rows, func(row Row) bool {
		return slices.ContainsFunc(row.Cells, func(c Cell) bool { return c.Outcome == o || c.Met() && slices.Contains(c.Expected, o) })
	})
}

// quoted are the scenarios whose errors the page quotes.
var quoted = []string{expired, refused, token}

// seen writes what a client shows of what is wrong.
func seen(b *bytes.Buffer, r *Report, c client) {
	began := false
	for _, name := range append([]string{first}, quoted...) {
		var paths []string
		var texts []string
		for _, row := range r.Rows {
			cell, ok := row.cell(name)
			if row.Client != c.name || !ok || cell.Error == "" || cell.Outcome == Hangs || name == first && cell.Outcome != Unusable {
				continue
			}
			text := fixed(cell.Error)
			if cell.Code != "" && !strings.Contains(cell.Error, cell.Code) {
				text += "`, code `" + fixed(cell.Code)
			}
			if i := slices.Index(texts, text); i >= 0 {
				paths[i] += ", " + string(row.Path)
				continue
			}
			paths, texts = append(paths, string(row.Path)), append(texts, text)
		}
		if len(texts) > 0 && !began {
			began = true
			_, _ = fmt.Fprintf(b, "\n### %s\n\n", c.name)
		}
		for i := range texts {
			_, _ = fmt.Fprintf(b, "- %s, %s: `%s`\n", scenarioOf(name).title, paths[i], texts[i])
		}
	}
}

// volatile are the parts of errors that differ from case to case.
var volatile = []struct {
	pattern *regexp.Regexp
	name    string
}{
	{regexp.MustCompile(`[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}`), "ID"},
	{regexp.MustCompile(`(127\.0\.0\.1:|localhost:|\[::1\]:|port=|port )\d{2,5}`), "${1}PORT"},
	{regexp.MustCompile(`\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z`), "TIME"},
	{regexp.MustCompile(`0x[0-9a-f]{6,}`), "ID"},
}

// longest bounds what is quoted of one error: enough to know it by.
const longest = 500

// fixed returns the part of an error's text that does not differ from case to case, in one line, in a form that can
// stand between backquotes.
func fixed(text string) string {
	for _, v := range volatile {
		text = v.pattern.ReplaceAllString(text, v.name)
	}
	text = strings.Join(strings.Fields(strings.ReplaceAll(text, "`", "'")), " ")
	if runes := []rune(text); len(runes) > longest {
		text = string(runes[:longest]) + "…"
	}
	return text
}

// life is how long sessions lasted, for a reader.
func life(r *Report) string {
	return (time.Duration(r.Life * float64(time.Second))).String()
}
