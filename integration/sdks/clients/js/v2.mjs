// A script of integration/sdks: the AWS SDK for JavaScript, version 2, which gets no more releases.
//
// Usage: node v2.mjs, beside the node_modules of "npm ci", with the environment of a pod, and the URL of STS
// in STS_ENDPOINT. driver.mjs lists the commands. "region" is unsupported: the SDK takes the region from
// variables and files only. It never writes a secret key or a session token.

import AWS from 'aws-sdk';

import { accessKey, drive } from './driver.mjs';

function newCaller() {
  const sts = new AWS.STS({ endpoint: process.env.STS_ENDPOINT });
  return async () => {
    const request = sts.getCallerIdentity();
    const { Arn: arn } = await request.promise();
    return { arn, access_key_id: accessKey(request.httpRequest.headers.Authorization) };
  };
}

await drive(
  'js-v2',
  AWS.VERSION,
  newCaller,
  async () => ({ error: 'unsupported' }),
  (error) => ({ error: error.message, code: error.code ?? error.name }),
);
