/** Completed means durable: the order of the calls that reach the kernel when a backup ends. */
import fs, { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { syncBuiltinESMExports } from 'node:module';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { MessageChannel } from 'node:worker_threads';
import { afterAll, afterEach, expect, it } from 'vitest';
import { BackupJob, beginBackup } from '#src/backup/backup-job.js';
import { abandonTarget, openTarget } from '#src/backup/target.js';
import { DISK_CONTROL_BYTES, Disk } from '#src/block/disk.js';
import { filesOf } from '#src/block/files.js';
import { CopyBuffer } from '#src/block/filters/copy-before-write.js';
import { closeNode, openImage } from '#src/block/graph.js';
import type { StorageDescriptor } from '#src/block/node.js';
import { JOB_CONTROL_BYTES, JobControl } from '#src/job/control.js';
import type { JobMessage } from '#src/job/job.js';
import { createRuntime } from '#src/kernels/runtime.js';
import { Random } from '../support/data.js';

const runtime = createRuntime(64 << 20);
const { arena } = runtime;
const folder = mkdtempSync(join(tmpdir(), 'stillframe-durable-'));
afterAll(() => rmSync(folder, { recursive: true, force: true }));

const original = { ...fs };
afterEach(() => {
  const { fdatasyncSync, fsyncSync, ftruncateSync, writeSync, renameSync, linkSync } = original;
  Object.assign(fs, { fdatasyncSync, fsyncSync, ftruncateSync, writeSync, renameSync, linkSync });
  syncBuiltinESMExports();
});

/** Runs a backup on this thread. @returns the calls that changed the target or made it durable, in order */
function calls(format: 'raw' | 'qcow2', force: boolean): string[] {
  const log: string[] = [];
  const names = new Map<number, string>();
  const name = (fd: number): string => names.get(fd) ?? original.readlinkSync(`/proc/self/fd/${fd}`);
  const watch = <K extends 'fdatasyncSync' | 'fsyncSync' | 'ftruncateSync' | 'writeSync'>(
    key: K,
    what: string,
  ): void => {
    const call = original[key] as (...args: unknown[]) => unknown;
    Object.assign(fs, {
      [key]: (fd: number, ...rest: unknown[]) => {
        if (name(fd).startsWith(folder)) log.push(`${what} ${name(fd).slice(folder.length)}`);
        return call(fd, ...rest);
      },
    });
  };
  watch('writeSync', 'change');
  watch('ftruncateSync', 'change');
  watch('fdatasyncSync', 'sync');
  watch('fsyncSync', 'sync');
  for (const key of ['renameSync', 'linkSync'] as const) {
    const call = original[key];
    Object.assign(fs, {
      [key]: (from: string, to: string) => {
        log.push(`publish ${from.slice(folder.length)} as ${to.slice(folder.length)}`);
        call(from, to);
      },
    });
  }
  syncBuiltinESMExports();

  const node = openImage(runtime, join(folder, 'disk.raw'), { format: 'raw', readOnly: true });
  if (node.driver !== 'raw') throw new Error('not raw');
  const control = arena.alloc(DISK_CONTROL_BYTES, 'disk');
  const descriptor = { id: 1, control, node, length: node.length, readOnly: true, discard: 'unmap' } as const;
  const buffer = new CopyBuffer(runtime);
  const disk = new Disk(runtime, descriptor, () => buffer);
  const job = new JobControl(arena, arena.alloc(JOB_CONTROL_BYTES, 'job'));
  const { port1, port2 } = new MessageChannel();
  const port = Object.assign(port1, {
    postMessage: (message: JobMessage) => {
      if (message.type === 'ended') log.push(message.outcome);
    },
  });
  // What the host thread does first.
  job.transition('created');
  const begun = beginBackup(
    runtime,
    disk,
    job,
    {
      target: join(folder, `target.${format}`),
      sync: 'full',
      format,
      force,
      onSourceError: 'report',
      onTargetError: 'report',
      onCbwError: 'break-guest-write',
      autoFinalize: true,
    },
    2,
  );
  BackupJob.run(runtime, disk, job, port, begun);
  port1.close();
  port2.close();
  closeNode(runtime, node);
  return log;
}

it.each([
  ['raw', false],
  ['raw', true],
  ['qcow2', false],
  ['qcow2', true],
] as const)('%s, replacing a file: %s', (format, force) => {
  writeFileSync(join(folder, 'disk.raw'), new Random(1).bytes(3 << 20));
  rmSync(join(folder, `target.${format}`), { force: true });
  if (force) writeFileSync(join(folder, `target.${format}`), 'old');
  const log = calls(format, force);
  const file = `/target.${format}`;
  const lastChange = log.lastIndexOf(`change ${file}.partial`);
  const lastSync = log.lastIndexOf(`sync ${file}.partial`);
  const published = log.indexOf(`publish ${file}.partial as ${file}`);
  expect(lastChange).toBeGreaterThan(0);
  // Data and metadata, their sync, the name, the sync of the folder, and only then the end.
  expect(lastSync).toBeGreaterThan(lastChange);
  expect(published).toBeGreaterThan(lastSync);
  expect(log.slice(published + 1).some((call) => /^sync (\/)?\.?$/.test(call))).toBe(true);
  expect(log.at(-1)).toBe('completed');
});

it('a target is on its way to the disk while it is written, the source is left alone', () => {
  writeFileSync(join(folder, 'disk.raw'), new Random(1).bytes(1 << 20));
  writeFileSync(join(folder, 'existing.raw'), new Uint8Array(1 << 20));
  const source = openImage(runtime, join(folder, 'disk.raw'), { format: 'raw', readOnly: false });
  const writesBehind = (file: StorageDescriptor) => file.driver === 'file' && file.writeBehind;
  for (const options of [
    { target: join(folder, 'new.raw'), format: 'raw' },
    { target: join(folder, 'new.qcow2'), format: 'qcow2' },
    { target: join(folder, 'existing.raw'), format: 'raw', existing: true },
  ] as const) {
    const target = openTarget(runtime, source, { sync: 'full', ...options });
    expect(filesOf(target.descriptor).map(writesBehind)).toEqual([true]);
    abandonTarget(runtime, target);
  }
  expect(filesOf(source).map(writesBehind)).toEqual([false]);
  closeNode(runtime, source);
});
