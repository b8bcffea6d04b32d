package program

import "runtime/debug"

// Version is the version of the module that was built, or the commit where there is none.
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
