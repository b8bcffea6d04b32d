"""A driver of integration/sdks: the AWS CLI, a new process for each call.

Usage: python3 client.py AWS, where AWS is the aws program of either version. It is started with the
environment of a pod and with STS_ENDPOINT, the URL of the STS to ask. It writes the name and the version
of the CLI, then reads commands from stdin, one per line, until it ends, and answers each with a line
of JSON:

  call, fresh  aws sts get-caller-identity; the error is what it prints. The CLI does not tell which
               key it used.
  region       the region that "aws configure list" shows. Version 2 looks it up in the metadata
               service, version 1 has no such look-up.

It never writes a secret key or a session token.
"""

import json
import os
import re
import subprocess
import sys

TIME_LIMIT = 55  # seconds for one run of the program: less than the runner waits for an answer


def run(*arguments):
    """Runs the CLI and returns its stdout and what it says of an error, which is empty if it has none."""
    try:
        done = subprocess.run(
            [aws, *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=TIME_LIMIT,
        )
    except (OSError, subprocess.TimeoutExpired) as e:
        return "", str(e)
    if done.returncode == 0:
        return done.stdout, ""
    return "", done.stderr.strip() or f"exit status {done.returncode}"


def call():
    out, error = run(
        "sts", "get-caller-identity", "--endpoint-url", os.environ["STS_ENDPOINT"], "--output", "json"
    )
    if error:
        # "An error occurred (AccessDenied) when calling …": only answers of AWS have a code.
        code = re.search(r"An error occurred \((\w+)\)", error)
        return {"error": error, "code": code[1] if code else ""}
    return {"arn": json.loads(out)["Arn"]}


def region():
    out, error = run("configure", "list")
    if error:
        return {"error": error}
    # Columns are the name, the value, where it comes from and a detail; newer ones have colons between.
    row = re.search(r"^ *region[ :]+(<not set>|\S+)[ :]+(\S+)", out, re.MULTILINE)
    if row is None or row[1] == "<not set>":
        return {"error": "unsupported" if version.startswith("1.") else "no region is set or found"}
    return {"region": row[1]}


COMMANDS = {"call": call, "fresh": call, "region": region}


def answer(command):
    if command not in COMMANDS:
        return {"error": f"no such command: {command}"}
    return COMMANDS[command]()


def write(line):
    print(json.dumps(line), flush=True)


if len(sys.argv) != 2:
    sys.exit("usage: client.py AWS")
aws = sys.argv[1]
out, error = run("--version")
found = re.match(r"aws-cli/(\S+)", out)
if found is None:
    sys.exit(f"{aws} --version says no version: {error or out}")
version = found[1]

write({"client": "awscli-v" + version.split(".")[0], "version": version})
for line in sys.stdin:
    write(answer(line.strip()))
