package program

import "runtime/debug"

// Version returns the version of the built module, or the commit if there is no version.
func Version() string {
	build, ok := debug.ReadBuildInfo()
	if !ok {
		return "unknown"
	}
	for _, setting := range build.Settings {
		if setting.Key == "vcs.revision" && build.Main.Version == "(devel)" {
			return setting.Value
		}
	}
	return build.Main.Version
}
