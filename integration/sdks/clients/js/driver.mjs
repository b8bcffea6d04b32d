// What the drivers of both SDKs for JavaScript have in common: the protocol of integration/sdks.

import { createInterface } from 'node:readline';

/**
 * Writes name and version, then reads commands from stdin, one per line, until it ends, and answers
 * each with a line of JSON:
 *
 *   call    what a caller that is kept answers
 *   fresh   what a caller made for this call answers
 *   region  what region answers
 *
 * @param {string} client
 * @param {string} version
 * @param {() => (() => Promise<{arn: string, access_key_id: string}>)} newCaller
 * @param {() => Promise<{region?: string, error?: string}>} region
 * @param {(error: unknown) => {error: string, code: string}} describe what a program sees of an error
 */
export async function drive(client, version, newCaller, region, describe) {
  let kept;
  const commands = {
    call: () => (kept ??= newCaller())(),
    fresh: () => newCaller()(),
    region,
  };
  const write = (line) => process.stdout.write(JSON.stringify(line) + '\n');

  write({ client, version });
  for await (const line of createInterface({ input: process.stdin })) {
    const command = line.trim();
    if (!Object.hasOwn(commands, command)) {
      write({ error: `no such command: ${command}` });
      continue;
    }
    try {
      write(await commands[command]());
    } catch (error) {
      write(describe(error));
    }
  }
}

/** The access key in the Authorization header of a signed request; never more of it. */
export function accessKey(authorization) {
  return /Credential=([^/]+)\//.exec(authorization ?? '')?.[1] ?? '';
}
