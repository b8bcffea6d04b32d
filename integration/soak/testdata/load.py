# Uses botocore all the time, and never gives up. "kept" uses one session for all calls, as a service does. "new" makes a
# session for each call, as each start of the AWS CLI does, and so calls the sidecar for each. The lines are those of the
# program sdk.
import os
import sys
import time

import botocore.session
from botocore.config import Config
from botocore.exceptions import ClientError, CredentialRetrievalError, MetadataRetrievalError, NoCredentialsError

config = Config(connect_timeout=5, read_timeout=5)


def client():
    session = botocore.session.Session()
    if session.get_credentials() is None:
        raise NoCredentialsError()
    return session.create_client(
        "sts", region_name=os.environ["AWS_REGION"], endpoint_url=os.environ["AWS_ENDPOINT_URL_STS"], config=config
    )


mode, pause = sys.argv[1], float(sys.argv[2])
kept, calls = None, 0
while True:
    calls += 1
    try:
        if mode == "new" or kept is None:
            kept = client()
        kept.get_caller_identity()
    except (ClientError, CredentialRetrievalError, MetadataRetrievalError, NoCredentialsError) as e:
        print("FAILED credentials", " ".join(repr(e).split()), flush=True)
    except Exception as e:
        print("FAILED network", " ".join(repr(e).split()), flush=True)
    if calls % 10 == 0 or mode == "new":
        print("calls", calls, flush=True)
    time.sleep(pause)
