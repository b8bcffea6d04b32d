package rules_test

import (
	"fmt"
	"path"
	"slices"
	"strconv"
	"strings"
)

// floors places every package. A package imports only strictly lower floors, so
// the graph of the whole is known from this table, and a cycle of ideas is as
// impossible as a cycle of imports. A floor is changed here, together with a
// record in docs/decisions that says why. A package may be listed before it
// exists.
var floors = map[string]int{
	// 0: the nouns. Standard library only.
	"broker/clip":           0,
	"broker/connlimit":      0,
	"broker/credential":     0,
	"broker/identity":       0,
	"broker/policy/gate":    0,
	"broker/policy/pattern": 0,
	"broker/typo":           0,
	"certs":                 0,
	"sidecar/contract":      0,

	// 1: pure mechanisms over the nouns, and the wire.
	"broker/brokerpb":  1,
	"broker/cache":     1,
	"broker/placement": 1,
	"broker/policy":    1,
	"certs/certstest":  1,
	"certs/pki":        1,

	// 2: what meets one outside system each.
	"broker/assume":     2,
	"broker/audit":      2,
	"broker/client":     2,
	"broker/configfile": 2, // the file system, and YAML
	"broker/kube":       2,
	"broker/tracing":    2,
	"certs/trust":       2,
	"webhook/inject":    2,

	// 3: the components, and the files by which some decide.
	"broker":               3,
	"broker/admin":         3,
	"broker/rulesfile":     3,
	"sidecar":              3,
	"webhook":              3,
	"webhook/settingsfile": 3,

	// 4: components put together, for tests and for the operator.
	"broker/assume/ststest":   4,
	"broker/kube/apitest":     4,
	"broker/brokertest":       4,
	"broker/client/dnstest":   4,
	"broker/tracing/otlptest": 4,
	"operator":                4,

	"cmd/internal/twoprocessors":       4,
	"cmd/internal/injectflags":         4, // what the webhook and the operator's command share
	"cmd/internal/program":             4, // what the mains share
	"cmd/internal/program/processtest": 4,
	"cmd/internal/program/programtest": 4,

	// 5: programs.
	"cmd/broker":   5,
	"cmd/credence": 5,
	"cmd/sidecar":  5,
	"cmd/webhook":  5,
}

// integration is the top floor: all that lies in this folder. It alone may
// import within its floor, for nothing is built upon it.
const (
	integration = "integration"
	topFloor    = 6
)

func floorOf(dir string) (floor int, known bool) {
	if within(dir, integration) {
		return topFloor, true
	}
	floor, known = floors[dir]
	return floor, known
}

// standardOnly packages import nothing but the standard library and lower
// floors, outside of tests: floor 0, and the helper that everything's tests use.
func standardOnly(dir string) bool {
	floor, known := floorOf(dir)
	return known && floor == 0 || dir == "certs/certstest"
}

// doors are the only places, with what lies below them, where a heavy module
// may be imported, in tests too. They keep the sidecar small, and keep what an
// upgrade of the module can break in one folder.
var doors = []struct {
	module string
	opens  []string
}{
	{"github.com/aws", []string{"broker/assume", integration}},
	{"github.com/cert-manager", []string{"certs/pki", "operator", integration}},
	{"github.com/google/go-containerregistry", []string{integration}},
	{"github.com/gorilla/mux", []string{"broker/admin", "sidecar", "webhook"}},
	{"github.com/prometheus", []string{"broker/admin"}},
	{"go.opentelemetry.io", []string{"broker/tracing"}},
	{"golang.org/x/crypto/x509roots", []string{"cmd/broker", integration}},
	{"k8s.io/client-go", []string{"broker/kube", "certs/trust", "cmd", "operator", integration}},
}

// isDouble reports whether dir is a package that imitates something for tests;
// by its name, as net/http/httptest does.
func isDouble(dir string) bool { return strings.HasSuffix(path.Base(dir), "test") }

func checkImports(p *pkg) (all []violation) {
	own, known := floorOf(p.dir)
	if !known {
		return []violation{{p.dir, "is on no floor: give it one in integration/rules/imports_test.go, " +
			"with a record in docs/decisions, or put the code into a package that is there"}}
	}
	for _, f := range p.files {
		for _, spec := range f.syntax.Imports {
			imported, err := strconv.Unquote(spec.Path.Value)
			if err != nil {
				continue // the parser has let only string literals through
			}
			if why := refuse(p.dir, own, f.test, imported); why != "" {
				all = append(all, violation{f.path, "imports " + imported + ": " + why})
			}
		}
	}
	return all
}

// refuse says why a file in dir must not import something, or nothing.
func refuse(dir string, own int, test bool, imported string) string {
	if imported == "C" {
		return "every program is built without cgo"
	}
	if target, ours := strings.CutPrefix(imported, module+"/"); ours {
		return refuseOwn(dir, own, test, target)
	}
	first, _, _ := strings.Cut(imported, "/")
	if !strings.Contains(first, ".") {
		return "" // the standard library
	}
	if standardOnly(dir) && !test {
		return "this package is for the standard library only"
	}
	for _, door := range doors {
		if within(imported, door.module) && !within(dir, door.opens...) {
			return fmt.Sprintf("%s enters only through %s", door.module, strings.Join(door.opens, ", "))
		}
	}
	return ""
}

// refuseOwn judges an import of a package of this module. A test may import
// what its package may; beyond that, its own package, and any double, which
// lies above what it imitates.
func refuseOwn(dir string, own int, test bool, target string) string {
	floor, known := floorOf(target)
	switch {
	case !known:
		return "that package is on no floor"
	case within(dir, integration) && within(target, integration):
		return ""
	case test && (target == dir || isDouble(target)):
		return ""
	case isDouble(target) && !isDouble(dir) && !within(dir, integration):
		return "a double is for tests, for other doubles and for " + integration
	case floor >= own:
		return fmt.Sprintf("that is floor %d, this is floor %d, and only lower floors may be imported", floor, own)
	}
	return ""
}

// grabBags are names that say nothing of what a package is for, and so gather
// what has no place.
var grabBags = []string{"common", "helper", "helpers", "misc", "pkg", "shared", "types", "util", "utils"}

func checkNames(p *pkg) (all []violation) {
	for element := range strings.SplitSeq(p.dir, "/") {
		if slices.Contains(grabBags, element) {
			all = append(all, violation{p.dir, "the name " + element + " says nothing: name the package for what it is about"})
		}
	}
	for _, f := range p.files {
		name := f.syntax.Name.Name
		if f.test {
			name = strings.TrimSuffix(name, "_test")
		}
		if name != "main" && p.dir != "." && name != path.Base(p.dir) {
			all = append(all, violation{f.path, "package " + name + " should have the name of its folder, " + path.Base(p.dir)})
		}
	}
	return all
}
