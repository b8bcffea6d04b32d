// A driver of integration/sdks: the AWS SDK for JavaScript, version 3.
//
// Usage: node v3.mjs, beside the node_modules that "npm ci" makes. It is started with the environment of
// a pod and with STS_ENDPOINT, the URL of the STS to ask. driver.mjs tells the commands. The region is that
// of a client which is told none. It never writes a secret key or a session token.

import { readFileSync } from 'node:fs';

import { GetCallerIdentityCommand, STSClient } from '@aws-sdk/client-sts';

import { accessKey, drive } from './driver.mjs';

const manifest = new URL('node_modules/@aws-sdk/client-sts/package.json', import.meta.url);

const newClient = () => new STSClient({ endpoint: process.env.STS_ENDPOINT });

function newCaller() {
  const sts = newClient();
  let key = '';
  // The step after the one that signs: the request is as it is sent.
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
