#!/bin/sh
# A script of integration/sdks: curl, the plainest client. It does not retry, and its error is the response.
#
# It needs the environment of a pod, and the URL of STS in STS_ENDPOINT. It requests container credentials if
# the environment has their URL, and otherwise instance metadata: version 1 if IMDS_VERSION is 1. It writes the
# name and the version of curl. Then it reads commands from stdin, one per line, and answers each with a line
# of JSON:
#
#   call, fresh  requests credentials, and calls GetCallerIdentity with them
#   region       the region of the metadata service
#
# It never writes a secret key or a session token, and "ps" does not show one.
set -u

# quote writes its input as a JSON string.
quote() { printf '"%s"' "$(tr -d '\000-\037' | sed -e 's/\\/\\\\/g' -e 's/"/\\"/g')"; }

# field NAME: the value of a string in a flat JSON object.
field() { sed -n "s/.*\"$1\":\"\([^\"]*\)\".*/\1/p"; }

# get URL CONFIG...: sends a request, and sets $status (000: no response) and $body. Lines of configuration, which
# may be secret, go to curl's stdin.
get() {
  url=$1
  shift
  printed=$(printf '%s\n' "$@" | curl --silent --show-error --max-time 10 --write-out '\n%{http_code}' --config - "$url" 2>&1)
  status=$(printf '%s' "$printed" | tail -n 1)
  body=$(printf '%s' "$printed" | sed '$d')
}

# fail: answers with the body as the error.
fail() {
  [ "$status" = 000 ] || body="HTTP $status: $body"
  printf '{"error":%s,"code":%s}\n' "$(printf '%s' "$body" | tr '\n' ' ' | quote)" "$(printf '%s' "$body" | field code | quote)"
}

# metadata PATH: calls the metadata service, with a session token unless it is version 1.
metadata() {
  if [ "${IMDS_VERSION:-2}" = 1 ]; then
    get "$AWS_EC2_METADATA_SERVICE_ENDPOINT/latest/$1"
    return
  fi
  get "$AWS_EC2_METADATA_SERVICE_ENDPOINT/latest/api/token" 'request = "PUT"' 'header = "X-aws-ec2-metadata-token-ttl-seconds: 60"'
  [ "$status" = 200 ] || return
  get "$AWS_EC2_METADATA_SERVICE_ENDPOINT/latest/$1" "header = \"X-aws-ec2-metadata-token: $body\""
}

credentials() {
  if [ -n "${AWS_CONTAINER_CREDENTIALS_FULL_URI:-}" ]; then
    get "$AWS_CONTAINER_CREDENTIALS_FULL_URI" "header = \"Authorization: $AWS_CONTAINER_AUTHORIZATION_TOKEN\""
    return
  fi
  metadata meta-data/iam/security-credentials/
  [ "$status" = 200 ] || return
  metadata "meta-data/iam/security-credentials/$body"
}

call() {
  credentials
  if [ "$status" != 200 ]; then fail; return; fi
  key=$(printf '%s' "$body" | field AccessKeyId)
  secret=$(printf '%s' "$body" | field SecretAccessKey)
  token=$(printf '%s' "$body" | field Token)
  get "$STS_ENDPOINT/" "aws-sigv4 = \"aws:amz:$AWS_REGION:sts\"" "user = \"$key:$secret\"" \
    "header = \"X-Amz-Security-Token: $token\"" 'data = "Action=GetCallerIdentity&Version=2011-06-15"'
  if [ "$status" != 200 ]; then fail; return; fi
  arn=$(printf '%s' "$body" | sed -n 's/.*<Arn>\([^<]*\)<.*/\1/p')
  printf '{"arn":%s,"access_key_id":%s,"error":""}\n' "$(printf '%s' "$arn" | quote)" "$(printf '%s' "$key" | quote)"
}

region() {
  metadata meta-data/placement/region
  if [ "$status" != 200 ]; then fail; return; fi
  printf '{"region":%s,"error":""}\n' "$(printf '%s' "$body" | quote)"
}

printf '{"client":"curl","version":"%s"}\n' "$(curl --version | sed -n '1s/^curl \([^ ]*\).*/\1/p')"
while IFS= read -r command; do
  case $command in
    call | fresh) call ;;
    region) region ;;
    *) printf '{"error":"no such command"}\n' ;;
  esac
done
