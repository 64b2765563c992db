import { StillframeError } from '../../errors.js';
import type { Runtime } from '../../kernels/runtime.js';
import type { FileNode } from '../raw/file.js';
import { EXTENSION_BACKING_FORMAT, FIELD, type Qcow2Header, readHeader } from './header.js';

/** What a header says of a backing file. */
export interface BackingReference {
  readonly name: string;
  readonly format: string | undefined;
}

const EXTENSION_HEAD_BYTES = 8;

/** Size of a drive in bytes and the L1 table that maps it. */
export type Layout = Pick<Qcow2Header, 'length' | 'l1Size' | 'l1TableOffset'>;

function padded(length: number): number {
  return Math.ceil(length / 8) * 8;
}

/**
 * Makes the header name another backing file, or none. All else in it stays as it is, extensions that nobody knows
 * included. The header is written with one write and is durable afterwards.
 *
 * @throws StillframeError ERR_STILLFRAME_INVALID_ARGUMENT where the name or the format is too long, before anything
 *   is written
 */
export function rewriteBacking(
  runtime: Runtime,
  file: FileNode,
  backing: BackingReference | undefined,
): void {
  const { arena } = runtime;
  const header = readHeader(runtime, file);
  const buffer = arena.alloc(header.clusterSize, 'qcow2 header');
  try {
    file.read(0, buffer, header.clusterSize);
    const old = arena.copyOut(buffer, header.clusterSize);
    const bytes = encode(file.descriptor.path, header, old, backing);
    arena.u8.set(bytes, buffer);
    file.write(0, buffer, bytes.length);
    file.flush();
  } finally {
    arena.free(buffer);
  }
}

/** Writes size and L1 table into the header, 24 bytes of its first sector, and makes them durable. */
export function writeLayout(
  runtime: Runtime,
  file: FileNode,
  { length, l1Size, l1TableOffset }: Layout,
): void {
  const { arena } = runtime;
  const bytes = Buffer.alloc(24);
  file.readBytes(FIELD.size, bytes);
  bytes.writeBigUInt64BE(BigInt(length), 0);
  bytes.writeUInt32BE(l1Size, FIELD.l1Size - FIELD.size);
  bytes.writeBigUInt64BE(BigInt(l1TableOffset), FIELD.l1TableOffset - FIELD.size);
  const pointer = arena.alloc(bytes.length, 'qcow2 header');
  try {
    arena.u8.set(bytes, pointer);
    file.write(FIELD.size, pointer, bytes.length);
    file.flush();
  } finally {
    arena.free(pointer);
  }
}

function encode(
  path: string,
  header: Qcow2Header,
  old: Uint8Array,
  backing: BackingReference | undefined,
): Uint8Array {
  const bad = (what: string): StillframeError =>
    new StillframeError(
      'ERR_STILLFRAME_INVALID_ARGUMENT',
      `cannot change the backing file of '${path}': ${what}`,
    );
  const name = Buffer.from(backing?.name ?? '', 'utf8');
  const format = Buffer.from(backing?.format ?? '', 'utf8');
  if (name.length > 1023) throw bad(`its name has ${name.length} bytes, more than 1023`);
  if (name.includes(0)) throw bad('its name contains a zero byte');
  if (format.length > 15) throw bad(`the format '${backing?.format}' is longer than 15 bytes`);
  const extensions = header.extensions
    .filter(({ type }) => type !== EXTENSION_BACKING_FORMAT)
    .map(({ type, offset, length }) => ({ type, data: old.subarray(offset, offset + length) }));
  if (format.length > 0) extensions.unshift({ type: EXTENSION_BACKING_FORMAT, data: format });

  const bytes = Buffer.alloc(header.clusterSize);
  bytes.set(old.subarray(0, header.headerLength));
  const place = (length: number, at: number): number => {
    if (at + length <= bytes.length) return at + length;
    throw bad(`the name does not fit into the header's cluster of ${bytes.length} bytes; use a shorter one`);
  };
  let at = header.headerLength;
  for (const { type, data } of extensions) {
    const next = place(EXTENSION_HEAD_BYTES + padded(data.length), at);
    bytes.writeUInt32BE(type, at);
    bytes.writeUInt32BE(data.length, at + 4);
    bytes.set(data, at + EXTENSION_HEAD_BYTES);
    at = next;
  }
  // The end of the extensions is a head of zeroes; without a name behind them it may be the end of the cluster.
  const nameAt = name.length === 0 ? 0 : place(EXTENSION_HEAD_BYTES, at);
  if (name.length > 0) {
    place(name.length, nameAt);
    bytes.set(name, nameAt);
  }
  bytes.writeBigUInt64BE(BigInt(nameAt), FIELD.backingFileOffset);
  bytes.writeUInt32BE(name.length, FIELD.backingFileSize);
  return bytes;
}
