package rules_test

import (
	"fmt"
	"path"
	"slices"
	"strconv"
	"strings"
)

// floors gives each package a floor. A package imports only packages of lower floors, so this table shows the import
// graph and excludes cycles. Change a floor here, with a record in docs/decisions that says why. The table may list a
// package that does not exist yet.
var floors = map[string]int{
	// 0: the types of the domain. Standard library only.
	"broker/clip":           0,
	"broker/connlimit":      0,
	"broker/credential":     0,
	"broker/debugapi":       0, // the JSON of the debug pages
	"broker/identity":       0,
	"broker/policy/gate":    0,
	"broker/policy/pattern": 0,
	"broker/typo":           0,
	"certs":                 0,
	"sidecar/contract":      0,

	// 1: pure mechanisms on these types, and the wire format.
	"broker/brokerpb":       1,
	"broker/cache/schedule": 1, // x/time/rate only
	"broker/placement":      1,
	"broker/policy":         1,
	"certs/certstest":       1,
	"operator/finding":      1, // results of a diagnosis, and how they are printed
	"operator/metrics":      1, // the text format of our programs
	"operator/yamledit":     1, // YAML and JSON only

	"webhook/inject/podview": 1, // the parts of a pod that injection reads

	// 2: packages that call one outside system each.
	"broker/cache":      2, // calls no outside system; it imports its schedule
	"broker/assume":     2,
	"broker/audit":      2,
	"broker/client":     2,
	"broker/configfile": 2, // the file system and YAML
	"broker/kube":       2,
	"broker/tracing":    2,
	"certs/trust":       2,
	"webhook/inject":    2,

	"operator/netpolicy":    2, // what NetworkPolicies block
	"operator/installation": 2, // the cluster, as far as the user of the credence command may see it

	"operator/dashboard/view": 2, // calls no outside system; it imports the findings

	"broker/kube/events": 2, // besides the watches, the two other users of the API server
	"broker/kube/verify": 2,

	// 3: the components, and the files that they read or edit.
	"broker":               3,
	"broker/admin":         3,
	"broker/rulesfile":     3,
	"operator/snapshot":    3, // one pod and what its credentials need, read from the cluster
	"sidecar":              3,
	"webhook":              3,
	"webhook/settingsfile": 3,

	// 4: combined components, for tests and for the credence command.
	"broker/assume/ststest":   4,
	"broker/kube/apitest":     4,
	"broker/brokertest":       4,
	"broker/client/dnstest":   4,
	"broker/tracing/otlptest": 4,
	"operator/check":          4,
	"operator/dashboard":      4,
	"operator/explain":        4,
	"operator/manifests":      4,
	"operator/sessions":       4,
	"operator/versions":       4,
	"operator/survey":         3, // what the checks see of a cluster
	"webhook/metrics":         4,

	"cmd/internal/twoprocessors":       4,
	"cmd/internal/injectflags":         4, // the flags that the webhook and the credence command share
	"cmd/internal/program":             4, // the code that all programs share
	"cmd/internal/program/processtest": 4,
	"cmd/internal/program/programtest": 4,

	// 5: programs.
	"cmd/broker":   5,
	"cmd/credence": 5,
	"cmd/sidecar":  5,
	"cmd/webhook":  5,
}

// integration is the folder of the top floor. Its packages may import each other, because no product package imports
// them.
const (
	integration = "integration"
	topFloor    = 6
)

// tooling is the part of integration that imports nothing of the product, tests
// included, so that it could leave the repository.
var tooling = []string{
	"integration/certmanager", "integration/cluster", "integration/images",
	"integration/minio", "integration/process", "integration/registry", "integration/release", "integration/tools",
	"integration/process", "integration/tools",
}

func floorOf(dir string) (floor int, known bool) {
	if within(dir, integration) {
		return topFloor, true
	}
	floor, known = floors[dir]
	return floor, known
}

// standardOnly reports whether a package, outside of its tests, may import only the standard library and lower floors:
// floor 0, and certs/certstest, which the tests of all packages use.
func standardOnly(dir string) bool {
	floor, known := floorOf(dir)
	return known && floor == 0 || dir == "certs/certstest"
}

// doors are the folders, subfolders included, that may import a heavy module, in tests too. They keep the sidecar small
// and limit the code that an upgrade of the module can break.
var doors = []struct {
	module string
	opens  []string
}{
	{"github.com/aws", []string{"broker/assume", integration}},
	{"github.com/cert-manager", []string{"operator", integration}},
	{"github.com/google/go-containerregistry", []string{integration}},
	{"github.com/gorilla/mux", []string{"broker/admin", "sidecar", "webhook"}},
	{"github.com/prometheus", []string{"broker/admin", "webhook/metrics"}},
	{"go.opentelemetry.io", []string{"broker/tracing"}},
	{"golang.org/x/crypto/x509roots", []string{"cmd/broker", integration}},
	{"github.com/spf13", []string{"cmd/credence"}},
	{"k8s.io/client-go", []string{"broker/kube", "certs/trust", "cmd", "operator", integration}},
}

// isDouble reports whether dir is a package that imitates something for tests. Its name ends in "test", as that of
// net/http/httptest.
func isDouble(dir string) bool { return strings.HasSuffix(path.Base(dir), "test") }

func checkImports(p *pkg) (all []violation) {
	own, known := floorOf(p.dir)
	if !known {
		return []violation{{p.dir, "is on no floor: give it one in integration/rules/imports_test.go, " +
			"with a record in docs/decisions, or move the code into an existing package"}}
	}
	for _, f := range p.files {
		for _, spec := range f.syntax.Imports {
			imported, err := strconv.Unquote(spec.Path.Value)
			if err != nil {
				continue // The parser accepts only string literals.
			}
			if why := refuse(p.dir, own, f.test, imported); why != "" {
				all = append(all, violation{f.path, "imports " + imported + ": " + why})
			}
		}
	}
	return all
}

// refuse returns why a file in dir must not import a package, or "" if it may.
func refuse(dir string, own int, test bool, imported string) string {
	if imported == "C" {
		return "all programs are built without cgo"
	}
	if target, ours := strings.CutPrefix(imported, module+"/"); ours {
		return refuseOwn(dir, own, test, target)
	}
	first, _, _ := strings.Cut(imported, "/")
	if !strings.Contains(first, ".") {
		return "" // the standard library
	}
	if standardOnly(dir) && !test {
		return "this package may import only the standard library"
	}
	for _, door := range doors {
		if within(imported, door.module) && !within(dir, door.opens...) {
			return fmt.Sprintf("%s may be imported only in %s", door.module, strings.Join(door.opens, ", "))
		}
	}
	return ""
}

// refuseOwn is refuse for packages of this module. A test may import what its package may, and also its own package and
// any double. A double is on a higher floor than the package that it imitates.
func refuseOwn(dir string, own int, test bool, target string) string {
	floor, known := floorOf(target)
	switch {
	case !known:
		return "that package is on no floor"
	case within(dir, tooling...) && !within(target, tooling...):
		return "this is tooling, which imports nothing of the product"
	case within(dir, integration) && within(target, integration):
		return ""
	case test && (target == dir || isDouble(target)):
		return ""
	case isDouble(target) && !isDouble(dir) && !within(dir, integration):
		return "only tests, other doubles and " + integration + " may import a double"
	case floor >= own:
		return fmt.Sprintf("that is floor %d, this is floor %d; import only lower floors", floor, own)
	}
	return ""
}

// grabBags are names that do not say what a package is for. Such packages collect unrelated code.
var grabBags = []string{"common", "helper", "helpers", "misc", "pkg", "shared", "types", "util", "utils"}

func checkNames(p *pkg) (all []violation) {
	for element := range strings.SplitSeq(p.dir, "/") {
		if slices.Contains(grabBags, element) {
			all = append(all, violation{p.dir, "the name " + element + " says nothing: name the package after its subject"})
		}
	}
	for _, f := range p.files {
		name := f.syntax.Name.Name
		if f.test {
			name = strings.TrimSuffix(name, "_test")
		}
		if name != "main" && p.dir != "." && name != path.Base(p.dir) {
			all = append(all, violation{f.path, "package " + name + " must have the name of its folder, " + path.Base(p.dir)})
		}
	}
	return all
}
