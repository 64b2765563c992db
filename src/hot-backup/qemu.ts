import { StillframeError } from '../errors.js';
import type { QmpClient } from '../qmp/client.js';
import { isObject, type JsonObject } from '../qmp/types.js';

const POLL_MS = 20;
/** How long a QEMU may take to end a job or an export. */
const END_MS = 60_000;

/** The objects in the list that a command answers with. */
export async function list(
  client: QmpClient,
  command: string,
  given: JsonObject = {},
): Promise<JsonObject[]> {
  const found = await client.execute(command, given);
  return Array.isArray(found) ? found.filter(isObject) : [];
}

/** Takes an export away; no client is connected to it any more when this resolves. */
export async function removeExport(client: QmpClient, id: string): Promise<void> {
  await client.execute('block-export-del', { id, mode: 'hard' });
  await until(
    `does not let go of the export '${id}'`,
    async () => !(await list(client, 'query-block-exports')).some((one) => one['id'] === id),
  );
}

/** Ends a job, whatever its state; it is forgotten when this resolves. */
export async function endJob(client: QmpClient, id: string): Promise<void> {
  const find = async (): Promise<JsonObject | undefined> =>
    (await list(client, 'query-jobs')).find((job) => job['id'] === id);
  const job = await find();
  if (job === undefined) return;
  if (!ended(job)) await ignoring(client.execute('job-cancel', { id }));
  await until(`does not end the job '${id}'`, async () => {
    const state = await find();
    // It stays where whoever made it said so.
    if (state?.['status'] === 'concluded') await ignoring(client.execute('job-dismiss', { id }));
    return state === undefined;
  });
}

function ended(job: JsonObject): boolean {
  return job['status'] === 'concluded' || job['status'] === 'aborting' || job['status'] === 'null';
}

/** The job may have come further in the meantime, which is then seen by looking at it again. */
async function ignoring(command: Promise<unknown>): Promise<void> {
  await command.catch((error: unknown) => {
    if (!(error instanceof StillframeError) || error.code !== 'ERR_STILLFRAME_QMP') throw error;
  });
}

async function until(what: string, reached: () => Promise<boolean>): Promise<void> {
  const deadline = performance.now() + END_MS;
  while (!(await reached())) {
    if (performance.now() > deadline) {
      throw new StillframeError(
        'ERR_STILLFRAME_QMP',
        `the QEMU ${what} within ${END_MS / 1000} s; the next backup tries again`,
      );
    }
    await new Promise((resolve) => setTimeout(resolve, POLL_MS));
  }
}
