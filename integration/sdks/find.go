//go:build unix

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// find returns the first command on this machine whose script runs s, and the version that it reports.
func (l *lab) find(ctx context.Context, root string, s sdk) (command []string, version string, err error) {
	err = fmt.Errorf("no %s was found", s.runtime)
	for _, command := range s.commands(root) {
		script, startErr := l.start(ctx, &row{command: command}, []string{"PATH=" + os.Getenv("PATH")}, "finder")
		if startErr != nil { // such as a python3 without botocore
			err = errors.Join(err, startErr)
			continue
		}
		script.stop()
		version := strings.TrimPrefix(script.Version, "v")
		if strings.HasPrefix(s.name, script.Client) && s.accepts(version) {
			return command, version, nil
		}
		err = errors.Join(err, fmt.Errorf("%q runs %s %s", command, script.Client, version))
	}
	return nil, "", err
}

// commands returns the commands that may run s.
func (s sdk) commands(root string) (commands [][]string) {
	script := filepath.Join(root, s.script)
	if s.runtime == "" {
		return [][]string{append([]string{script}, s.args...)}
	}
	for _, program := range programs(s.runtime) {
		command := append([]string{program, script}, s.args...)
		if s.runtime == "aws" { // its script is in Python
			command = []string{"python3", script, program}
		}
		commands = append(commands, command)
	}
	return commands
}

// programs returns the programs of that name in the folders of PATH and in /usr/bin, each once.
func programs(name string) (paths []string) {
	for _, dir := range append(filepath.SplitList(os.Getenv("PATH")), "/usr/bin") {
		path := filepath.Join(dir, name)
		if info, err := os.Stat(path); err == nil && info.Mode().IsRegular() && info.Mode()&0o111 != 0 && !slices.Contains(paths, path) {
			paths = append(paths, path)
		}
	}
	return paths
}

// accepts reports whether s is about a version.
func (s sdk) accepts(version string) bool {
	n := numbers(version)
	return n != nil && slices.Compare(n, numbers(s.from)) >= 0 && (s.before == "" || slices.Compare(n, numbers(s.before)) < 0)
}

// numbers returns the first three parts of a version; nil if it has fewer.
func numbers(version string) (n []int) {
	parts := strings.SplitN(version, ".", 4)
	if len(parts) < 3 {
		return nil
	}
	for _, part := range parts[:3] {
		i, err := strconv.Atoi(part)
		if err != nil {
			return nil
		}
		n = append(n, i)
	}
	return n
}
