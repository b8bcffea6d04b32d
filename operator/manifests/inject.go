package manifests

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
	"github.com/credence-iam/credence/operator/yamledit"
	"github.com/credence-iam/credence/webhook/inject"
)

// templates has the API groups of each kind that has a pod, and the path of the pod in the object.
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

// object is one object of a document: the whole document, or an item of a list.
type object struct {
	kind string
	path []string // in the document
	node *yaml.Node
}

// objects returns the objects of a document that have a pod or are a Namespace, and in passed the objects of other kinds.
func objects(root *yaml.Node) (all, passed []object, err error) {
	left := yamledit.MaxNodes
	var walk func(n *yaml.Node, path []string, group, kind string, depth int) error
	walk = func(n *yaml.Node, path []string, group, kind string, depth int) error {
		if left--; left < 0 {
			return fmt.Errorf("its lists have more than %d objects, aliases resolved; split the document", yamledit.MaxNodes)
		}
		n = yamledit.Value(n)
		if k := yamledit.Text(n, "kind"); k != "" {
			kind, group = k, groupOf(yamledit.Text(n, "apiVersion"))
		}
		if t, ok := templates[kind]; ok && slices.Contains(t.groups, group) || kind == "Namespace" && group == "" {
			all = append(all, object{kind, path, n})
			return nil
		}
		// The items of a list of one kind may omit their kind. kubectl accepts lists in lists, too.
		of, isList := strings.CutSuffix(kind, "List")
		items, _ := yamledit.Child(n, "items")
		if items = yamledit.Value(items); !isList || items == nil || items.Kind != yaml.SequenceNode || depth > 8 {
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

// injection applies the webhook's function to documents.
type injection struct {
	injector   *inject.Injector
	rules      *policy.Rules
	namespace  string // for objects without one
	lookUp     func(ctx context.Context, name string) (policy.Namespace, string, error)
	namespaces map[string]policy.Namespace
	lookUps    int
	unknown    map[string]string // namespaces that lookUp does not know, and why
}

// maxLookUps is far above the namespaces whose manifests anybody injects at once, and takes some seconds.
const maxLookUps = 1000

// namespaceOf returns the namespace of that name. If it is not known, it returns why.
func (in *injection) namespaceOf(ctx context.Context, name string) (ns policy.Namespace, why string, err error) {
	ns, known := in.namespaces[name]
	if known {
		return ns, "", nil
	}
	if name == "" {
		return ns, "its namespace is not known; set --namespace", nil
	}
	if in.lookUp == nil {
		return ns, fmt.Sprintf("namespace %q is not known; set --namespaces", name), nil
	}
	if why, refused := in.unknown[name]; refused {
		return ns, why, nil
	}
	if in.lookUps++; in.lookUps > maxLookUps {
		return ns, "", fmt.Errorf("the documents name more than %d namespaces; use --namespaces", maxLookUps)
	}
	if ns, why, err = in.lookUp(ctx, name); err != nil {
		return ns, "", fmt.Errorf("reading namespace %q: %w", name, err)
	}
	if why != "" {
		in.unknown[name] = why
	} else {
		in.namespaces[name] = ns
	}
	return ns, why, nil
}

// result is the outcome for one document.
type result struct {
	edits    []yamledit.Edit
	messages []string // lines for the user
	refused  bool
}

// metadata has the fields of an object's metadata that the command reads.
type metadata struct {
	Name         string            `json:"name"`
	GenerateName string            `json:"generateName"`
	Namespace    string            `json:"namespace"`
	Labels       map[string]string `json:"labels"`
	Annotations  map[string]string `json:"annotations"`
}

// learn stores the Namespace objects of documents. If two have the same name, the later one counts, as for kubectl apply.
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
				return fmt.Errorf("%s: cannot read the Namespace: %w", d.where(), d.misread(o.path, raw, err))
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

// asJSON returns the document as kubectl sends it to the API server.
func (d *document) asJSON() ([]byte, error) {
	if d.json {
		return d.text[d.head:], nil
	}
	return sigsyaml.YAMLToJSON(yamledit.Terminated(d.text))
}

// at returns the JSON of the value at path. It caches the decoded document in whole.
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

// placed has the operations for the template at a path.
type placed struct {
	template []string
	ops      []inject.Operation
}

// document injects one document. It returns only errors of ctx and of lookUp.
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
		add, messages, err := in.object(ctx, d, &whole, o)
		if failed, ok := errors.AsType[*lookUpError](err); ok {
			return result{}, failed.error
		}
		who := d.where() + ", " + o.name() + ": "
		for _, line := range messages {
			r.messages = append(r.messages, who+line)
		}
		if err != nil {
			r.messages = append(r.messages, who+"refused: "+err.Error())
			r.refused = true
			if whole == nil {
				break // The document cannot be read, so all other objects would have the same message.
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
		note, err := in.passedBy(ctx, d, o)
		if err != nil {
			return result{}, err
		}
		if note != "" {
			r.messages = append(r.messages, d.where()+", "+o.name()+": note: "+note)
		}
	}
	if r.refused || len(adds) == 0 {
		return r, nil
	}
	edits, rewritten, err := in.edit(ctx, d, adds)
	if ended := ctx.Err(); ended != nil {
		return result{}, ended
	}
	if err != nil {
		r.messages = append(r.messages, d.where()+": refused: cannot add the sidecar to the text: "+err.Error())
		r.refused = true
		return r, nil
	}
	if rewritten {
		r.messages = append(r.messages, d.where()+": note: rewritten without anchors and aliases, because the additions belong to a part that they share; white space may differ")
	}
	r.edits = edits
	return r, nil
}

// passedBy returns a note about an object of an unknown kind if it has annotations of Credence that its controller may
// copy to pods. Argo's Rollout and Knative's Service are such kinds. Otherwise it returns "".
func (in *injection) passedBy(ctx context.Context, d *document, o object) (string, error) {
	keys := in.injector.Keys()
	path, n := annotationsOf(o.node, keys.Prefix()+"/")
	if n == nil {
		return "", nil
	}
	kind := o.kind
	if version := yamledit.Text(o.node, "apiVersion"); version != "" {
		kind += " of " + version
	}
	note := fmt.Sprintf("unchanged, because credence inject does not know the kind %s; the webhook injects its pods at their creation, "+
		"if they get the annotations of line %d, %s", kind, d.fileLine(n), keyName(path))
	namespace := yamledit.Text(o.node, "metadata", "namespace")
	if namespace == "" {
		namespace = in.namespace
	}
	ns, why, err := in.namespaceOf(ctx, namespace)
	switch {
	case err != nil:
		return "", err
	case why != "":
		note += ", and their namespace is opted in"
	case !keys.OptedIn(ns.Labels):
		note += fmt.Sprintf(", but namespace %q is not opted in; label it %s=%s", namespace, keys.Name(policy.Inject), policy.Enabled)
	}
	return note, nil
}

// annotationsOf returns the path and the node of the first annotations below n that have a key with the prefix. It skips the
// object's own annotations, because they are not those of pods, and aliases, because their node stands elsewhere in the
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
			if n.Kind == yaml.MappingNode && strings.HasSuffix(strings.ToLower(token), "annotations") && !own && hasPrefix(yamledit.Value(c), prefix, 0) {
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

// hasPrefix reports whether a mapping, or a mapping merged into it, has a key with the prefix.
func hasPrefix(n *yaml.Node, prefix string, depth int) bool {
	if n == nil || depth > 8 {
		return false
	}
	for i := 0; i < len(n.Content); i++ {
		c := n.Content[i]
		switch {
		case n.Kind == yaml.SequenceNode: // a list of merged mappings
			if hasPrefix(yamledit.Value(c), prefix, depth+1) {
				return true
			}
		case n.Kind == yaml.MappingNode && i%2 == 0:
			if strings.HasPrefix(c.Value, prefix) || c.Tag == "!!merge" && hasPrefix(yamledit.Value(n.Content[i+1]), prefix, depth+1) {
				return true
			}
		}
	}
	return false
}

// name names an object in messages.
func (o object) name() string {
	name := yamledit.Text(o.node, "metadata", "name")
	if name == "" {
		if name = yamledit.Text(o.node, "metadata", "generateName"); name != "" {
			name += "*"
		}
	}
	if ns := yamledit.Text(o.node, "metadata", "namespace"); ns != "" {
		name = ns + "/" + name
	}
	return strings.TrimSpace(o.kind + " " + name)
}

// lookUpError is an error of namespaceOf, which refuses no document.
type lookUpError struct{ error }

// object decides on one object. It returns the additions and messages for the user.
func (in *injection) object(ctx context.Context, d *document, whole *any, o object) (add placed, messages []string, err error) {
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
		return placed{}, nil, fmt.Errorf("cannot read it: %w", d.misread(o.path, raw, err))
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
	result, err := in.injector.Inject(pod, namespace)
	if err != nil {
		err = d.misreadPod(template, pod, err)
	}
	keys := in.injector.Keys()
	if !result.Annotated {
		if o.kind != "Pod" && err == nil {
			for name := range meta.Metadata.Annotations {
				if strings.HasPrefix(name, keys.Prefix()+"/") {
					messages = append(messages, fmt.Sprintf("note: annotation %q is on the %s itself and has no effect there; move it to the pod template", name, o.kind))
				}
			}
			slices.Sort(messages)
		}
		return placed{}, messages, err
	}
	if err := d.templated(template, keys.Prefix()+"/"); err != nil {
		return placed{}, nil, err
	}
	ns, why, lookUpErr := in.namespaceOf(ctx, namespace)
	if lookUpErr != nil {
		return placed{}, nil, &lookUpError{lookUpErr}
	}
	if why == "" && !keys.OptedIn(ns.Labels) {
		// The API server does not call the webhook for it.
		return placed{}, []string{fmt.Sprintf("note: unchanged, because namespace %q is not opted in; label it %s=%s", namespace, keys.Name(policy.Inject), policy.Enabled)}, nil
	}
	if err != nil {
		return placed{}, nil, err
	}
	for _, warning := range result.Warnings {
		messages = append(messages, "warning: "+warning)
	}
	if firstPullSecrets(pod, result.Patch) {
		messages = append(messages, "note: it now has imagePullSecrets, so Kubernetes does not add those of its service account; add the ones that it needs")
	}
	if why != "" {
		return placed{template, result.Patch}, append(messages, "note: its role is not checked, because "+why), nil
	}
	if _, err := in.rules.Grant(result.Pod, ns); errors.Is(err, policy.ErrNoBase) {
		messages = append(messages, "note: its role is not checked, because it is not a full ARN; set --base-arn")
	} else if err != nil {
		return placed{}, messages, err
	}
	return placed{template, result.Patch}, messages, nil
}

// firstPullSecrets reports whether ops add imagePullSecrets to a pod without any. Kubernetes adds those of the service account
// only to pods without any. It does so before it calls webhooks, but after the manifest is written.
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

// edit returns the edits that apply adds to the text of a document, and whether they rewrite the whole document. It checks
// that the result has the additions and no other change, and that the webhook would add nothing to it.
func (in *injection) edit(ctx context.Context, d *document, adds []placed) (edits []yamledit.Edit, rewritten bool, err error) {
	edits, err = in.splice(ctx, d, adds)
	if err == nil || d.json || ctx.Err() != nil {
		return edits, false, err
	}
	text, expandErr := yamledit.Expand(d.root)
	if expandErr != nil {
		return nil, false, expandErr
	}
	expanded := &document{file: d.file, text: text}
	if expanded.root, err = yamledit.Parse(text); err != nil {
		return nil, false, err
	}
	if err := sameJSON(ctx, d, expanded, nil); err != nil {
		return nil, false, err
	}
	// The additions were decided for the aliased document. The paths are the same.
	if edits, err = in.splice(ctx, expanded, adds); err != nil {
		return nil, false, err
	}
	whole := yamledit.Apply(text, edits)
	if marks(d.text, "---") {
		whole = append([]byte("---\n"), whole...)
	}
	for line := range bytes.Lines(d.text) {
		if marks(line, "...") { // The next document may begin without "---".
			whole = append(whole, "...\n"...)
		}
	}
	return []yamledit.Edit{{End: len(d.text), Text: string(whole)}}, true, nil
}

// splice is edit for a document that keeps its form.
func (in *injection) splice(ctx context.Context, d *document, adds []placed) ([]yamledit.Edit, error) {
	// Patch a second tree, because d.root must not change.
	parse := yamledit.Parse
	if d.json {
		parse = yamledit.ParseJSON
	}
	root, err := parse(d.text[d.head:])
	if err != nil {
		return nil, err
	}
	tree, err := patched(ctx, root, adds)
	if err != nil {
		return nil, err
	}
	edits, err := yamledit.Splice(d.text[d.head:], tree, d.json)
	if err != nil {
		return nil, err
	}
	for i := range edits {
		edits[i].Start += d.head
		edits[i].End += d.head
	}
	out := &document{file: d.file, text: yamledit.Apply(d.text, edits), head: d.head, json: d.json}
	if out.root, err = parse(out.text[out.head:]); err != nil {
		return nil, fmt.Errorf("reading the result: %w", err)
	}
	if out.root == nil || !yamledit.Same(tree.Root, out.root, false) {
		return nil, yamledit.ErrShape
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
			return nil, fmt.Errorf("the webhook would refuse the result: %w", err)
		}
		if again.Patch != nil {
			return nil, errors.New("the webhook would add to the result")
		}
	}
	return edits, nil
}

// sameJSON returns an error unless the JSON of b equals the JSON of a with adds applied.
func sameJSON(ctx context.Context, a, b *document, adds []placed) error {
	rawA, err := a.asJSON()
	if err != nil {
		return err
	}
	rawB, err := b.asJSON()
	if err != nil {
		return err
	}
	rootA, err := yamledit.ParseJSON(rawA)
	if err != nil {
		return err
	}
	rootB, err := yamledit.ParseJSON(rawB)
	if err != nil {
		return err
	}
	tree, err := patched(ctx, rootA, adds)
	if err != nil {
		return err
	}
	if !yamledit.Same(tree.Root, rootB, true) {
		return yamledit.ErrAliased
	}
	return nil
}

// patched returns the tree of root with adds applied.
func patched(ctx context.Context, root *yaml.Node, adds []placed) (*yamledit.Tree, error) {
	tree := yamledit.NewTree(root)
	for _, add := range adds {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		for _, op := range add.ops {
			if op.Op != "add" {
				return nil, fmt.Errorf("unknown operation %q", op.Op)
			}
			path := slices.Clone(add.template)
			for token := range strings.SplitSeq(strings.TrimPrefix(op.Path, "/"), "/") {
				path = append(path, strings.NewReplacer("~1", "/", "~0", "~").Replace(token))
			}
			if err := tree.Add(path, op.Value); err != nil {
				return nil, err
			}
		}
	}
	return tree, nil
}
