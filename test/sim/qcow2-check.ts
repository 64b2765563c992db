/**
 * What `qemu-img check` looks at, for the small images of the simulator, from the bytes of the file alone
 * (specification: QEMU's docs/interop/qcow2). No production code: it is the judge of it.
 */

export interface Qcow2Report {
  /** Damage: a reference without refcount, a wrong flag, a table where none can be. */
  readonly errors: readonly string[];
  /** Clusters whose refcount is larger than what refers to them. */
  readonly leaks: number;
}

const OFFSET = 0x00fffffffffffe00n;
const COPIED = 1n << 63n;
const COMPRESSED = 1n << 62n;

export function checkQcow2(bytes: Uint8Array): Qcow2Report {
  const errors: string[] = [];
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  if (bytes.length < 104 || view.getUint32(0) !== 0x514649fb)
    return { errors: ['it is not a qcow2 image'], leaks: 0 };
  const version = view.getUint32(4);
  const clusterSize = 2 ** view.getUint32(20);
  /** Bits of a compressed entry that are a place in the file. */
  const placeBits = BigInt(62 - (view.getUint32(20) - 8));
  const l1Size = view.getUint32(36);
  const l1Offset = Number(view.getBigUint64(40));
  const tableOffset = Number(view.getBigUint64(48));
  const tableClusters = view.getUint32(56);
  const refcountBits = version === 2 ? 16 : 2 ** view.getUint32(96);
  const clusters = Math.ceil(bytes.length / clusterSize);
  const references = new Uint32Array(clusters);
  const flagged: { readonly cluster: number; readonly what: string; readonly copied: boolean }[] = [];

  const word = (offset: number): bigint => (offset + 8 <= bytes.length ? view.getBigUint64(offset) : 0n);
  const refer = (offset: number, length: number, what: string): void => {
    for (let cluster = Math.floor(offset / clusterSize); cluster * clusterSize < offset + length; cluster++) {
      if (cluster >= clusters) errors.push(`${what} refers to offset ${offset}, beyond the end of the file`);
      else references[cluster] = (references[cluster] ?? 0) + 1;
      if (cluster >= clusters) break;
    }
  };
  const table = (entry: bigint, what: string): number => {
    const offset = Number(entry & OFFSET);
    if (offset % clusterSize !== 0) errors.push(`${what} refers to ${offset}, not the start of a cluster`);
    return offset;
  };

  refer(0, clusterSize, 'the header');
  refer(l1Offset, l1Size * 8, 'the header (L1 table)');
  refer(tableOffset, tableClusters * clusterSize, 'the header (refcount table)');
  const blocks: number[] = [];
  for (let index = 0; index < (tableClusters * clusterSize) / 8; index++) {
    const offset = Number(word(tableOffset + index * 8));
    blocks.push(offset);
    if (offset === 0) continue;
    if (offset % clusterSize !== 0) errors.push(`refcount table entry ${index} is ${offset}`);
    else refer(offset, clusterSize, `refcount table entry ${index}`);
  }
  for (let l1 = 0; l1 < l1Size; l1++) {
    const entry = word(l1Offset + l1 * 8);
    const l2 = table(entry, `L1 entry ${l1}`);
    if (l2 === 0) continue;
    refer(l2, clusterSize, `L1 entry ${l1}`);
    flagged.push({ cluster: l2 / clusterSize, what: `L1 entry ${l1}`, copied: (entry & COPIED) !== 0n });
    for (let index = 0; index < clusterSize / 8; index++) {
      const data = word(l2 + index * 8);
      const what = `L2 entry ${index} of L1 entry ${l1}`;
      if ((data & COMPRESSED) !== 0n) {
        if ((data & COPIED) !== 0n) errors.push(`${what} is compressed and has the copied flag`);
        const offset = Number(data & ((1n << placeBits) - 1n));
        const sectors = Number((data & (COMPRESSED - 1n)) >> placeBits) + 1;
        refer(offset, sectors * 512 - (offset % 512), what);
        continue;
      }
      const offset = table(data, what);
      if (offset === 0) continue;
      refer(offset, clusterSize, what);
      flagged.push({ cluster: offset / clusterSize, what, copied: (data & COPIED) !== 0n });
    }
  }

  for (const { offset, length, what } of version === 2 ? [] : bitmapParts(bytes)) refer(offset, length, what);

  const perBlock = (clusterSize * 8) / refcountBits;
  const refcount = (cluster: number): bigint => {
    const block = blocks[Math.floor(cluster / perBlock)] ?? 0;
    if (block === 0) return 0n;
    const index = cluster % perBlock;
    if (refcountBits < 8) {
      const byte = bytes[block + Math.floor((index * refcountBits) / 8)] ?? 0;
      return BigInt((byte >> ((index * refcountBits) % 8)) & ((1 << refcountBits) - 1));
    }
    let value = 0n;
    const at = block + (index * refcountBits) / 8;
    for (let byte = 0; byte < refcountBits / 8; byte++) value = value * 256n + BigInt(bytes[at + byte] ?? 0);
    return value;
  };
  let leaks = 0;
  for (let cluster = 0; cluster < clusters; cluster++) {
    const [counted, used] = [refcount(cluster), BigInt(references[cluster] ?? 0)];
    if (counted < used)
      errors.push(`cluster ${cluster} is used ${used} times but its refcount is ${counted}`);
    else if (counted > used) leaks++;
  }
  for (const { cluster, what, copied } of flagged) {
    if (copied !== (refcount(cluster) === 1n)) {
      errors.push(
        `${what}: the copied flag is ${copied} but the refcount of cluster ${cluster} is ${refcount(cluster)}`,
      );
    }
  }
  return { errors, leaks };
}

interface Part {
  readonly offset: number;
  readonly length: number;
  readonly what: string;
}

const BITMAPS_EXTENSION = 0x23852875;

/** Where the bitmaps extension of the header has the directory of bitmaps, their tables and their bits. */
function bitmapParts(bytes: Uint8Array): Part[] {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const clusterSize = 2 ** view.getUint32(20);
  let at = view.getUint32(100);
  while (view.getUint32(at) !== BITMAPS_EXTENSION) {
    if (view.getUint32(at) === 0) return [];
    at += 8 + roundUp8(view.getUint32(at + 4));
  }
  const [size, directory] = [Number(view.getBigUint64(at + 16)), Number(view.getBigUint64(at + 24))];
  const parts: Part[] = [{ offset: directory, length: size, what: 'the directory of bitmaps' }];
  for (let entry = directory; entry < directory + size; ) {
    const [table, length] = [Number(view.getBigUint64(entry)), view.getUint32(entry + 8)];
    parts.push({ offset: table, length: length * 8, what: 'a bitmap (table)' });
    for (let index = 0; index < length; index++) {
      const offset = Number(view.getBigUint64(table + index * 8) & OFFSET);
      if (offset !== 0) parts.push({ offset, length: clusterSize, what: `a bitmap (entry ${index})` });
    }
    entry += roundUp8(24 + view.getUint16(entry + 18) + view.getUint32(entry + 20));
  }
  return parts;
}

function roundUp8(length: number): number {
  return Math.ceil(length / 8) * 8;
}
