import type { QmpClient } from '../qmp/client.js';
import { isObject } from '../qmp/types.js';
import { checkNotAtWork, hasOwnServer, removePlace, runOf } from './names.js';
import { endJob, list, removeExport } from './qemu.js';

/**
 * Takes away what runs that were killed have left in a QEMU.
 *
 * Nothing is lost with it: the dirty bitmaps of users are left as they are until a backup is complete.
 *
 * @returns whether there was something
 * @throws StillframeError ERR_STILLFRAME_LOCKED where such a run is still at work, …_QMP
 */
export async function takeAwayLeftovers(client: QmpClient): Promise<boolean> {
  const ours = (name: unknown): name is string => runOf(name) !== undefined;
  const names = (found: readonly Readonly<Record<string, unknown>>[], key: string): string[] =>
    found.map((one) => one[key]).filter(ours);

  const exports = names(await list(client, 'query-block-exports'), 'id');
  const jobs = names(await list(client, 'query-jobs'), 'id');
  const all = await list(client, 'query-named-block-nodes', { flat: true });
  const nodes = names(all, 'node-name');
  const bitmaps = all.flatMap(({ 'node-name': node, 'dirty-bitmaps': found }) =>
    Array.isArray(found) ? names(found.filter(isObject), 'name').map((name) => ({ node, name })) : [],
  );
  const made = [...exports, ...jobs, ...nodes, ...bitmaps.map(({ name }) => name)];
  const runs = new Set(made.flatMap((name) => runOf(name) ?? []));
  for (const run of runs) checkNotAtWork(run);

  for (const id of exports) await removeExport(client, id);
  for (const id of jobs) await endJob(client, id);
  for (const node of nodes) await client.execute('blockdev-del', { 'node-name': node });
  for (const bitmap of bitmaps) await client.execute('block-dirty-bitmap-remove', bitmap);
  if ([...runs].some(hasOwnServer) && (await list(client, 'query-block-exports')).length === 0) {
    // It may not have come so far as to start it.
    await client.execute('nbd-server-stop').catch(() => undefined);
  }
  for (const run of runs) removePlace(run);
  return runs.size > 0;
}
