package client

// CallTimeout is for tests.
const CallTimeout = callTimeout
