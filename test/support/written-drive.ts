/** A drive that a client writes to and verifies while the daemon changes what it lies on. */
import { type ChildProcess, spawn, spawnSync } from 'node:child_process';
import { mkdtempSync } from 'node:fs';
import { join } from 'node:path';
import { expect } from 'vitest';
import { CLI } from './cli.js';
import { tool } from './nbd-client.js';
import { QmpClient } from './qmp.js';

/** A daemon with one drive of 64 MiB, exported as `live`. */
export async function startDaemon(folder: string): Promise<{
  readonly client: QmpClient;
  readonly place: string;
  readonly end: () => Promise<void>;
}> {
  const place = mkdtempSync(join(folder, 'daemon-'));
  spawnSync(process.execPath, [CLI, 'create', '-f', 'qcow2', join(place, 'a.qcow2'), '64M']);
  const daemon: ChildProcess = spawn(
    process.execPath,
    [
      ...[CLI, 'daemon', '--chardev', 'socket,id=c,path=q.sock,server=on,wait=off', '--monitor', 'c'],
      ...['--blockdev', 'driver=qcow2,node-name=a,discard=unmap,file.driver=file,file.filename=a.qcow2'],
      ...['--nbd-server', 'addr.type=unix,addr.path=n.sock'],
      ...['--export', 'nbd,id=live,node-name=a,name=live,writable=on'],
    ],
    { cwd: place, stdio: ['ignore', 'ignore', 'inherit'] },
  );
  const ended = new Promise<number | null>((resolve) => daemon.once('exit', resolve));
  const client = await QmpClient.connect(join(place, 'q.sock'));
  await client.execute('qmp_capabilities');
  const end = async (): Promise<void> => {
    await client.execute('quit');
    client.close();
    expect(await ended).toBe(0);
  };
  return { client, place, end };
}

/** Writes blocks all over the drive with checksums, and reads them again. */
export function verify(place: string): Promise<string> {
  return tool(
    'fio',
    ...['--name=w', '--ioengine=nbd', `--uri=nbd+unix:///live?socket=${join(place, 'n.sock')}`],
    ...['--rw=randwrite', '--bsrange=512-65536', '--bs_unaligned=1', '--size=48M', '--iodepth=16'],
    ...['--verify=crc32c', '--do_verify=1', '--verify_fatal=1', '--verify_backlog=64'],
    ...['--verify_state_save=0'],
  );
}
