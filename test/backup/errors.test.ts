/** Error policies: what a job and a guest's write do when the source cannot be read or the target cannot be written. */
import { mkdtempSync, openSync, readFileSync, rmSync, writeFileSync, writeSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, it } from 'vitest';
import { type BackupJob, createEngine, type Engine } from '#src/index.js';
import { firstDifference, Random } from '../support/data.js';
import { hasPeer, run } from '../support/peers.js';
import { runInSmallFileSystem, SMALL_FILE_SYSTEM_NEEDED } from '../support/small-file-system.js';

let engine: Engine;
let folder: string;
beforeAll(async () => {
  engine = await createEngine();
});
afterAll(() => engine.close());
beforeEach(() => {
  folder = mkdtempSync(join(tmpdir(), 'stillframe-errors-'));
});
afterEach(() => rmSync(folder, { recursive: true, force: true }));
const at = (name: string): string => join(folder, name);

describe.skipIf(!hasPeer('qemu-img'))('a source with a cluster that cannot be read', () => {
  const content = new Uint8Array(4 << 20);
  for (let byte = 0; byte < content.length; byte++) content[byte] = byte % 97 < 20 ? byte >> 16 : 1;
  let place: number;
  let good: Buffer;

  function overwrite(bytes: Uint8Array): void {
    const fd = openSync(at('disk.qcow2'), 'r+');
    writeSync(fd, bytes, 0, bytes.length, place);
  }

  beforeEach(() => {
    writeFileSync(at('content'), content);
    run('qemu-img', ['convert', '-c', '-f', 'raw', '-O', 'qcow2', at('content'), at('disk.qcow2')]);
    const image = readFileSync(at('disk.qcow2'));
    const l2 = Number(image.readBigUInt64BE(Number(image.readBigUInt64BE(40))) & 0x00fffffffffffe00n);
    // Compressed cluster 30; 64 KiB clusters have 54 bits of offset.
    place = Number(image.readBigUInt64BE(l2 + 30 * 8) & ((1n << 54n) - 1n));
    good = Buffer.from(image.subarray(place, place + 64));
    overwrite(Buffer.alloc(64, 0xff));
  });

  async function start(onSourceError: 'report' | 'ignore' | 'enospc' | 'stop' | 'auto'): Promise<BackupJob> {
    const disk = await engine.openDisk(at('disk.qcow2'), { readOnly: true });
    const job = await disk.backup({ target: at('copy.raw'), format: 'raw', sync: 'full', onSourceError });
    job.ended.finally(() => disk.close()).catch(() => undefined);
    return job;
  }

  it.each(['report', 'enospc', 'auto'] as const)("'%s' fails the job", async (policy) => {
    const job = await start(policy);
    const errors: unknown[] = [];
    job.on('io-error', (error) => errors.push(error));
    await expect(job.result()).rejects.toMatchObject({
      code: 'ERR_STILLFRAME_CORRUPT_IMAGE',
      message: expect.stringContaining(`guest offset ${30 * 65536}`),
    });
    expect(errors).toEqual([{ operation: 'read', action: 'report', noSpace: false }]);
  });

  it("'stop' pauses the job; it goes on when it is resumed", async () => {
    const job = await start('stop');
    const stopped = new Promise((resolve) => job.once('io-error', resolve));
    expect(await stopped).toEqual({ operation: 'read', action: 'stop', noSpace: false });
    while (job.status !== 'paused') await new Promise((resolve) => setTimeout(resolve, 5));
    overwrite(good);
    job.resume();
    expect((await job.result()).outcome).toBe('completed');
    expect(firstDifference(readFileSync(at('copy.raw')), content)).toBe(-1);
  });

  it("'ignore' tries again until it works", async () => {
    const job = await start('ignore');
    let errors = 0;
    await new Promise<void>((resolve) => {
      job.on('io-error', ({ action }) => {
        expect(action).toBe('ignore');
        if (++errors === 3) resolve();
      });
    });
    overwrite(good);
    expect((await job.result()).outcome).toBe('completed');
    expect(firstDifference(readFileSync(at('copy.raw')), content)).toBe(-1);
  });
});

describe('a target without space', () => {
  const prelude = `
    import { rmSync, writeFileSync, existsSync, readdirSync } from 'node:fs';
    import { createEngine } from ${JSON.stringify(new URL('../../dist/index.js', import.meta.url).href)};
    const noise = (n, seed) => { const b = new Uint8Array(n); let w = seed | 1;
      for (let i = 0; i < n; i++) { w = (Math.imul(w, 1664525) + 1013904223) | 0; b[i] = w >>> 24; } return b; };
    const say = (value) => console.log(JSON.stringify(value));
    const engine = await createEngine();
    const open = (path) => engine.openDisk(path, { format: 'raw' });`;

  /** Runs a script where the current folder has 8 MiB; @returns what it said. */
  function script(body: string, skip: (note: string) => void): unknown[] {
    writeFileSync(at('disk.raw'), new Random(1).noise(4 << 20));
    const command = [process.execPath, '--input-type=module', '-e', `${prelude}${body};await engine.close()`];
    const output = runInSmallFileSystem('8m', [...command, at('disk.raw')]);
    if (output === undefined) {
      skip(SMALL_FILE_SYSTEM_NEEDED);
      return [];
    }
    expect(output.stderr).toBe('');
    const lines = output.stdout.split('\n');
    const end = lines.indexOf('status 0');
    expect(end, output.stdout).toBeGreaterThanOrEqual(0);
    return lines.slice(0, end).map((line): unknown => JSON.parse(line));
  }

  it.for(['stop', 'enospc'])(
    "'%s' pauses the job; it goes on when there is space again",
    (policy, { skip }) => {
      const said = script(
        `
      const disk = await open(process.argv[1]);
      const before = await disk.read(0, disk.length);
      writeFileSync('ballast', noise(6 << 20, 1));
      const job = await disk.backup({ target: 'copy.raw', sync: 'full', onTargetError: '${policy}' });
      const first = await new Promise((resolve) => job.once('io-error', resolve));
      while (job.status !== 'paused') await new Promise((resolve) => setTimeout(resolve, 5));
      rmSync('ballast');
      await disk.write(3 << 20, noise(500_000, 5));
      job.resume();
      const { outcome } = await job.result();
      const copy = await open('copy.raw');
      const after = await copy.read(0, copy.length);
      say({ first, outcome, same: Buffer.compare(before, after) });`,
        skip,
      );
      expect(said).toEqual([
        { first: { operation: 'write', action: 'stop', noSpace: true }, outcome: 'completed', same: 0 },
      ]);
    },
  );

  it("'break-guest-write' fails the guest's write, and the backup stays what it is", ({ skip }) => {
    const said = script(
      `
      const disk = await open(process.argv[1]);
      const before = await disk.read(0, disk.length);
      const job = await disk.backup({ target: 'copy.qcow2', format: 'qcow2', sync: 'none' });
      await disk.write(0, noise(100_000, 2));
      writeFileSync('ballast', noise(7 << 20, 1).subarray(0, 6 << 20));
      let refused;
      for (let offset = 1 << 20; refused === undefined; offset += 65536) {
        await disk.write(offset, noise(65536, 3)).catch((error) => {
          refused = { code: error.code, kept: Buffer.compare(before.subarray(offset, offset + 65536), new Uint8Array(0)) };
          refused.offset = offset;
        });
      }
      const { offset } = refused;
      refused.kept = Buffer.compare(await disk.read(offset, 65536), before.subarray(offset, offset + 65536));
      delete refused.offset;
      rmSync('ballast');
      await disk.write(offset, noise(65536, 4));
      await disk.flush();
      job.cancel();
      const { outcome } = await job.result();
      const copy = await engine.openDisk('copy.qcow2', {
        readOnly: true, forceShare: true, allowBacking: ['/'],
      });
      say({ refused, outcome, same: Buffer.compare(before, await copy.read(0, copy.length)) });`,
      skip,
    );
    expect(said).toEqual([
      { refused: { code: 'ERR_STILLFRAME_NO_SPACE', kept: 0 }, outcome: 'cancelled', same: 0 },
    ]);
  });

  it("'break-snapshot' lets the guest write and fails the backup", ({ skip }) => {
    const said = script(
      `
      const disk = await open(process.argv[1]);
      writeFileSync('ballast', noise(6 << 20, 1));
      const job = await disk.backup({
        target: 'copy.qcow2', format: 'qcow2', sync: 'none', onCbwError: 'break-snapshot',
      });
      const data = noise(4 << 20, 3);
      await disk.write(0, data);
      const failure = await job.result().catch((error) => error.code);
      say({ failure, written: Buffer.compare(await disk.read(0, disk.length), data), left: readdirSync('.') });`,
      skip,
    );
    expect(said).toEqual([{ failure: 'ERR_STILLFRAME_BROKEN_FRAME', written: 0, left: ['ballast'] }]);
  });
});
