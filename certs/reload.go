package certs

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"sync"
)

// maxFile bounds one file, in bytes. These files are mounted from a Secret or ConfigMap, for which the API server accepts at
// most 1 MiB of data.
const maxFile = 1 << 20

// digest identifies the content of all files of a reloader. Storing it instead of the content avoids a second copy of a
// private key in memory.
type digest [sha256.Size]byte

// reloader stores the last good value that parse made from its files. The zero value has no value and returns an error.
type reloader[T any] struct {
	what  string // for logs and errors: "key pair", "roots"
	files []string
	parse func(contents [][]byte) (*T, error)
	log   *slog.Logger

	mu         sync.Mutex                // guards all below; concurrent handshakes read the files one at a time
	allow      func(good, next *T) error // returns why next must not replace good yet; nil allows all
	good       *T
	goodSum    digest // of the content that good was made from
	pending    *T     // the value that allow refused last, so that it is parsed once; nil if there is none
	pendingSum digest
	err        error // why the last read of the files did not give good; nil if it did
	warned     failure
}

// failure identifies a logged failure. sum is zero if the files could not be read.
type failure struct {
	sum digest
	err string
}

// newReloader reads the files for the first time. Its error should stop the program.
func newReloader[T any](what string, files []string, log *slog.Logger, parse func([][]byte) (*T, error)) (*reloader[T], error) {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	r := &reloader[T]{what: what, files: files, parse: parse, log: log}
	v, sum, err := r.load()
	if err != nil {
		return nil, fmt.Errorf("loading %s: %w", what, err)
	}
	r.good, r.goodSum = v, sum
	return r, nil
}

// current returns the value of the files now, or the last good value if the files are bad. It returns nil only from the zero
// value. stale is the reason why v is not the value of the files.
func (r *reloader[T]) current() (v *T, stale error) {
	if r == nil {
		return nil, errors.New("certs: zero value: use NewKeyPair or NewRoots")
	}
	r.mu.Lock()
	defer r.mu.Unlock()

	v, sum, err := r.load()
	if err != nil {
		// The kubelet may have replaced all files between the reads of two of them. A second read sees only new files.
		v, sum, err = r.load()
	}
	if err != nil {
		r.err = fmt.Errorf("reloading %s: %w", r.what, err)
		if f := (failure{sum, err.Error()}); f != r.warned {
			r.warned = f
			r.log.Warn("Could not reload certificates, keeping the last good ones",
				"what", r.what, "files", r.files, "error", err)
		}
		return r.good, r.err
	}
	if sum != r.goodSum && r.allow != nil {
		if reason := r.allow(r.good, v); reason != nil {
			r.pending, r.pendingSum = v, sum
			r.err = fmt.Errorf("reloading %s: %w: %w", r.what, ErrPending, reason)
			if f := (failure{sum, ErrPending.Error()}); f != r.warned { // once, although the text of reason may change with time
				r.warned = f
				r.log.Info("Found new certificates that are pending, keeping the present ones",
					"what", r.what, "files", r.files, "reason", reason)
			}
			return r.good, r.err
		}
	}
	if sum != r.goodSum || r.err != nil {
		r.log.Info("Reloaded certificates", "what", r.what, "files", r.files)
	}
	r.good, r.goodSum, r.pending, r.err, r.warned = v, sum, nil, nil, failure{}
	return r.good, nil
}

// load reads the files. It parses them only if good and pending were made from other content.
func (r *reloader[T]) load() (*T, digest, error) {
	contents := make([][]byte, len(r.files))
	hash := sha256.New()
	for i, name := range r.files {
		data, err := readFile(name)
		if err != nil {
			return nil, digest{}, err
		}
		contents[i] = data
		// With the length, a byte that moves from one file to the next changes the digest.
		hash.Write(binary.BigEndian.AppendUint64(nil, uint64(len(data))))
		hash.Write(data)
	}
	sum := digest(hash.Sum(nil))
	if r.good != nil && sum == r.goodSum {
		return r.good, sum, nil
	}
	if r.pending != nil && sum == r.pendingSum {
		return r.pending, sum, nil
	}
	for i, data := range contents {
		if err := whole(data); err != nil {
			return nil, sum, fmt.Errorf("parsing %s: %w", r.files[i], err)
		}
	}
	v, err := r.parse(contents)
	return v, sum, err
}

// readFile is os.ReadFile with a limit.
func readFile(name string) ([]byte, error) {
	f, err := os.Open(name) //nolint:gosec // G304: flags name these files
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err != nil {
		return nil, fmt.Errorf("reading %s: %w", name, err)
	}
	if len(data) > maxFile {
		return nil, fmt.Errorf("reading %s: longer than %d bytes, the maximum of a Secret or ConfigMap", name, maxFile)
	}
	return data, nil
}

// whole refuses a partly written file. The decoder of encoding/pem skips a block without an end like a comment, so that a
// bundle cut in the middle would be a good bundle with fewer roots.
func whole(data []byte) error {
	begun := bytes.Count(data, []byte("-----BEGIN "))
	for rest := data; ; begun-- {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			break
		}
	}
	if begun != 0 {
		return errors.New("a PEM block is malformed or incomplete")
	}
	return nil
}
