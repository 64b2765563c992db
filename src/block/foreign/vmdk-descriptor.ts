import { corrupt, SECTOR, type Source, unsupported } from './contract.js';

/**
 * The descriptor of a VMDK: text that says what the drive is made of, in a file of its own or inside of a sparse
 * one.
 *
 * Source: Virtual Disk Format 5.0, VMware; for the types of ESXi what QEMU and libvmdk document.
 */
export interface VmdkDescriptor {
  readonly cid: number;
  readonly parentCid: number;
  /** Empty where the descriptor does not say. */
  readonly createType: string;
  /** Name of the parent as the descriptor has it; undefined where there is none. */
  readonly parent: string | undefined;
  readonly extents: readonly ExtentLine[];
}

/** One line `RW 4192256 SPARSE "name.vmdk"`. */
export interface ExtentLine {
  /** Bytes. */
  readonly length: number;
  readonly type: string;
  readonly name: string;
  /** Of the extent's first byte in the file, bytes; undefined where the line does not say. */
  readonly offset: number | undefined;
}

export const NO_PARENT = 0xffffffff;
const MAX_DESCRIPTOR_BYTES = 1024 * 1024;
/** 8 TiB in pieces of 2 GiB. */
const MAX_EXTENTS = 4096;

/** The text of `length` bytes at `offset`, up to the first zero byte. */
export function readText(file: Source, offset: number, length: number): string {
  const bytes = new Uint8Array(Math.min(length, Math.max(0, file.length - offset), MAX_DESCRIPTOR_BYTES));
  file.readBytes(offset, bytes);
  const end = bytes.indexOf(0);
  return Buffer.from(bytes.buffer, 0, end < 0 ? bytes.length : end).toString('utf8');
}

/**
 * Whether a file starts as a descriptor does: comments and blank lines, then the version. The comment that VMware
 * puts first is not asked for, as QEMU does not.
 */
export function looksLikeDescriptor(head: Uint8Array): boolean {
  const text = Buffer.from(head.buffer, head.byteOffset, head.length).toString('latin1');
  return /^(?:#[^\n]*\n| +\r?\n)*version=[123]\r?\n/.test(text);
}

/** @throws StillframeError ERR_STILLFRAME_CORRUPT_IMAGE, …_UNSUPPORTED_FEATURE */
export function parseDescriptor(path: string, text: string): VmdkDescriptor {
  const parent = /^[ \t]*parentFileNameHint[ \t]*=[ \t]*"([^"\n]*)"/m.exec(text)?.[1];
  return {
    cid: cidOf(/^[ \t]*CID[ \t]*=[ \t]*([0-9a-f]{1,8})\b/im.exec(text)?.[1], 0),
    parentCid: cidOf(/^[ \t]*parentCID[ \t]*=[ \t]*([0-9a-f]{1,8})\b/im.exec(text)?.[1], NO_PARENT),
    createType: /^[ \t]*createType[ \t]*=[ \t]*"([^"\n]*)"/m.exec(text)?.[1] ?? '',
    parent: parent === '' ? undefined : parent,
    extents: extentLines(path, text),
  };
}

function cidOf(digits: string | undefined, absent: number): number {
  return digits === undefined ? absent : Number.parseInt(digits, 16);
}

function extentLines(path: string, text: string): ExtentLine[] {
  const lines: ExtentLine[] = [];
  for (const line of text.split(/[\r\n]+/)) {
    const [, access, rest] = /^\s*(RW|RDONLY|NOACCESS)\s+(.*)$/.exec(line) ?? [];
    if (access === undefined || rest === undefined) continue;
    if (lines.length === MAX_EXTENTS) {
      throw unsupported(
        path,
        `it has more than ${MAX_EXTENTS} extents`,
        'convert it to one file with the program that made it',
      );
    }
    lines.push(extentLine(path, line.trim(), access, rest));
  }
  return lines;
}

function extentLine(path: string, line: string, access: string, rest: string): ExtentLine {
  const shown = line.slice(0, 200);
  if (access !== 'RW') {
    throw unsupported(
      path,
      `it has an extent that is not 'RW': ${shown}`,
      'extents that are RW are supported',
    );
  }
  const [, sectors, type = '', name, offset] =
    /^(-?\d+)\s+(\S+)(?:\s+"([^"]*)"(?:\s+(-?\d+))?)?/.exec(rest) ?? [];
  if (!['FLAT', 'VMFS', 'SPARSE', 'VMFSSPARSE'].includes(type)) {
    throw unsupported(
      path,
      `it has an extent of the type '${type}': ${shown}`,
      'FLAT, VMFS, SPARSE and VMFSSPARSE are supported',
    );
  }
  const invalid =
    name === undefined ||
    name === '' ||
    !(Number(sectors) > 0) ||
    // Only FLAT has an offset, and it must.
    (type === 'FLAT') !== (offset !== undefined) ||
    Number(offset ?? 0) < 0;
  if (invalid) throw corrupt(path, `Invalid extent line: ${shown}`);
  return {
    length: Number(sectors) * SECTOR,
    type,
    name,
    offset: offset === undefined ? undefined : Number(offset) * SECTOR,
  };
}
