package versions

import (
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

// tag returns the image's tag, "" without one.
func (i Image) tag() string {
	name, _, _ := strings.Cut(string(i), "@")
	_, tag, _ := strings.Cut(name[strings.LastIndexByte(name, '/')+1:], ":")
	return tag
}

// Version returns the image's tag in the form v1.2.3, "" if it is no version.
func (i Image) Version() string {
	if v := parse(i.tag()); v != nil {
		return "v" + v.String()
	}
	return ""
}

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

// parse returns nil for a text that is no version of a release. Versions 0.0.x are those of builds between releases.
func parse(text string) *version.Version {
	v, err := version.ParseSemantic(text)
	if err != nil || v.Major() == 0 && v.Minor() == 0 {
		return nil
	}
	return v
}
