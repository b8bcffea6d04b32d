"""A script of integration/sdks: botocore, the core of boto3 and of the AWS CLI.

Usage: python3 client.py, with the botocore of that python3, the environment of a pod, and the URL of
STS in STS_ENDPOINT. The script writes the name and the version of the SDK. Then it reads commands from
stdin, one per line, and answers each with a line of JSON:

  call    calls GetCallerIdentity, always with the same session and client
  fresh   calls GetCallerIdentity with a new session and client
  region  looks the region up in the metadata service. By itself botocore does this only for
          defaults_mode=auto; without a region, most clients fail with NoRegionError.

It never writes a secret key or a session token.
"""

import json
import os
import re
import sys

import botocore
import botocore.session
from botocore.exceptions import ClientError
from botocore.utils import IMDSRegionProvider


class Caller:
    """A session with a client for STS, and the key that signed the last request."""

    def __init__(self):
        self.key = ""
        self.sts = botocore.session.Session().create_client(
            "sts", endpoint_url=os.environ["STS_ENDPOINT"]
        )
        self.sts.meta.events.register("before-send.sts.GetCallerIdentity", self.remember)

    def remember(self, request, **_):
        authorization = request.headers["Authorization"]
        if isinstance(authorization, bytes):
            authorization = authorization.decode()
        self.key = re.search("Credential=([^/]+)/", authorization)[1]

    def call(self):
        self.key = ""
        return {"arn": self.sts.get_caller_identity()["Arn"], "access_key_id": self.key}


kept = []  # the caller of "call"


def call():
    if not kept:
        kept.append(Caller())
    return kept[0].call()


def fresh():
    return Caller().call()


def region():
    found = IMDSRegionProvider(botocore.session.Session()).provide()
    if found is None:
        return {"error": "None: the metadata service has no region"}
    return {"region": found}


COMMANDS = {"call": call, "fresh": fresh, "region": region}


def answer(command):
    if command not in COMMANDS:
        return {"error": f"no such command: {command}"}
    try:
        return COMMANDS[command]()
    except ClientError as e:
        return {"error": str(e), "code": e.response["Error"]["Code"]}
    except Exception as e:  # as the caller of an SDK sees it
        return {"error": str(e), "code": type(e).__name__}


def write(line):
    print(json.dumps(line), flush=True)


write({"client": "botocore", "version": botocore.__version__})
for line in sys.stdin:
    write(answer(line.strip()))
