// A script of integration/sdks: the AWS SDK for JavaScript, version 3.
//
// Usage: node v3.mjs, beside the node_modules of "npm ci", with the environment of a pod, and the URL of STS
// in STS_ENDPOINT. driver.mjs lists the commands. "region" is the region of a client without a configured
// one. It never writes a secret key or a session token.

import { readFileSync } from 'node:fs';

import { GetCallerIdentityCommand, STSClient } from '@aws-sdk/client-sts';

import { accessKey, drive } from './driver.mjs';

const manifest = new URL('node_modules/@aws-sdk/client-sts/package.json', import.meta.url);

const newClient = () => new STSClient({ endpoint: process.env.STS_ENDPOINT });

function newCaller() {
  const sts = newClient();
  let key = '';
  // After the step that signs the request.
  sts.middlewareStack.add(
    (next) => (args) => {
      key = accessKey(args.request.headers.authorization);
      return next(args);
    },
    { step: 'deserialize' },
  );
  return async () => {
    const { Arn: arn } = await sts.send(new GetCallerIdentityCommand({}));
    return { arn, access_key_id: key };
  };
}

await drive(
  'js-v3',
  JSON.parse(readFileSync(manifest)).version,
  newCaller,
  async () => ({ region: await newClient().config.region() }),
  (error) => ({ error: error.message, code: error.name }),
);
