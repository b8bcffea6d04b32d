//go:build unix

package main

import (
	"fmt"
	"regexp"
	"slices"
	"strings"
)

// pagePath is the page, below the root of the checkout.
const pagePath = "docs/sdk-compatibility.md"

// updatePage replaces the three generated parts of a page. People write the rest. Versions and errors of a client that
// was not run stay. The results of all rows must be as expected.
func updatePage(page string, rows []*row) (string, error) {
	for _, part := range []struct {
		name string
		text func(old string) string
	}{
		{"versions", func(old string) string { return versions(old, rows) }},
		{"results", func(string) string { return matrix() }},
		{"errors", func(old string) string { return quotes(old, rows) }},
	} {
		before, old, after, err := cut(page, part.name)
		if err != nil {
			return "", err
		}
		page = before + part.text(old) + after
	}
	return page, nil
}

// cut returns the text between the two markers of a part, and the text around it, which has the markers.
func cut(page, name string) (before, text, after string, err error) {
	begin, end := "<!-- make sdks writes these "+name+" -->\n\n", "\n<!-- end of these "+name+" -->\n"
	i, j := strings.Index(page, begin), strings.Index(page, end)
	if i < 0 || j < i {
		return "", "", "", fmt.Errorf("the markers %q and %q are missing", begin, end)
	}
	i += len(begin)
	return page[:i], page[i:j], page[j:], nil
}

// versions lists the clients, with the versions that were run last.
func versions(old string, rows []*row) string {
	var text strings.Builder
	text.WriteString("| client | what it is | version |\n|---|---|---|\n")
	for _, s := range sdks {
		version := "not run"
		begin := fmt.Sprintf("| %s | %s | ", s.name, s.about)
		if _, rest, ok := strings.Cut(old, begin); ok {
			version, _, _ = strings.Cut(rest, " |\n")
		}
		if i := slices.IndexFunc(rows, func(r *row) bool { return r.sdk.name == s.name }); i >= 0 {
			version = rows[i].version
		}
		text.WriteString(begin + version + " |\n")
	}
	return text.String()
}

// matrix returns the table of client and path by scenario, as it is expected: a run that finds anything else fails.
func matrix() string {
	text, line := "| client | path |", "|---|---|"
	for _, s := range scenarios {
		text, line = text+" "+s.name+" |", line+"---|"
	}
	text += "\n" + line + "\n"
	for _, s := range sdks {
		for _, path := range s.paths {
			text += fmt.Sprintf("| %s | %s |", s.name, path)
			for _, c := range scenarios {
				word := string(s.expected(path, c.name))
				if word == "" {
					word = "–"
				}
				text += " " + word + " |"
			}
			text += "\n"
		}
	}
	return text
}

// quoted are the scenarios whose errors the page quotes.
var quoted = []string{first, longer, refused, token}

// quotes lists the errors that each client showed.
func quotes(old string, rows []*row) (text string) {
	for _, s := range sdks {
		own := section(old, s.name)
		if slices.ContainsFunc(rows, func(r *row) bool { return r.sdk.name == s.name }) {
			own = ""
			for _, scenario := range quoted {
				own += quotesOf(s, scenario, rows)
			}
		}
		if own != "" {
			text += "\n### " + s.name + "\n\n" + own
		}
	}
	return strings.TrimPrefix(text, "\n")
}

// section returns the lines below a heading.
func section(old, name string) string {
	_, rest, _ := strings.Cut(old, "### "+name+"\n\n")
	text, _, _ := strings.Cut(rest, "\n### ")
	return text
}

// quotesOf returns a line for each error of a client in a scenario. Paths with equal errors share a line.
func quotesOf(s sdk, scenario string, rows []*row) (lines string) {
	var texts []string
	paths := make(map[string][]string)
	for _, r := range rows {
		got := r.results[scenario]
		if r.sdk.name != s.name || got.text == "" || got.outcome == hangs {
			continue
		}
		text := fixed(got.text)
		if got.code != "" && !strings.Contains(got.text, got.code) {
			text += "`, code `" + fixed(got.code)
		}
		if paths[text] == nil {
			texts = append(texts, text)
		}
		paths[text] = append(paths[text], r.path)
	}
	for _, text := range texts {
		lines += fmt.Sprintf("- %s, %s: `%s`\n", scenario, strings.Join(paths[text], ", "), text)
	}
	return lines
}

// volatile are the parts of errors that differ from run to run.
var volatile = []struct {
	pattern *regexp.Regexp
	name    string
}{
	{regexp.MustCompile(`[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}`), "ID"},
	{regexp.MustCompile(`(127\.0\.0\.1:|localhost:|\[::1\]:|port=|port )\d{2,5}`), "${1}PORT"},
	{regexp.MustCompile(`\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z`), "TIME"},
	{regexp.MustCompile(`0x[0-9a-f]{6,}`), "ID"},
}

// longest limits the quotation of one error, in characters.
const longest = 500

// fixed returns an error's text without its volatile parts, in one line that can stand between backquotes.
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
