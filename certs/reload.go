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

// maxFile bounds one file, in bytes: the API server accepts no more than 1 MiB
// as the data of a Secret or a ConfigMap, and these files are mounted from them.
const maxFile = 1 << 20

// digest identifies the content of all files of a reloader. It is kept in
// place of the content, so that no second copy of a private key stays in memory.
type digest [sha256.Size]byte

// reloader holds the last good value that parse made of its files.
// The zero value has none, and says so.
type reloader[T any] struct {
	what  string // for logs and errors: "key pair", "roots"
	files []string
	parse func(contents [][]byte) (*T, error)
	log   *slog.Logger

	mu         sync.Mutex                // guards all below; concurrent handshakes read one after the other
	allow      func(good, next *T) error // why next must not replace good yet; nil if nothing is held back
	good       *T
	goodSum    digest // of the content that good was made of
	pending    *T     // what allow refused last, so that it is parsed once; nil if nothing is held back
	pendingSum digest
	err        error // why good is not what the files held when last read; nil if it is
	warned     failure
}

// failure tells one logged failure from the next. sum is zero if the files
// could not be read.
type failure struct {
	sum digest
	err string
}

// newReloader reads the files for the first time, when an error may still stop
// the program.
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

// current returns what the files hold now, or, while that is of no use, the
// last good value. It returns nil only if there never was one; stale says why
// the value is not what the files hold.
func (r *reloader[T]) current() (v *T, stale error) {
	if r == nil {
		return nil, errors.New("certs: zero value: use NewKeyPair or NewRoots")
	}
	r.mu.Lock()
	defer r.mu.Unlock()

	v, sum, err := r.load()
	if err != nil {
		// The kubelet may have swapped all files between the reads of two:
		// the next read then shows them whole.
		v, sum, err = r.load()
	}
	if err != nil {
		r.err = fmt.Errorf("reloading %s: %w", r.what, err)
		if f := (failure{sum, err.Error()}); f != r.warned {
			r.warned = f
			r.log.Warn("keeping the last good certificates: the files changed to something unusable",
				"what", r.what, "files", r.files, "error", err)
		}
		return r.good, r.err
	}
	if sum != r.goodSum && r.allow != nil {
		if why := r.allow(r.good, v); why != nil {
			r.pending, r.pendingSum = v, sum
			r.err = fmt.Errorf("reloading %s: %w: %w", r.what, ErrPending, why)
			if f := (failure{sum, ErrPending.Error()}); f != r.warned { // once, though why may count the minutes
				r.warned = f
				r.log.Info("keeping the present certificates for a while: the new ones are held back",
					"what", r.what, "files", r.files, "why", why)
			}
			return r.good, r.err
		}
	}
	if sum != r.goodSum || r.err != nil {
		r.log.Info("certificates reloaded", "what", r.what, "files", r.files)
	}
	r.good, r.goodSum, r.pending, r.err, r.warned = v, sum, nil, nil, failure{}
	return r.good, nil
}

// load reads the files, and parses them unless they hold what good or held was made of.
func (r *reloader[T]) load() (*T, digest, error) {
	contents := make([][]byte, len(r.files))
	hash := sha256.New()
	for i, name := range r.files {
		data, err := readFile(name)
		if err != nil {
			return nil, digest{}, err
		}
		contents[i] = data
		// The length keeps a byte that moved from one file to the next from
		// giving the same digest.
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

// readFile is os.ReadFile with a bound.
func readFile(name string) ([]byte, error) {
	f, err := os.Open(name) //nolint:gosec // G304: the operator names these files by flags
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err != nil {
		return nil, fmt.Errorf("reading %s: %w", name, err)
	}
	if len(data) > maxFile {
		return nil, fmt.Errorf("reading %s: longer than %d bytes, the most that a Secret or ConfigMap can hold", name, maxFile)
	}
	return data, nil
}

// whole refuses a file that was caught half-written. The decoder of encoding/pem
// passes over a block without an end as if it were a comment: a bundle cut in
// the middle would otherwise be a good bundle of fewer roots.
func whole(data []byte) error {
	begun := bytes.Count(data, []byte("-----BEGIN "))
	for rest := data; ; begun-- {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			break
		}
	}
	if begun != 0 {
		return errors.New("holds a PEM block that is malformed or cut short")
	}
	return nil
}
