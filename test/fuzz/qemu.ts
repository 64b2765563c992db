import { spawnSync } from 'node:child_process';
import { closeSync, fstatSync, openSync, readSync, rmSync } from 'node:fs';
import { dirname } from 'node:path';

const TIMEOUT_MS = 3000;
const MOST_BYTES = 8 << 20;

/** In the folder of the image, since QEMU takes the name of a data file as relative to where it runs. */
function qemuImg(
  path: string,
  ...args: string[]
): { readonly status: number | null; readonly stdout: string; readonly message: string } {
  const { status, stdout, stderr } = spawnSync('qemu-img', args, {
    cwd: dirname(path),
    encoding: 'utf8',
    timeout: TIMEOUT_MS,
  });
  return { status, stdout, message: stderr.trim() };
}

/** What QEMU reads in an image (no more than the first {@link MOST_BYTES}), or why it does not. */
export function qemuContent(path: string, format: string): Buffer | string {
  const copy = `${path}.converted`;
  try {
    const { status, message } = qemuImg(path, 'convert', '-U', '-f', format, '-O', 'raw', path, copy);
    return status === 0 ? readStart(copy) : message;
  } finally {
    rmSync(copy, { force: true });
  }
}

function readStart(path: string): Buffer {
  const fd = openSync(path, 'r');
  try {
    const bytes = Buffer.alloc(Math.min(fstatSync(fd).size, MOST_BYTES));
    readSync(fd, bytes, 0, bytes.length, 0);
    return bytes;
  } finally {
    closeSync(fd);
  }
}

/** Repairs the image. Returns whether QEMU says that all is well. */
export function qemuRepair(path: string, format: string): boolean {
  return qemuImg(path, 'check', '-q', '-r', 'all', '-f', format, path).status === 0;
}

/** Internal snapshots that the header of a qcow2 image speaks of. */
export function snapshotCount(path: string): number {
  return readStart(path).readUInt32BE(60);
}

/** What `qemu-img check` finds, or undefined where it cannot look at the image. */
export function qemuFindings(path: string, format: string): Record<string, unknown> | undefined {
  const { status, stdout } = qemuImg(path, 'check', '-U', '--output=json', '-f', format, path);
  return status === 0 || status === 2 || status === 3 ? JSON.parse(stdout) : undefined;
}

/** Exit status of `qemu-img check`: 0 sound, 2 errors, 3 leaks, 1 cannot be checked. */
export function qemuCheck(path: string, format: string): number | null {
  return qemuImg(path, 'check', '-q', '-U', '-f', format, path).status;
}
