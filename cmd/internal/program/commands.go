package program

import (
	"fmt"
	"io"
	"os"
	"strings"
)

// Command is one command of a program with several commands. [Program.Command] makes it.
type Command struct {
	name, summary string
	main          func(args []string, stdout, stderr io.Writer) int
}

// Command returns p as a command. Its name is the last word of p.Name. The summary is one line.
func (p Program[O]) Command(summary string) Command {
	return Command{name: p.Name[strings.LastIndexByte(p.Name, ' ')+1:], summary: summary, main: p.main}
}

// Commands is a program whose first argument is the name of a command.
type Commands struct {
	// Name begins the program's messages.
	Name string
	// Usage says in a few lines what the program does and how to call it. The list of commands follows it.
	Usage string
	// Commands are the commands.
	Commands []Command
}

// Main runs the command that the process's first argument names, and exits like [Program.Main].
func (c Commands) Main() {
	os.Exit(c.main(os.Args[1:], os.Stdout, os.Stderr))
}

func (c Commands) main(args []string, stdout, stderr io.Writer) int {
	problem := "a command is missing"
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
			problem = fmt.Sprintf("unknown command %q", first)
		}
	}
	_, _ = fmt.Fprintf(stderr, "%s: %s\n%s: --help lists the commands\n", c.Name, problem, c.Name)
	return exitUsage
}
