/** A Linux guest writes to its file system on our export while backups of the live drive are taken. */
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, expect, it } from 'vitest';
import {
  type BackupJob,
  type BackupOptions,
  type BackupResult,
  createEngine,
  type Disk,
  type Engine,
  type NbdServer,
} from '#src/index.js';
import { Guest, hasGuest, proveFiles } from '../support/guest.js';
import { tool } from '../support/nbd-client.js';
import { NbdRecorder } from '../support/nbd-recorder.js';
import { hasPeer, run } from '../support/peers.js';

const LENGTH = 64 << 20;
const SECTOR = 512;
const present = hasGuest() && ['qemu-img', 'nbdcopy', 'e2fsck', 'debugfs'].every((name) => hasPeer(name));

const folder = mkdtempSync(join(tmpdir(), 'stillframe-guest-'));
const at = (name: string): string => join(folder, name);
let engine: Engine;
let disk: Disk;
let server: NbdServer;
let recorder: NbdRecorder;
let guest: Guest;

beforeAll(async () => {
  if (!present) return;
  writeFileSync(at('base'), '');
  run('truncate', ['-s', String(LENGTH), at('base')]);
  run('mkfs.ext4', ['-q', '-F', '-E', 'lazy_itable_init=0', at('base')]);
  run('qemu-img', ['create', '-q', '-f', 'qcow2', '-b', at('base'), '-F', 'raw', at('drive')]);
  engine = await createEngine({ workers: 2 });
  disk = await engine.openDisk(at('drive'), { format: 'qcow2' });
  server = await engine.serveNbd({ listen: `unix:${at('ours')}`, exports: [{ disk }] });
  recorder = await NbdRecorder.listen(at('recorded'), at('ours'), new Uint8Array(readFileSync(at('base'))));
  guest = new Guest(folder, `nbd+unix:///?socket=${at('recorded')}`);
});
afterAll(async () => {
  if (present) {
    guest.kill();
    recorder.close();
    await server.close();
    await disk.close();
    await engine.close();
  }
  rmSync(folder, { recursive: true, force: true });
});

/** What must be in a backup. */
interface Instant {
  readonly drive: Uint8Array;
  readonly unknown: Uint8Array;
  readonly files: ReadonlyMap<number, number>;
}

/** Runs `take` while no request is on its way, and says what is true of the drive at that moment. */
async function instant<T>(
  take: () => Promise<T>,
): Promise<{ readonly taken: T; readonly expected: Instant }> {
  await recorder.hold();
  try {
    const files = guest.safeFiles();
    const expected = { drive: recorder.drive.slice(), unknown: recorder.unknown.slice(), files };
    return { taken: await take(), expected };
  } finally {
    recorder.release();
  }
}

/** Holds a copy, as a raw file of ours, to what it must be. */
function prove(name: string, path: string, { drive, unknown, files }: Instant): void {
  const copy = readFileSync(path);
  expect(copy.length).toBe(LENGTH);
  const wrong: number[] = [];
  for (let sector = 0; sector < LENGTH / SECTOR; sector++) {
    if (unknown[sector] === 1) continue;
    const [start, end] = [sector * SECTOR, (sector + 1) * SECTOR];
    if (Buffer.compare(copy.subarray(start, end), drive.subarray(start, end)) !== 0) wrong.push(sector);
  }
  expect(wrong, `sectors of ${name}`).toEqual([]);
  proveFiles(path, files, folder);
}

async function backup(options: BackupOptions) {
  return await instant(() => disk.backup({ speed: 2 << 20, autoFinalize: false, ...options }));
}

/** Lets a job come to its end. */
async function finish(job: BackupJob): Promise<BackupResult> {
  while (job.status !== 'pending') {
    if (job.status === 'running') job.setSpeed(0);
    await new Promise((resolve) => setTimeout(resolve, 5));
  }
  job.finalize();
  return await job.result();
}

it.skipIf(!present)(
  'goes on writing while full, top and none backups and a frozen export are taken, and each is its instant',
  async () => {
    await guest.writes(8);
    const full = await backup({ target: at('full'), sync: 'full', format: 'raw' });
    await guest.writes(4);
    const top = await backup({ target: at('top'), sync: 'top' });
    await guest.writes(4);
    const none = await backup({ target: at('none'), sync: 'none' });
    await guest.writes(4);
    const fleeced = await backup({ target: at('fleeced'), sync: 'full', format: 'qcow2', fleece: true });
    await guest.writes(4);
    const frozen = await instant(() => disk.freeze());
    await server.addExport({ disk: frozen.taken, name: 'still' });
    await guest.writes(4);
    await tool('nbdcopy', `nbd+unix:///still?socket=${at('ours')}`, at('still.raw'));
    await frozen.taken.close();
    prove('the frozen export', at('still.raw'), frozen.expected);

    expect((await finish(full.taken)).clusters.cbw).toBeGreaterThan(0);
    prove('full', at('full'), full.expected);
    expect((await finish(top.taken)).clusters.planned).toBeLessThan(LENGTH / 65536);
    run('qemu-img', ['convert', '-O', 'raw', at('top'), at('top.raw')]);
    prove('top', at('top.raw'), top.expected);
    await finish(fleeced.taken);
    run('qemu-img', ['convert', '-O', 'raw', at('fleeced'), at('fleeced.raw')]);
    prove('fleeced', at('fleeced.raw'), fleeced.expected);
    // Target and source are the instant for as long as nobody writes to the source.
    await recorder.hold();
    none.taken.cancel();
    expect((await none.taken.result()).clusters.cbw).toBeGreaterThan(0);
    run('qemu-img', ['convert', '-U', '-O', 'raw', at('none'), at('none.raw')]);
    recorder.release();
    prove('none', at('none.raw'), none.expected);
    for (const name of ['top', 'none', 'fleeced']) run('qemu-img', ['check', '-q', '-U', at(name)]);

    await guest.writes(4);
    await guest.stop();
    expect(guest.console).toContain('GUEST done');
    expect(guest.console).not.toMatch(/GUEST cannot|I\/O error|EXT4-fs (error|warning)/);
    expect(recorder.errors).toBe(0);
    expect(recorder.writes).toBeGreaterThan(100);
    const last = await instant(async () => undefined);
    await server.close();
    await disk.close();
    run('qemu-img', ['check', '-q', at('drive')]);
    run('qemu-img', ['convert', '-O', 'raw', at('drive'), at('drive.raw')]);
    prove('the drive', at('drive.raw'), last.expected);
  },
  180_000,
);
