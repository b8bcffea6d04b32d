package program

import (
	"os"
	"path/filepath"
	"testing"
)

func TestCgroupMemory(t *testing.T) {
	for name, tt := range map[string]struct {
		self  string
		files map[string]string
		want  int64
	}{
		"version 2":                 {"0::/pod/c\n", map[string]string{"pod/c/memory.max": "268435456\n", "memory.max": "1\n"}, 268435456},
		"version 2, in a container": {"0::/\n", map[string]string{"memory.max": "268435456\n"}, 268435456},
		"version 2, unlimited":      {"0::/\n", map[string]string{"memory.max": "max\n"}, 0},
		"version 1":                 {"12:cpu:/x\n5:memory:/pod/c\n1:name=systemd:/x\n", map[string]string{"memory/pod/c/memory.limit_in_bytes": "1048576"}, 1048576},
		"version 1, in a container": {"5:memory:/pod/c\n", map[string]string{"memory/memory.limit_in_bytes": "1048576"}, 1048576},
		"version 1, unlimited":      {"5:memory:/\n", map[string]string{"memory/memory.limit_in_bytes": "9223372036854771712"}, 0},
		"both":                      {"5:memory:/\n0::/x\n", map[string]string{"memory/memory.limit_in_bytes": "1048576"}, 1048576},
		"no limit file":             {"0::/pod\n", nil, 0},
		"invalid":                   {"x\n0::/\n", map[string]string{"memory.max": "-1"}, 0},
	} {
		t.Run(name, func(t *testing.T) {
			root := t.TempDir()
			for file, text := range tt.files {
				file = filepath.Join(root, "fs", file)
				if err := os.MkdirAll(filepath.Dir(file), 0o700); err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			self := filepath.Join(root, "self")
			if err := os.WriteFile(self, []byte(tt.self), 0o600); err != nil {
				t.Fatal(err)
			}
			if got := cgroupMemory(self, filepath.Join(root, "fs")); got != tt.want {
				t.Errorf("limit = %d, want %d", got, tt.want)
			}
		})
	}
	if got := cgroupMemory(filepath.Join(t.TempDir(), "none"), "/"); got != 0 {
		t.Errorf("without cgroups, limit = %d, want 0", got)
	}
}
