// The protocol of integration/sdks, for the scripts of both SDKs for JavaScript.

import { createInterface } from 'node:readline';

/**
 * Writes name and version. Then reads commands from stdin, one per line, and answers each with a line of
 * JSON:
 *
 *   call    the result of always the same caller
 *   fresh   the result of a new caller
 *   region  the result of region
 *
 * @param {string} client
 * @param {string} version
 * @param {() => (() => Promise<{arn: string, access_key_id: string}>)} newCaller
 * @param {() => Promise<{region?: string, error?: string}>} region
 * @param {(error: unknown) => {error: string, code: string}} describe an error as the caller of an SDK sees it
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

/** The access key in the Authorization header of a signed request. */
export function accessKey(authorization) {
  return /Credential=([^/]+)\//.exec(authorization ?? '')?.[1] ?? '';
}
