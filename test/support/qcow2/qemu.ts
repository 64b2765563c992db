import { spawnSync } from 'node:child_process';
import { dirname } from 'node:path';
import { run } from '../peers.js';
import { COMPRESSED_WRITE, type Operation, type Patterns, qemuIoCommand } from './operation.js';

/** One line of `qemu-img map --output=json`, its place in the file left out where that may differ. */
export interface MapLine {
  readonly start: number;
  readonly length: number;
  readonly depth: number;
  readonly present: boolean;
  readonly zero: boolean;
  readonly data: boolean;
  readonly offset?: number;
}

/**
 * Changes an image, of an absolute path, by `qemu-io`; throws where any of it fails.
 *
 * QEMU goes on to fill the cluster that it last put compressed data into, also where that has been given up and used
 * for something else meanwhile, which damages the image. So it starts anew before compressed data.
 *
 * @returns what was done: QEMU refuses, by an I/O error, to put compressed data where a cluster has data of its own
 */
export function qemuApply(
  path: string,
  operations: readonly Operation[],
  patterns: Patterns,
  format: 'raw' | 'qcow2' = 'qcow2',
): Operation[] {
  const runs: string[][] = [];
  for (const [index, operation] of operations.entries()) {
    const anew = operation.kind === 'compressed' && operations[index - 1]?.kind !== 'compressed';
    if (index === 0 || anew) runs.push([]);
    runs.at(-1)?.push(qemuIoCommand(operation, patterns));
  }
  const outcomes = runs
    .map((commands) => qemuIo(path, commands, format))
    .join('')
    .matchAll(OUTCOME);
  return operations.filter(({ kind }) => kind !== 'compressed' || outcomes.next().value?.[1] !== undefined);
}

/** What `qemu-io` says of a compressed write. */
const OUTCOME = /^(wrote) .*\n.*ops\/sec\)\n|^write failed: Input\/output error\n/gm;

/**
 * Runs commands of `qemu-io`; throws where it has anything to say, other than of compressed writes. Returns its
 * output once the image is closed.
 */
function qemuIo(path: string, commands: readonly string[], format: 'raw' | 'qcow2'): string {
  const { status, stdout, stderr, error } = spawnSync(
    'qemu-io',
    ['-f', format, '-d', 'unmap', '-t', 'unsafe', path],
    // QEMU looks for data files from where it is.
    { input: `${commands.join('\n')}\n`, encoding: 'utf8', cwd: dirname(path) },
  );
  if (error) throw error;
  const said = stdout.replaceAll('qemu-io> ', '');
  const compressed = commands.filter((command) => command.startsWith(COMPRESSED_WRITE)).length;
  const outcomes = said.match(OUTCOME)?.length ?? 0;
  const refused = said.includes('write failed');
  if (
    status !== (refused ? 1 : 0) ||
    outcomes !== compressed ||
    said.replace(OUTCOME, '').trim() !== '' ||
    stderr !== ''
  ) {
    throw new Error(`qemu-io ${path} ended with ${status}\n${said}\n${stderr}\n${commands.join('\n')}`);
  }
  return said;
}

export function qemuMap(path: string, format: 'raw' | 'qcow2' = 'qcow2'): MapLine[] {
  const lines: MapLine[] = JSON.parse(run('qemu-img', ['map', '--output=json', '-f', format, path]));
  return lines;
}

/** Throws unless the image reads like the other one. */
export function qemuCompare(path: string, other: string, otherFormat: 'raw' | 'qcow2' = 'raw'): void {
  run('qemu-img', ['compare', '-q', '-f', 'qcow2', '-F', otherFormat, path, other]);
}

/** Where our map and QEMU's part; undefined where they are the same. */
export function differenceOf(ours: readonly MapLine[], theirs: readonly MapLine[]): string | undefined {
  const text = (line: MapLine | undefined): string => JSON.stringify(Object.entries(line ?? {}).sort());
  for (let index = 0; index < Math.max(ours.length, theirs.length); index++) {
    const [one, other] = [ours[index], theirs[index]];
    if (text(one) === text(other)) continue;
    return `line ${index} is ${JSON.stringify(one)} with us, ${JSON.stringify(other)} with QEMU`;
  }
  return undefined;
}

/**
 * A map without what two images of the same content and allocation may differ in: where the data is, and whether the
 * file has a hole there (which QEMU looks at where it takes an image for preallocated).
 */
export function allocationOf(map: readonly MapLine[]): MapLine[] {
  const lines: MapLine[] = [];
  for (const { offset, ...line } of map) {
    const next = { ...line, zero: line.zero && !line.data };
    const last = lines.at(-1);
    const same =
      last !== undefined &&
      (['depth', 'present', 'zero', 'data'] as const).every((key) => last[key] === next[key]);
    if (same) lines[lines.length - 1] = { ...last, length: last.length + next.length };
    else lines.push(next);
  }
  return lines;
}
