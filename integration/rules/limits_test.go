package rules_test

import (
	"errors"
	"go/ast"
	"go/constant"
	"go/importer"
	"go/parser"
	"go/token"
	"go/types"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"
)

// limits are the constants that docs/threat-model.md states, by the start of their row.
var limits = []struct {
	row   string // the first two cells
	form  func(int64) string
	dir   string
	names []string
}{
	{"| anyone at port 9443 | connections |", number, "broker", []string{"maxUnauthenticated", "maxWaiting"}},
	{"| anyone at port 9443 | connections |", size, "broker", []string{"HeldPerConnection", "maxCallBytes"}},
	{"| anyone at port 9443 | connections |", seconds, "broker", []string{"requestTime"}},
	{"| anyone with a token, valid or not | tokens", number, "broker/kube/verify", []string{"reviewsAtOnce", "reviewsOfVerified", "maxWaiting"}},
	{"| the same | key ids", size, "broker/kube/verify", []string{"maxDocument"}},
	{"| the same | key ids", number, "broker/kube/verify", []string{"maxKeys"}},
	{"| the same | key ids", seconds, "broker/kube/verify", []string{"keysMinAge"}},
	{"| the same | tokens with a long life", hours, "broker/kube/verify", []string{"DefaultMaxTokenLife"}},
	{"| anyone who is refused | audit lines", number, "broker/audit", []string{"bufferedDenials", "maxPeers", "podLines"}},
	{"| anyone who is refused | audit lines", seconds, "broker/audit", []string{"denialWindow"}},
	{"| pods with a valid token | calls", number, "broker", []string{"maxPerPod", "maxAuthenticated"}},
	{"| the same | audit lines", number, "broker/audit", []string{"buffered", "maxLine"}},
	{"| the same, if the watches", number, "broker/kube", []string{"liveReadsPerSecond", "liveReadBurst", "namespaceReadsPerSecond", "namespaceReadBurst"}},
	{"| the same, if the watches", seconds, "broker/kube", []string{"liveReadTimeout"}},
	{"| the same | refusals and warnings", number, "broker/kube/events", []string{"namespaceBurst", "burst", "perSecond"}},
	{"| anyone at port 9443 | connections, by", number, "webhook", []string{"maxConnections", "maxWaiting"}},
	{"| anyone at port 9443 | connections, by", size, "webhook", []string{"HeldPerConnection"}},
	{"| anyone at port 9443 | connections, by", seconds, "webhook", []string{"headerTimeout", "readTimeout"}},
	{"| the same | reviews", size, "webhook", []string{"maxMemory", "costPerContainer", "maxSmall"}},
	{"| the same | reviews", number, "webhook", []string{"costPerByte", "costPerValue"}},
	{"| the same | reviews", seconds, "webhook", []string{"reviewTimeout", "silence"}},
	{"| users who create pods | large pods", size, "webhook/inject/podview", []string{"MaxObject"}},
	{"| users who create pods | large pods", number, "webhook/inject/podview", []string{"MaxValues", "MaxDepth", "MaxContainers"}},
	{"| the same | pods that get warnings", number, "webhook/inject", []string{"maxWarnings", "maxKept"}},
	{"| anyone at the admin port 8080 |", number, "broker/admin", []string{"maxConnections", "maxWaiting"}},
	{"| anyone at the admin port 8080 |", seconds, "broker/admin", []string{"readTimeout", "scrapeTimeout"}},
	{"| writers of a namespace's annotations | `permitted`", number, "broker/policy/pattern", []string{"maxExpression", "maxSteps", "maxVisits"}},
	{"| the same | `allowed-roles`", size, "broker/policy/pattern", []string{"maxAllowed"}},
	{"| the same | `allowed-roles`", number, "broker/policy/pattern", []string{"maxGlobs", "maxStars"}},
	{"| the same, and pods | decisions", size, "broker/policy", []string{"maxCachedEach", "maxCached"}},
	{"| users who create pods | `session-policy`", size, "broker/policy", []string{"maxPolicyText"}},
	{"| writers of the rules file", size, "broker/configfile", []string{"maxFile"}},
	{"| containers of the pod", number, "sidecar", []string{"maxConnections", "maxLines", "keepAliveLimit"}},
	{"| containers of the pod", seconds, "sidecar", []string{"readTimeout"}},
	{"| the cluster's DNS |", seconds, "broker/client", []string{"maxLookup", "knownAfter"}},
	{"| the cluster's DNS |", number, "broker/client", []string{"maxAddresses"}},
	{"| a broker to a sidecar", size, "broker/client", []string{"maxAnswer"}},
	{"| a broker to a sidecar", size, "broker/assume", []string{"maxAnswer"}},
}

// TestLimits compares the numbers in the table of docs/threat-model.md with the constants.
func TestLimits(t *testing.T) {
	const root, page = "../..", "../../docs/threat-model.md"
	text, err := os.ReadFile(page)
	if err != nil {
		t.Fatal(err)
	}
	all := &constants{set: token.NewFileSet(), packages: make(map[string]*types.Package), root: root}
	all.standard = importer.ForCompiler(all.set, "source", nil)
	for _, limit := range limits {
		_, row, ok := strings.Cut(string(text), "\n"+limit.row)
		if !ok {
			t.Errorf("%s has no row that starts with %q", page, limit.row)
			continue
		}
		row, _, _ = strings.Cut(row, "\n")
		pkg, err := all.Import(module + "/" + limit.dir)
		if err != nil {
			t.Fatal(err)
		}
		for _, name := range limit.names {
			value, ok := valueOf(pkg, name)
			if !ok {
				t.Errorf("%s has no constant %s, or its value is unknown", limit.dir, name)
				continue
			}
			want := limit.form(value)
			if !regexp.MustCompile(`(^|[^\d,.])` + regexp.QuoteMeta(want) + `($|[^\d,.A-Za-z]|[,.]($|\D))`).MatchString(row) {
				t.Errorf("%s of %s is %s, but the row %q of %s does not have it: %s", name, limit.dir, want, limit.row, page, row)
			}
		}
	}
}

// constants evaluates the constants of this module's packages from their sources. It skips other modules, so a constant
// that depends on one has no value.
type constants struct {
	set      *token.FileSet
	root     string
	standard types.Importer
	packages map[string]*types.Package
}

// Import implements [types.Importer].
func (c *constants) Import(name string) (*types.Package, error) {
	dir, own := strings.CutPrefix(name, module+"/")
	switch {
	case name == "time":
		return c.standard.Import(name) //nolint:wrapcheck // The type checker ignores it.
	case !own:
		return nil, errors.New("skipped")
	case c.packages[name] != nil:
		return c.packages[name], nil
	}
	names, err := filepath.Glob(filepath.Join(c.root, filepath.FromSlash(dir), "*.go"))
	if err != nil {
		return nil, err //nolint:wrapcheck // The pattern is wrong.
	}
	var files []*ast.File
	for _, name := range names {
		if strings.HasSuffix(name, "_test.go") {
			continue
		}
		file, err := parser.ParseFile(c.set, name, nil, parser.SkipObjectResolution)
		if err != nil {
			return nil, err //nolint:wrapcheck // The error names the file.
		}
		files = append(files, file)
	}
	config := types.Config{Importer: c, Error: func(error) {}, IgnoreFuncBodies: true, FakeImportC: true}
	pkg, _ := config.Check(name, c.set, files, nil) // The errors concern the skipped modules.
	c.packages[name] = pkg
	return pkg, nil
}

// valueOf returns the value of an integer constant.
func valueOf(pkg *types.Package, name string) (int64, bool) {
	found, ok := pkg.Scope().Lookup(name).(*types.Const)
	if !ok || found.Val().Kind() == constant.Unknown {
		return 0, false
	}
	return constant.Int64Val(constant.ToInt(found.Val()))
}

// number formats n as the page does: 2,048.
func number(n int64) string {
	digits := strconv.FormatInt(n, 10)
	for at := len(digits) - 3; at > 0; at -= 3 {
		digits = digits[:at] + "," + digits[at:]
	}
	return digits
}

// size formats a number of bytes as a whole number of MiB or KiB.
func size(n int64) string {
	if n%(1<<20) == 0 {
		return number(n>>20) + " MiB"
	}
	return number(n>>10) + " KiB"
}

func seconds(n int64) string { return number(int64(time.Duration(n)/time.Second)) + " s" }

func hours(n int64) string { return number(int64(time.Duration(n)/time.Hour)) + " h" }
