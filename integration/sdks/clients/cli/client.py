"""A script of integration/sdks: the AWS CLI, a new process for each call.

Usage: python3 client.py AWS, where AWS is the aws program of either version, with the environment of a
pod, and the URL of STS in STS_ENDPOINT. The script writes the name and the version of the CLI. Then it
reads commands from stdin, one per line, and answers each with a line of JSON:

  call, fresh  aws sts get-caller-identity; the error is its output. The CLI does not show its key.
  region       the region in "aws configure list". Version 2 looks it up in the metadata service,
               version 1 does not.

It never writes a secret key or a session token.
"""

import json
import os
import re
import subprocess
import sys

TIME_LIMIT = 55  # seconds for one run of the program: less than the runner waits


def run(*arguments):
    """Runs the CLI and returns its stdout and its error; an empty error means success."""
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
        # "An error occurred (AccessDenied) when calling …": only errors from AWS have a code.
        code = re.search(r"An error occurred \((\w+)\)", error)
        return {"error": error, "code": code[1] if code else ""}
    return {"arn": json.loads(out)["Arn"]}


def region():
    out, error = run("configure", "list")
    if error:
        return {"error": error}
    # The columns are name, value, source and a detail; newer versions put colons between them.
    row = re.search(r"^ *region[ :]+(<not set>|\S+)[ :]+(\S+)", out, re.MULTILINE)
    if row is None or row[1] == "<not set>":
        return {"error": "unsupported" if version.startswith("1.") else "no region was found"}
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
    sys.exit(f"{aws} --version prints no version: {error or out}")
version = found[1]

write({"client": "awscli-v" + version.split(".")[0], "version": version})
for line in sys.stdin:
    write(answer(line.strip()))
