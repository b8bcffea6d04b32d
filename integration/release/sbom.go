//go:build unix

package release

import (
	"bytes"
	"debug/buildinfo"
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"os"
	"path/filepath"
	"runtime/debug"
	"strings"
	"time"

	spdxjson "github.com/spdx/tools-golang/json"
	"github.com/spdx/tools-golang/spdx/v2/common"
	spdx "github.com/spdx/tools-golang/spdx/v2/v2_3"
	"github.com/spdx/tools-golang/spdxlib"
)

// product is something that users install: an image, or the credence command.
type product struct {
	name     string
	image    string // digest; empty if it is no image
	programs []program
}

// program is the product's program for one platform.
type program struct{ platform, path string }

// writeSBOM writes a bill of materials in the form SPDX 2.3. It has the modules that the linker recorded in the programs,
// by their paths, versions and hashes, and Go's standard library.
func (r *release) writeSBOM(p product) error {
	b := &bill{release: r, elements: map[common.ElementID]bool{}, document: &spdx.Document{
		SPDXVersion: spdx.Version, DataLicense: spdx.DataLicense, SPDXIdentifier: "DOCUMENT",
		DocumentName:      p.name + "-" + r.version,
		DocumentNamespace: repository + "/releases/download/" + r.tag() + "/" + p.name + "_" + r.version + sbomSuffix,
		CreationInfo: &spdx.CreationInfo{
			Creators: []common.Creator{{CreatorType: "Organization", Creator: "Credence"}, {CreatorType: "Tool", Creator: "integration/release-" + r.tag()}},
			Created:  r.date.Format(time.RFC3339),
		},
	}}
	root := b.add(common.ElementID("Package-"+p.name), spdx.Package{
		PackageName: p.name, PackageVersion: r.tag(), PrimaryPackagePurpose: "APPLICATION", PackageLicenseDeclared: "Apache-2.0",
		PackageExternalReferences: purl("pkg:golang/" + module + "@" + r.tag()),
	})
	if p.image != "" {
		top := b.document.Packages[0]
		top.PrimaryPackagePurpose = "CONTAINER"
		top.PackageExternalReferences = purl("pkg:oci/" + p.name + "@" + strings.ReplaceAll(p.image, ":", "%3A") + "?repository_url=" + Registry + "/" + p.name)
		top.PackageChecksums = []common.Checksum{{Algorithm: common.SHA256, Value: strings.TrimPrefix(p.image, "sha256:")}}
	}
	b.relate("DOCUMENT", common.TypeRelationshipDescribe, root)
	for _, program := range p.programs {
		if err := b.addProgram(root, program); err != nil {
			return fmt.Errorf("listing the modules of %s: %w", program.path, err)
		}
	}
	// The library checks that relationships name existing elements.
	if err := spdxlib.ValidateDocument(b.document); err != nil {
		return fmt.Errorf("checking the bill of materials of %s: %w", p.name, err)
	}
	var text bytes.Buffer
	if err := spdxjson.Write(b.document, &text, spdxjson.Indent(" ")); err != nil {
		return fmt.Errorf("encoding the bill of materials of %s: %w", p.name, err)
	}
	return r.write(p.name+"_"+r.version+sbomSuffix, text.Bytes())
}

// bill is a bill of materials that is being written.
type bill struct {
	*release

	document *spdx.Document
	elements map[common.ElementID]bool
}

// add adds a package unless it is there, with the fields that are the same in all packages, and returns its ID.
func (b *bill) add(id common.ElementID, p spdx.Package) common.ElementID {
	if b.elements[id] {
		return id
	}
	b.elements[id] = true
	p.PackageSPDXIdentifier, p.IsFilesAnalyzedTagPresent = id, true
	p.PackageDownloadLocation, p.PackageLicenseConcluded, p.PackageCopyrightText = "NOASSERTION", "NOASSERTION", "NOASSERTION"
	if p.PackageLicenseDeclared == "" {
		p.PackageLicenseDeclared = "NOASSERTION"
	}
	b.document.Packages = append(b.document.Packages, &p)
	return id
}

func (b *bill) relate(from common.ElementID, how string, to common.ElementID) {
	b.document.Relationships = append(b.document.Relationships, &spdx.Relationship{
		RefA: common.MakeDocElementID("", string(from)), RefB: common.MakeDocElementID("", string(to)), Relationship: how,
	})
}

// addProgram adds a program and all that was linked into it.
func (b *bill) addProgram(root common.ElementID, p program) error {
	content, err := os.ReadFile(p.path)
	if err != nil {
		return err
	}
	info, err := buildinfo.Read(bytes.NewReader(content))
	if err != nil {
		return fmt.Errorf("reading the build information: %w", err)
	}
	if info.Main.Version != b.tag() {
		return fmt.Errorf("it records the version %s, not %s; build in a clone of the repository, because Go reads no version in a linked work tree, "+
			"and without another tag at this commit", info.Main.Version, b.tag())
	}
	id := b.add(element("Program", p.platform), spdx.Package{
		PackageName: filepath.Base(p.path), PackageVersion: b.tag(), PackageSummary: p.platform, PackageFileName: filepath.Base(p.path),
		PrimaryPackagePurpose: "APPLICATION", PackageLicenseDeclared: "Apache-2.0",
		PackageChecksums:          []common.Checksum{{Algorithm: common.SHA256, Value: sum(content)}},
		PackageExternalReferences: purl("pkg:golang/" + module + "@" + b.tag() + "#" + strings.TrimPrefix(info.Path, module+"/")),
	})
	b.relate(root, common.TypeRelationshipContains, id)
	library := strings.TrimPrefix(info.GoVersion, "go")
	b.relate(id, common.TypeRelationshipDependsOn, b.add(element("Go", library), spdx.Package{
		PackageName: "stdlib", PackageVersion: library, PrimaryPackagePurpose: "LIBRARY", PackageLicenseDeclared: "BSD-3-Clause",
		PackageExternalReferences: purl("pkg:golang/stdlib@" + library),
	}))
	for _, dependency := range info.Deps {
		linked, err := modulePackage(dependency)
		if err != nil {
			return err
		}
		b.relate(id, common.TypeRelationshipDependsOn, b.add(element("Module", linked.PackageName, linked.PackageVersion), linked))
	}
	return nil
}

// modulePackage describes a linked module.
func modulePackage(m *debug.Module) (spdx.Package, error) {
	if m.Replace != nil {
		m = m.Replace
	}
	encoded, ok := strings.CutPrefix(m.Sum, "h1:")
	digest, err := base64.StdEncoding.DecodeString(encoded)
	if !ok || err != nil {
		return spdx.Package{}, fmt.Errorf("module %s has the hash %q, want h1: and base64", m.Path, m.Sum)
	}
	return spdx.Package{
		PackageName: m.Path, PackageVersion: m.Version, PrimaryPackagePurpose: "LIBRARY",
		// A hash of Go is the SHA-256 of a list of the module's files and their hashes.
		PackageChecksums:          []common.Checksum{{Algorithm: common.SHA256, Value: hex.EncodeToString(digest)}},
		PackageExternalReferences: purl("pkg:golang/" + m.Path + "@" + m.Version),
	}, nil
}

// element returns an ID of these parts. IDs have only letters, digits, dots and hyphens.
func element(parts ...string) common.ElementID {
	return common.ElementID(strings.Map(func(c rune) rune {
		if c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || c == '.' {
			return c
		}
		return '-'
	}, strings.Join(parts, "-")))
}

// purl returns a package URL, by which scanners find vulnerabilities.
func purl(locator string) []*spdx.PackageExternalReference {
	// Plus signs stand in versions such as v2.0.0+incompatible.
	return []*spdx.PackageExternalReference{{Category: "PACKAGE-MANAGER", RefType: "purl", Locator: strings.ReplaceAll(locator, "+", "%2B")}}
}
