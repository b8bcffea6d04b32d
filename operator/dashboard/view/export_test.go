package view

// Short and Meanings are for the tests.
var (
	Short    = short
	Meanings = meanings
)

func (m meaning) Text() string { return m.text }
