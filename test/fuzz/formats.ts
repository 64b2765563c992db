import { closeSync, fstatSync, openSync, readSync, writeSync } from 'node:fs';
import { crc32c } from '#src/block/foreign/crc32c.js';
import { FOREIGN_NAMES } from '#src/block/foreign/index.js';
import type { ForeignName } from '#src/block/node.js';
import { vdiLayout, vhdxLayout, vmdkLayout, vpcLayout } from './foreign-layout.js';
import { FOREIGN_MUTATORS } from './foreign-mutators.js';
import type { Layout } from './layout.js';
import type { Weighted } from './mutation.js';
import { qcow2Layout } from './qcow2-layout.js';
import { QCOW2_MUTATORS } from './qcow2-mutators.js';

export type FuzzFormat = 'qcow2' | ForeignName;

/** What the fuzzer has to know of a format. */
export interface FormatUnderTest {
  readonly layout: (bytes: Buffer) => Layout;
  readonly mutators: readonly Weighted[];
  /** Makes the sums right that readers check before they look at anything else. */
  readonly seal?: (path: string) => void;
  /** The largest drive of which everything is read, bytes. */
  readonly mostContent: number;
}

const MIB = 1 << 20;

export const FORMATS: Readonly<Record<FuzzFormat, FormatUnderTest>> = {
  qcow2: { layout: qcow2Layout, mutators: QCOW2_MUTATORS, mostContent: MIB / 2 },
  vmdk: { layout: vmdkLayout, mutators: FOREIGN_MUTATORS, mostContent: MIB },
  vhdx: { layout: vhdxLayout, mutators: FOREIGN_MUTATORS, seal: sealVhdx, mostContent: 4 * MIB },
  vpc: { layout: vpcLayout, mutators: FOREIGN_MUTATORS, seal: sealVpc, mostContent: 5 * MIB },
  vdi: { layout: vdiLayout, mutators: FOREIGN_MUTATORS, mostContent: 4 * MIB },
};

export const FORMAT_NAMES: readonly FuzzFormat[] = ['qcow2', ...FOREIGN_NAMES];

/** Puts a number into a structure of a file, made from all of its bytes, where the structure is there. */
function seal(
  fd: number,
  at: number,
  length: number,
  signature: string,
  sumOf: (bytes: Buffer) => void,
): Buffer | undefined {
  const bytes = Buffer.alloc(length);
  if (at < 0 || readSync(fd, bytes, 0, length, at) < length) return undefined;
  if (bytes.toString('latin1', 0, signature.length) !== signature) return undefined;
  sumOf(bytes);
  writeSync(fd, bytes, 0, length, at);
  return bytes;
}

function withFile(path: string, body: (fd: number, length: number) => void): void {
  const fd = openSync(path, 'r+');
  try {
    body(fd, fstatSync(fd).size);
  } finally {
    closeSync(fd);
  }
}

function crc(bytes: Buffer): void {
  bytes.writeUInt32LE(crc32c(bytes, 4), 4);
}

function sealVhdx(path: string): void {
  withFile(path, (fd, length) => {
    for (const at of [0x30000, 0x40000]) seal(fd, at, 0x10000, 'regi', crc);
    for (const at of [0x10000, 0x20000]) {
      const header = seal(fd, at, 4096, 'head', crc);
      if (header === undefined || header.readUInt32LE(48) === 0) continue;
      const start = Number(header.readBigUInt64LE(72));
      const end = Math.min(length, start + header.readUInt32LE(68), start + 4 * MIB);
      const head = Buffer.alloc(12);
      for (let entry = start; entry < end; entry += 4096) {
        readSync(fd, head, 0, 12, entry);
        const bytes = head.readUInt32LE(8);
        if (bytes >= 64 && bytes <= MIB) seal(fd, entry, bytes, 'loge', crc);
      }
    }
  });
}

function ones(field: number): (bytes: Buffer) => void {
  return (bytes) => {
    bytes.writeUInt32BE(0, field);
    let sum = 0;
    for (const byte of bytes) sum += byte;
    bytes.writeUInt32BE(~sum >>> 0, field);
  };
}

function sealVpc(path: string): void {
  withFile(path, (fd, length) => {
    const first = seal(fd, 0, 512, 'conectix', ones(64));
    seal(fd, length - 512, 512, 'conectix', ones(64));
    const header = Number(first?.readBigUInt64BE(16) ?? -1n);
    if (Number.isSafeInteger(header)) seal(fd, header, 1024, 'cxsparse', ones(36));
  });
}
