package installation

import (
	"cmp"
	"strings"

	appsv1 "k8s.io/api/apps/v1"
	"k8s.io/apimachinery/pkg/util/version"
)

// Image is a reference to a container image, such as registry.example/credence-broker:1.2.3@sha256:….
type Image string

// ImageOf returns the image of a Deployment's container, "" without one.
func ImageOf(d *appsv1.Deployment, container string) Image {
	for _, c := range d.Spec.Template.Spec.Containers {
		if c.Name == container {
			return Image(c.Image)
		}
	}
	return ""
}

// split returns the last part of the image's name, its tag and its digest, each "" without one.
func (i Image) split() (name, tag, digest string) {
	name, digest, _ = strings.Cut(string(i), "@")
	name, tag, _ = strings.Cut(name[strings.LastIndexByte(name, '/')+1:], ":")
	return name, tag, digest
}

// Name returns the last part of the image's name: credence-broker.
func (i Image) Name() string {
	name, _, _ := i.split()
	return name
}

// Tag returns the image's tag, "" without one.
func (i Image) Tag() string {
	_, tag, _ := i.split()
	return tag
}

// Label returns the image's tag or, without one, the beginning of its digest.
func (i Image) Label() string {
	_, tag, digest := i.split()
	return cmp.Or(tag, digest[:min(len(digest), len("sha256:")+12)])
}

// Version returns the image's tag in the form v1.2.3, "" if it is no version.
func (i Image) Version() string {
	if v := parse(i.Tag()); v != nil {
		return "v" + v.String()
	}
	return ""
}

// MaxApart is how many minor versions apart two parts of Credence still work together: docs/upgrade.md.
const MaxApart = 1

// Apart returns how many minor versions a and b are apart. Versions of different major versions are far apart. It returns 0
// if a or b is no version of a release, because then nothing is known.
func Apart(a, b string) int {
	x, y := parse(a), parse(b)
	if x == nil || y == nil {
		return 0
	}
	apart := 1000*(int(x.Major())-int(y.Major())) + int(x.Minor()) - int(y.Minor())
	return max(apart, -apart)
}

// Older reports whether version a is older than b. It returns false if a or b is no version of a release.
func Older(a, b string) bool {
	x, y := parse(a), parse(b)
	return x != nil && y != nil && x.LessThan(y)
}

// OldestKubernetes is the minor version of the oldest API server that Credence supports.
const OldestKubernetes = 30

// OlderKubernetes reports whether a version of Kubernetes such as v1.29.4-eks-1 or 1.30+ is older than 1.minor. It returns
// false for another text.
func OlderKubernetes(text string, minor uint) bool {
	v, err := version.ParseGeneric(text)
	return err == nil && v.LessThan(version.MajorMinor(1, minor))
}

// parse returns nil for a text that is no version of a release. Versions 0.0.x are those of builds between releases.
func parse(text string) *version.Version {
	v, err := version.ParseSemantic(text)
	if err != nil || v.Major() == 0 && v.Minor() == 0 {
		return nil
	}
	return v
}
