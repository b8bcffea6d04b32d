package operator

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v3"
	utiljson "k8s.io/apimachinery/pkg/util/json"
	sigsyaml "sigs.k8s.io/yaml"

	"github.com/credence-iam/credence/broker/policy"
	"github.com/credence-iam/credence/webhook/inject"
)

// templates says where in an object of a kind the pod is that it stands for, or makes.
var templates = map[string]struct {
	groups []string
	path   []string
}{
	"Pod":                   {[]string{""}, nil},
	"PodTemplate":           {[]string{""}, []string{"template"}},
	"ReplicationController": {[]string{""}, []string{"spec", "template"}},
	"Deployment":            {[]string{"apps", "extensions"}, []string{"spec", "template"}},
	"DaemonSet":             {[]string{"apps", "extensions"}, []string{"spec", "template"}},
	"ReplicaSet":            {[]string{"apps", "extensions"}, []string{"spec", "template"}},
	"StatefulSet":           {[]string{"apps"}, []string{"spec", "template"}},
	"Job":                   {[]string{"batch"}, []string{"spec", "template"}},
	"CronJob":               {[]string{"batch"}, []string{"spec", "jobTemplate", "spec", "template"}},
}

// object is one object of a document: all of it, or an item of a list.
type object struct {
	kind string
	path []string // in the document
	node *yaml.Node
}

// objects returns those of a document that concern us, and passed, those of kinds that are not known here.
func objects(root *yaml.Node) (all, passed []object, err error) {
	left := maxNodes
	var walk func(n *yaml.Node, path []string, group, kind string, depth int) error
	walk = func(n *yaml.Node, path []string, group, kind string, depth int) error {
		if left--; left < 0 {
			return fmt.Errorf("its lists hold more than %d objects, with those that aliases stand for", maxNodes)
		}
		n = value(n)
		if k := text(n, "kind"); k != "" {
			kind, group = k, groupOf(text(n, "apiVersion"))
		}
		if t, ok := templates[kind]; ok && slices.Contains(t.groups, group) || kind == "Namespace" && group == "" {
			all = append(all, object{kind, path, n})
			return nil
		}
		// The items of a list of one kind need not say which. Lists in lists are taken as kubectl does.
		of, isList := strings.CutSuffix(kind, "List")
		items, _ := child(n, "items")
		if items = value(items); !isList || items == nil || items.Kind != yaml.SequenceNode || depth > 8 {
			if kind != "" && n != nil && n.Kind == yaml.MappingNode {
				passed = append(passed, object{kind, path, n})
			}
			return nil
		}
		for i, item := range items.Content {
			if err := walk(item, append(slices.Clone(path), "items", strconv.Itoa(i)), group, of, depth+1); err != nil {
				return err
			}
		}
		return nil
	}
	if root == nil {
		return nil, nil, nil
	}
	err = walk(root, nil, "", "", 0)
	return all, passed, err
}

func groupOf(apiVersion string) string {
	group, _, ok := strings.Cut(apiVersion, "/")
	if !ok {
		return ""
	}
	return group
}

// injection is the webhook's function on documents.
type injection struct {
	injector   *inject.Injector
	rules      *policy.Rules
	namespace  string // of objects that name none
	namespaces map[string]policy.Namespace
}

// result is what became of a document.
type result struct {
	edits   []edit
	said    []string // lines for whoever runs the command
	refused bool
}

// metadata is what is read of an object.
type metadata struct {
	Name         string            `json:"name"`
	GenerateName string            `json:"generateName"`
	Namespace    string            `json:"namespace"`
	Labels       map[string]string `json:"labels"`
	Annotations  map[string]string `json:"annotations"`
}

// learn takes up the facts of the namespaces among documents. Of two of one name the later counts, as it does
// when they are applied.
func (in *injection) learn(ctx context.Context, documents []*document) error {
	for _, d := range documents {
		var whole any
		for _, o := range d.objects {
			if err := ctx.Err(); err != nil {
				return err
			}
			if o.kind != "Namespace" {
				continue
			}
			raw, err := d.at(&whole, o.path)
			var ns struct {
				Metadata metadata `json:"metadata"`
			}
			if err == nil && raw != nil {
				err = utiljson.Unmarshal(raw, &ns)
			}
			if err != nil || raw == nil {
				return fmt.Errorf("%s: the namespace cannot be read: %w", d.where(), d.misread(o.path, raw, err))
			}
			in.namespaces[ns.Metadata.Name] = policy.Namespace{
				Name: ns.Metadata.Name, Labels: ns.Metadata.Labels, Annotations: ns.Metadata.Annotations,
			}
		}
	}
	return nil
}

// where names a document in messages.
func (d *document) where() string {
	line := d.line
	if d.root != nil {
		line = d.fileLine(d.root)
	}
	return fmt.Sprintf("%s: document %d (line %d)", d.file, d.number, line)
}

// asJSON returns the document as the API server gets it from kubectl.
func (d *document) asJSON() ([]byte, error) {
	if d.json {
		return d.text[d.head:], nil
	}
	return sigsyaml.YAMLToJSON(terminated(d.text))
}

// at returns the JSON of what is at path. It keeps the decoded document in whole.
func (d *document) at(whole *any, path []string) ([]byte, error) {
	if *whole == nil {
		raw, err := d.asJSON()
		if err != nil {
			return nil, err
		}
		decoder := json.NewDecoder(bytes.NewReader(raw))
		decoder.UseNumber()
		if err := decoder.Decode(whole); err != nil {
			return nil, err
		}
	}
	v := *whole
	for _, token := range path {
		switch parent := v.(type) {
		case map[string]any:
			v = parent[token]
		case []any:
			i, err := strconv.Atoi(token)
			if err != nil || i >= len(parent) {
				return nil, nil
			}
			v = parent[i]
		default:
			return nil, nil
		}
	}
	if v == nil {
		return nil, nil
	}
	return json.Marshal(v)
}

// placed is an operation and the template that it is for.
type placed struct {
	template []string
	ops      []inject.Operation
}

// document injects one document. Its error is that of ctx.
func (in *injection) document(ctx context.Context, d *document) (r result, err error) {
	var (
		whole any
		adds  []placed
	)
	for _, o := range d.objects {
		if err := ctx.Err(); err != nil {
			return result{}, err
		}
		if o.kind == "Namespace" {
			continue
		}
		add, said, err := in.object(d, &whole, o)
		who := d.where() + ", " + o.name() + ": "
		for _, line := range said {
			r.said = append(r.said, who+line)
		}
		if err != nil {
			r.said = append(r.said, who+"refused: "+err.Error())
			r.refused = true
			if whole == nil {
				break // none of it can be read: once is enough to try it and to say so
			}
		}
		if len(add.ops) > 0 {
			adds = append(adds, add)
		}
	}
	for _, o := range d.passed {
		if err := ctx.Err(); err != nil {
			return result{}, err
		}
		if note := in.passedBy(d, o); note != "" {
			r.said = append(r.said, d.where()+", "+o.name()+": note: "+note)
		}
	}
	if r.refused || len(adds) == 0 {
		return r, nil
	}
	edits, anew, err := in.edit(ctx, d, adds)
	if ended := ctx.Err(); ended != nil {
		return result{}, ended
	}
	if err != nil {
		r.said = append(r.said, d.where()+": refused: cannot be edited: "+err.Error())
		r.refused = true
		return r, nil
	}
	if anew {
		r.said = append(r.said, d.where()+": note: written anew, because there is no place to add something to what several parts share (anchors, aliases); white space may differ")
	}
	r.edits = edits
	return r, nil
}

// passedBy returns a note about an object of a kind that is not known here, if it has annotations of ours that its
// controller may give to pods, as the templates of Argo's Rollout and Knative's Service have; otherwise "".
func (in *injection) passedBy(d *document, o object) string {
	keys := in.injector.Keys()
	path, n := annotationsOf(o.node, keys.Prefix()+"/")
	if n == nil {
		return ""
	}
	kind := o.kind
	if version := text(o.node, "apiVersion"); version != "" {
		kind += " of " + version
	}
	note := fmt.Sprintf("left as it is, because credence inject does not know pods of kind %s; the webhook injects its pods when they are created, "+
		"if they get the annotations of line %d, %s", kind, d.fileLine(n), keyName(path))
	namespace := text(o.node, "metadata", "namespace")
	if namespace == "" {
		namespace = in.namespace
	}
	ns, known := in.namespaces[namespace]
	switch {
	case !known:
		return note + ", and their namespace is opted in"
	case !keys.OptedIn(ns.Labels):
		return note + fmt.Sprintf(", and namespace %q is opted in, which it is not: label it %s=%s", namespace, keys.Name(policy.Inject), policy.Enabled)
	}
	return note
}

// annotationsOf returns the first annotations below n, and their path, that have a key with the prefix. It leaves out the
// object's own, which are not annotations of pods. It does not follow aliases: their content is written elsewhere in the
// document.
func annotationsOf(n *yaml.Node, prefix string) (path []string, found *yaml.Node) {
	var look func(n *yaml.Node, at []string) bool
	look = func(n *yaml.Node, at []string) bool {
		for i, c := range n.Content {
			token := strconv.Itoa(i)
			if n.Kind == yaml.MappingNode {
				if i%2 == 0 {
					continue
				}
				token = n.Content[i-1].Value
			}
			below := append(slices.Clip(at), token)
			own := len(below) == 2 && below[0] == "metadata"
			if n.Kind == yaml.MappingNode && strings.HasSuffix(strings.ToLower(token), "annotations") && !own && hasPrefix(value(c), prefix, 0) {
				path, found = below, n.Content[i-1]
				return true
			}
			if look(c, below) {
				return true
			}
		}
		return false
	}
	look(n, nil)
	return path, found
}

// hasPrefix reports whether a mapping, or one that is merged into it, has a key with the prefix.
func hasPrefix(n *yaml.Node, prefix string, depth int) bool {
	if n == nil || depth > 8 {
		return false
	}
	for i := 0; i < len(n.Content); i++ {
		c := n.Content[i]
		switch {
		case n.Kind == yaml.SequenceNode: // a list of merged mappings
			if hasPrefix(value(c), prefix, depth+1) {
				return true
			}
		case n.Kind == yaml.MappingNode && i%2 == 0:
			if strings.HasPrefix(c.Value, prefix) || c.Tag == "!!merge" && hasPrefix(value(n.Content[i+1]), prefix, depth+1) {
				return true
			}
		}
	}
	return false
}

// name is how messages name an object.
func (o object) name() string {
	name := text(o.node, "metadata", "name")
	if name == "" {
		if name = text(o.node, "metadata", "generateName"); name != "" {
			name += "*"
		}
	}
	if ns := text(o.node, "metadata", "namespace"); ns != "" {
		name = ns + "/" + name
	}
	return strings.TrimSpace(o.kind + " " + name)
}

// object decides on one object.
func (in *injection) object(d *document, whole *any, o object) (add placed, said []string, err error) {
	raw, err := d.at(whole, o.path)
	var meta struct {
		Metadata struct {
			Namespace   string         `json:"namespace"`
			Annotations map[string]any `json:"annotations"`
		} `json:"metadata"`
	}
	if err == nil && raw != nil {
		err = utiljson.Unmarshal(raw, &meta)
	}
	if err != nil || raw == nil {
		return placed{}, nil, fmt.Errorf("it cannot be read: %w", d.misread(o.path, raw, err))
	}
	template := append(slices.Clone(o.path), templates[o.kind].path...)
	pod, err := d.at(whole, template)
	if err != nil || pod == nil {
		return placed{}, nil, err
	}
	namespace := meta.Metadata.Namespace
	if namespace == "" {
		namespace = in.namespace
	}
	ns, known := in.namespaces[namespace]
	result, err := in.injector.Inject(pod, namespace)
	if err != nil {
		err = d.misreadPod(template, pod, err)
	}
	keys := in.injector.Keys()
	if !result.Annotated {
		if o.kind != "Pod" && err == nil {
			for name := range meta.Metadata.Annotations {
				if strings.HasPrefix(name, keys.Prefix()+"/") {
					said = append(said, fmt.Sprintf("note: annotation %q is on the %s itself, and counts on its pod template only", name, o.kind))
				}
			}
			slices.Sort(said)
		}
		return placed{}, said, err
	}
	if err := d.templated(template, keys.Prefix()+"/"); err != nil {
		return placed{}, nil, err
	}
	if known && !keys.OptedIn(ns.Labels) {
		// The API server would not call the webhook.
		return placed{}, []string{fmt.Sprintf("note: left alone, because namespace %q is not opted in: label it %s=%s", namespace, keys.Name(policy.Inject), policy.Enabled)}, nil
	}
	if err != nil {
		return placed{}, nil, err
	}
	for _, warning := range result.Warnings {
		said = append(said, "warning: "+warning)
	}
	if firstPullSecrets(pod, result.Patch) {
		said = append(said, "note: it has imagePullSecrets now, so that Kubernetes no longer adds those of its service account: add what it needs of them")
	}
	switch {
	case namespace == "":
		said = append(said, "note: its role is not judged, because its namespace is not known: give --namespace")
	case !known:
		said = append(said, fmt.Sprintf("note: its role is not judged, because nothing is known of namespace %q: give --namespaces", namespace))
	default:
		_, err := in.rules.Grant(result.Pod, ns)
		if errors.Is(err, policy.ErrNoBase) {
			said = append(said, "note: its role is not judged, because names are not full ARNs: give --base-arn")
		} else if err != nil {
			return placed{}, said, err
		}
	}
	return placed{template, result.Patch}, said, nil
}

// firstPullSecrets reports whether ops give imagePullSecrets to a pod that has none. Kubernetes adds those of the service
// account to such pods alone, and does so before it calls webhooks, but after manifests are written.
func firstPullSecrets(pod []byte, ops []inject.Operation) bool {
	if !slices.ContainsFunc(ops, func(op inject.Operation) bool { return strings.HasPrefix(op.Path, "/spec/imagePullSecrets") }) {
		return false
	}
	var before struct {
		Spec struct {
			ImagePullSecrets []any `json:"imagePullSecrets"`
		} `json:"spec"`
	}
	return utiljson.Unmarshal(pod, &before) == nil && len(before.Spec.ImagePullSecrets) == 0
}

// edit returns the edits that make the operations in the text of a document, and whether it had to be written
// anew for them. It checks that they come to what the operations do, that nothing else has changed, and that
// the webhook would add nothing more.
func (in *injection) edit(ctx context.Context, d *document, adds []placed) (edits []edit, anew bool, err error) {
	edits, err = in.splice(ctx, d, adds)
	if err == nil || d.json || ctx.Err() != nil {
		return edits, false, err
	}
	text, expandErr := expand(d.root)
	if expandErr != nil {
		return nil, false, expandErr
	}
	expanded := &document{file: d.file, text: text}
	if expanded.root, err = parseYAML(text); err != nil {
		return nil, false, err
	}
	if err := sameJSON(ctx, d, expanded, nil); err != nil {
		return nil, false, err
	}
	// What is being injected was decided by the aliased document; the places are the same.
	if edits, err = in.splice(ctx, expanded, adds); err != nil {
		return nil, false, err
	}
	whole := apply(text, edits)
	if marks(d.text, "---") {
		whole = append([]byte("---\n"), whole...)
	}
	for line := range bytes.Lines(d.text) {
		if marks(line, "...") { // what comes next may not begin with ---
			whole = append(whole, "...\n"...)
		}
	}
	return []edit{{0, len(d.text), string(whole)}}, true, nil
}

// splice is edit for a document that stays as it is written.
func (in *injection) splice(ctx context.Context, d *document, adds []placed) ([]edit, error) {
	// The tree of the document stays as it is: another is patched.
	parse := parseYAML
	if d.json {
		parse = parseJSON
	}
	root, err := parse(d.text[d.head:])
	if err != nil {
		return nil, err
	}
	tree := newPatched(root)
	if err := tree.addAll(ctx, adds); err != nil {
		return nil, err
	}
	text := d.text[d.head:]
	if !d.json {
		text = terminated(text)
	}
	edits, err := splice(text, tree, d.json)
	if err != nil {
		return nil, err
	}
	edits = beforeEnd(edits, d.text[d.head:])
	for i := range edits {
		edits[i].start += d.head
		edits[i].end += d.head
	}
	out := &document{file: d.file, text: apply(d.text, edits), head: d.head, json: d.json}
	if out.root, err = parse(out.text[out.head:]); err != nil {
		return nil, fmt.Errorf("what comes of it cannot be read: %w", err)
	}
	if out.root == nil || !same(tree.root, out.root, false) {
		return nil, errShape
	}
	if err := sameJSON(ctx, d, out, adds); err != nil {
		return nil, err
	}
	var whole any
	for _, add := range adds {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		pod, err := out.at(&whole, add.template)
		if err != nil {
			return nil, err
		}
		again, err := in.injector.Inject(pod, in.namespace)
		if err != nil {
			return nil, fmt.Errorf("the webhook would refuse what comes of it: %w", err)
		}
		if again.Patch != nil {
			return nil, errors.New("the webhook would add to what comes of it")
		}
	}
	return edits, nil
}

// sameJSON returns an error unless the JSON of b is that of a with the operations applied.
func sameJSON(ctx context.Context, a, b *document, adds []placed) error {
	rawA, err := a.asJSON()
	if err != nil {
		return err
	}
	rawB, err := b.asJSON()
	if err != nil {
		return err
	}
	rootA, err := parseJSON(rawA)
	if err != nil {
		return err
	}
	rootB, err := parseJSON(rawB)
	if err != nil {
		return err
	}
	tree := newPatched(rootA)
	if err := tree.addAll(ctx, adds); err != nil {
		return err
	}
	if !same(tree.root, rootB, true) {
		return errAliased
	}
	return nil
}
