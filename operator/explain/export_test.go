package explain

// AskNode is for tests.
var AskNode = askNode
