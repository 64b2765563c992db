import { spawnSync } from 'node:child_process';
import { run } from '../peers.js';
import { type Operation, type Patterns, qemuIoCommand } from './operation.js';

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

/** Changes an image by one run of `qemu-io`; throws where any of it fails. */
export function qemuApply(
  path: string,
  operations: readonly Operation[],
  patterns: Patterns,
  format: 'raw' | 'qcow2' = 'qcow2',
): void {
  qemuIo(
    path,
    operations.map((operation) => qemuIoCommand(operation, patterns)),
    format,
  );
}

/** Runs commands of `qemu-io`; throws where it has anything to say. Returns once the image is closed. */
export function qemuIo(path: string, commands: readonly string[], format: 'raw' | 'qcow2' = 'qcow2'): void {
  const { status, stdout, stderr, error } = spawnSync(
    'qemu-io',
    ['-f', format, '-d', 'unmap', '-t', 'unsafe', path],
    { input: `${commands.join('\n')}\n`, encoding: 'utf8' },
  );
  if (error) throw error;
  const said = stdout.replaceAll('qemu-io> ', '').trim();
  if (status !== 0 || said !== '' || stderr !== '') {
    throw new Error(`qemu-io ${path} ended with ${status}\n${said}\n${stderr}\n${commands.join('\n')}`);
  }
}

export function qemuMap(path: string, format: 'raw' | 'qcow2' = 'qcow2'): MapLine[] {
  const lines: MapLine[] = JSON.parse(run('qemu-img', ['map', '--output=json', '-f', format, path]));
  return lines;
}

/** Throws unless the image reads like the other one. */
export function qemuCompare(path: string, other: string, otherFormat: 'raw' | 'qcow2' = 'raw'): void {
  run('qemu-img', ['compare', '-q', '-f', 'qcow2', '-F', otherFormat, path, other]);
}
