package trust

// Names for tests.
const (
	DropAnnotation = dropAnnotation
	FieldManager   = fieldManager
)

// Leading reports whether this replica publishes.
func (t *Trust) Leading() bool { return t.leading.Load() }
