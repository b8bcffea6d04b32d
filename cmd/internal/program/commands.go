package program

import (
	"fmt"
	"io"
	"os"
	"strings"
)

// Command is one of the commands of a program that does several things. [Program.Command] makes it.
type Command struct {
	name, summary string
	main          func(args []string, stdout, stderr io.Writer) int
}

// Command returns p as the command that is called by the last word of its name, with a summary of one line.
func (p Program[O]) Command(summary string) Command {
	return Command{name: p.Name[strings.LastIndexByte(p.Name, ' ')+1:], summary: summary, main: p.main}
}

// Commands is a program that is called with the name of a command first.
type Commands struct {
	// Name is the program's name, as its messages begin.
	Name string
	// Usage says in a few lines what it is for and how it is called. The commands are listed below it.
	Usage string
	// Commands are what it can do.
	Commands []Command
}

// Main runs the command that the process's arguments name, and exits as [Program.Main] does.
func (c Commands) Main() {
	os.Exit(c.main(os.Args[1:], os.Stdout, os.Stderr))
}

func (c Commands) main(args []string, stdout, stderr io.Writer) int {
	what := "which command?"
	if len(args) > 0 {
		switch first := args[0]; first {
		case "-h", "-help", "--help", "help":
			_, _ = io.WriteString(stdout, c.Usage+"\n\nCommands:\n")
			for _, command := range c.Commands {
				_, _ = fmt.Fprintf(stdout, "  %-10s %s\n", command.name, command.summary)
			}
			return 0
		case "-version", "--version":
			_, _ = fmt.Fprintln(stdout, c.Name, Version())
			return 0
		default:
			for _, command := range c.Commands {
				if command.name == first {
					return command.main(args[1:], stdout, stderr)
				}
			}
			what = fmt.Sprintf("there is no command %q", first)
		}
	}
	_, _ = fmt.Fprintf(stderr, "%s: %s\n%s: --help lists the commands\n", c.Name, what, c.Name)
	return exitUsage
}
