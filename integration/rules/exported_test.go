package rules_test

import (
	"go/ast"
	"go/token"
	"maps"
	"os"
	"path"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// exportedAnyway are exported names that no other folder uses, with the reason why they stay exported.
// A name is written as FOLDER.Name or FOLDER.Type.Method.
var exportedAnyway = map[string]string{}

// calledByOthers are methods that other modules call through an interface, with that interface. The check knows the
// interfaces of this module only.
var calledByOthers = map[string]string{
	"GoString":      "fmt.GoStringer",
	"LogValue":      "slog.LogValuer",
	"UnmarshalJSON": "json.Unmarshaler",
	"Unwrap":        "errors.Is and errors.As",
}

// isProduct reports whether p is a package that a program is built from: neither tests nor a double nor a main.
func isProduct(p *pkg) bool {
	return !within(p.dir, integration) && !isDouble(p.dir) && slices.ContainsFunc(p.files, func(f file) bool {
		return !f.test && !f.generated && f.syntax.Name.Name != "main"
	})
}

// checkExported finds exported names of product packages that no other folder uses. The tests of the package itself
// are no use. A type is used if an exported function, method, field or variable of its package mentions it. The
// constants of an exported type are an enumeration, which is exported as a whole.
func checkExported(packages []*pkg) (all []violation) {
	for _, u := range findUnused(packages) {
		_, anyway := exportedAnyway[u.full()]
		_, called := calledByOthers[u.method()]
		if !anyway && !called {
			all = append(all, violation{u.file, "exports " + u.name + ", which no other folder uses: make it private"})
		}
	}
	return all
}

// checkExceptions finds entries of exceptions and methods that no unused name needs any more.
func checkExceptions(packages []*pkg, exceptions, methods map[string]string) (all []violation) {
	needed := map[string]bool{}
	for _, u := range findUnused(packages) {
		needed[u.full()], needed[u.method()] = true, true
	}
	for _, table := range []map[string]string{exceptions, methods} {
		for _, name := range slices.Sorted(maps.Keys(table)) {
			if !needed[name] {
				all = append(all, violation{name, "needs no exception: remove it from the table"})
			}
		}
	}
	return all
}

func TestExportedExceptions(t *testing.T) {
	packages, _, err := load(os.DirFS("../.."))
	if err != nil {
		t.Fatal(err)
	}
	for _, v := range checkExceptions(packages, exportedAnyway, calledByOthers) {
		t.Error(v)
	}
}

// unused is an exported name that no other folder uses.
type unused struct{ dir, file, name string }

func (u unused) full() string { return u.dir + "." + u.name }

// method returns the name of a method, or "" if the name is not that of a method.
func (u unused) method() string {
	_, method, _ := strings.Cut(u.name, ".")
	return method
}

func findUnused(packages []*pkg) (all []unused) {
	uses := findUses(packages)
	for _, p := range packages {
		if !isProduct(p) {
			continue
		}
		for _, f := range p.files {
			if f.test || f.generated {
				continue
			}
			for _, name := range exported(f.syntax) {
				if !uses.have(p.dir, name) {
					all = append(all, unused{p.dir, f.path, name})
				}
			}
		}
	}
	return all
}

// uses are the names that are used outside of their package.
type uses struct {
	names    map[string]map[string]bool // of package-level objects, by folder
	selected map[string]map[string]bool // folders that select this field or method
	required map[string]bool            // methods of the interfaces of this module
}

func (u *uses) have(dir, name string) bool {
	_, method, ok := strings.Cut(name, ".")
	if !ok {
		return u.names[dir][name]
	}
	others := len(u.selected[method])
	if u.selected[method][dir] {
		others--
	}
	return others > 0 || u.required[method]
}

func findUses(packages []*pkg) *uses {
	u := &uses{names: map[string]map[string]bool{}, selected: map[string]map[string]bool{}, required: map[string]bool{}}
	add := func(to map[string]map[string]bool, key, value string) {
		if to[key] == nil {
			to[key] = map[string]bool{}
		}
		to[key][value] = true
	}
	for _, p := range packages {
		for _, f := range p.files {
			imported := importedFolders(f.syntax)
			ast.Inspect(f.syntax, func(n ast.Node) bool {
				switch n := n.(type) {
				case *ast.SelectorExpr:
					add(u.selected, n.Sel.Name, p.dir)
					if x, ok := n.X.(*ast.Ident); ok && imported[x.Name] != "" && imported[x.Name] != p.dir {
						add(u.names, imported[x.Name], n.Sel.Name)
					}
				case *ast.InterfaceType:
					for _, method := range n.Methods.List {
						for _, name := range method.Names {
							u.required[name.Name] = true
						}
					}
				}
				return true
			})
			if !f.test {
				for name := range mentioned(f.syntax) {
					add(u.names, p.dir, name)
				}
			}
		}
	}
	return u
}

// importedFolders returns the folders of this module that a file imports, by the name that the file gives them.
func importedFolders(f *ast.File) map[string]string {
	folders := map[string]string{}
	for _, spec := range f.Imports {
		full, err := strconv.Unquote(spec.Path.Value)
		dir, ours := strings.CutPrefix(full, module+"/")
		if err != nil || !ours {
			continue
		}
		name := path.Base(dir)
		if spec.Name != nil {
			name = spec.Name.Name
		}
		folders[name] = dir
	}
	return folders
}

// exported returns the exported names that a file declares: Name, or Type.Method if both are exported. It leaves out
// constants of a type of the package.
func exported(f *ast.File) (names []string) {
	for _, decl := range f.Decls {
		switch d := decl.(type) {
		case *ast.FuncDecl:
			if receiver := receiverOf(d); receiver == "" {
				names = append(names, d.Name.Name)
			} else if ast.IsExported(receiver) && d.Name.IsExported() {
				names = append(names, receiver+"."+d.Name.Name)
			}
		case *ast.GenDecl:
			member := false
			for _, spec := range d.Specs {
				switch s := spec.(type) {
				case *ast.TypeSpec:
					names = append(names, s.Name.Name)
				case *ast.ValueSpec:
					if s.Type != nil || len(s.Values) > 0 { // otherwise, it repeats the type of the constant above
						name, own := s.Type.(*ast.Ident)
						member = d.Tok == token.CONST && own && ast.IsExported(name.Name)
					}
					if member {
						continue
					}
					for _, name := range s.Names {
						names = append(names, name.Name)
					}
				}
			}
		}
	}
	return slices.DeleteFunc(names, func(name string) bool { return !ast.IsExported(name) })
}

// receiverOf returns the name of the type that a method belongs to, or "" for a function.
func receiverOf(d *ast.FuncDecl) string {
	if d.Recv == nil {
		return ""
	}
	for expr := d.Recv.List[0].Type; ; {
		switch e := expr.(type) {
		case *ast.StarExpr:
			expr = e.X
		case *ast.IndexExpr:
			expr = e.X
		case *ast.IndexListExpr:
			expr = e.X
		case *ast.Ident:
			return e.Name
		default:
			return ""
		}
	}
}

// mentioned returns the names in the signatures, fields and types that a file exports.
func mentioned(f *ast.File) map[string]bool {
	names := map[string]bool{}
	collect := func(n ast.Node) {
		ast.Inspect(n, func(n ast.Node) bool {
			switch n := n.(type) {
			case *ast.Ident:
				names[n.Name] = true
			case *ast.StructType: // private fields are not for other packages
				for _, field := range n.Fields.List {
					if len(field.Names) == 0 || slices.ContainsFunc(field.Names, (*ast.Ident).IsExported) {
						ast.Inspect(field.Type, func(n ast.Node) bool {
							if name, ok := n.(*ast.Ident); ok {
								names[name.Name] = true
							}
							return true
						})
					}
				}
				return false
			}
			return true
		})
	}
	for _, decl := range f.Decls {
		switch d := decl.(type) {
		case *ast.FuncDecl:
			if receiver := receiverOf(d); d.Name.IsExported() && (receiver == "" || ast.IsExported(receiver)) {
				collect(d.Type)
			}
		case *ast.GenDecl:
			if d.Tok == token.IMPORT {
				continue
			}
			for _, spec := range d.Specs {
				switch s := spec.(type) {
				case *ast.TypeSpec:
					if s.Name.IsExported() {
						collect(s.Type)
					}
				case *ast.ValueSpec:
					if s.Type != nil && slices.ContainsFunc(s.Names, (*ast.Ident).IsExported) {
						collect(s.Type)
					}
				}
			}
		}
	}
	return names
}
