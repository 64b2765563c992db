import { COMPRESSED, EXTENSION, HEADER, Qcow2Bytes } from '../support/qcow2-bytes.js';
import { Collector, type Layout } from './layout.js';

/** Fields of the header with 64 bits; the others have 32. */
const LONG: ReadonlySet<string> = new Set([
  'backingFileOffset',
  'size',
  'l1TableOffset',
  'refcountTableOffset',
  'snapshotsOffset',
  'incompatibleFeatures',
  'compatibleFeatures',
  'autoclearFeatures',
]);
/** Most entries of one table that become fields of their own. */
const MOST = 512;

class Qcow2Collector extends Collector {
  readonly image: Qcow2Bytes;

  constructor(image: Qcow2Bytes) {
    super(image.bytes);
    this.image = image;
  }

  header(): void {
    const { image } = this;
    for (const [name, at] of Object.entries(HEADER)) {
      if (at < image.headerLength) this.field('header', at, LONG.has(name) ? 8 : at === 104 ? 1 : 4);
    }
    this.region('header bytes', 0, image.headerLength);
    for (const { at, type, length } of image.extensions()) {
      this.field('extension', at, 4);
      this.field('extension', at + 4, 4);
      this.region('extension bytes', at, 8 + length);
      if (type === EXTENSION.bitmaps) this.bitmaps(at + 8);
    }
    const name = Number(image.u64(HEADER.backingFileOffset));
    if (name !== 0) this.region('backing name', name, image.u32(HEADER.backingFileSize));
  }

  tables(kind: string, l1: number, entries: number): void {
    const { image } = this;
    const extended = image.version > 2 && (image.u64(HEADER.incompatibleFeatures) & 16n) !== 0n;
    const dataFile = image.version > 2 && (image.u64(HEADER.incompatibleFeatures) & 4n) !== 0n;
    const step = extended ? 16 : 8;
    this.region(`${kind}l1 bytes`, l1, entries * 8);
    for (let index = 0; index < entries; index++) {
      const table = image.place(l1 + index * 8);
      if (index < MOST) this.field(`${kind}l1`, l1 + index * 8, 8);
      if (table === 0) continue;
      this.region(`${kind}l2 bytes`, table, image.clusterSize);
      for (let at = table; at < table + image.clusterSize && at + step <= image.bytes.length; at += step) {
        const entry = image.u64(at);
        const used = entry !== 0n;
        // Of those that are not used the first ones will do.
        if (used || at < table + 8 * step) {
          this.field(`${kind}l2`, at, 8);
          if (extended) this.field('subclusters', at + 8, 8);
        }
        if (!used || dataFile) continue;
        if ((entry & COMPRESSED) !== 0n) this.stream(entry);
        else this.places.add(image.place(at));
      }
    }
  }

  stream(entry: bigint): void {
    const x = BigInt(62 - (this.image.clusterBits - 8));
    const at = Number(entry & ((1n << x) - 1n));
    const sectors = Number((entry & (COMPRESSED - 1n)) >> x) + 1;
    this.region('stream', at, sectors * 512 - (at % 512));
  }

  refcounts(): void {
    const { image } = this;
    const table = image.refcountTable;
    const entries = (image.u32(HEADER.refcountTableClusters) * image.clusterSize) / 8;
    this.region('refcount table bytes', table, Math.min(entries, MOST) * 8);
    for (let index = 0; index < Math.min(entries, MOST); index++) {
      const block = image.refcountBlock(index);
      if (block !== 0 || index < 8) this.field('refcount table', table + index * 8, 8);
      // What the blocks of a small image count is at their start.
      if (block !== 0) this.region('refcount block', block, Math.min(image.clusterSize, 512));
    }
  }

  snapshots(): void {
    const { image } = this;
    let at = Number(image.u64(HEADER.snapshotsOffset));
    for (let left = image.u32(HEADER.snapshotCount); left > 0; left--) {
      const start = at;
      for (const [offset, width] of [
        [0, 8],
        [8, 4],
        [12, 2],
        [14, 2],
        [16, 4],
        [32, 4],
        [36, 4],
      ] as const) {
        this.field('snapshot', at + offset, width);
      }
      const extra = image.u32(at + 36);
      for (let offset = 40; offset + 8 <= 40 + extra; offset += 8) this.field('snapshot', at + offset, 8);
      this.tables('snapshot ', image.place(at), image.u32(at + 8));
      at += 40 + extra + image.bytes.readUInt16BE(at + 12) + image.bytes.readUInt16BE(at + 14);
      at = Math.ceil(at / 8) * 8;
      this.region('snapshot bytes', start, at - start);
    }
  }

  bitmaps(data: number): void {
    const { image } = this;
    this.field('bitmaps', data, 4);
    this.field('bitmaps', data + 4, 4);
    this.field('bitmaps', data + 8, 8);
    this.field('bitmaps', data + 16, 8);
    let at = Number(image.u64(data + 16));
    for (let left = image.u32(data); left > 0; left--) {
      for (const [offset, width] of [
        [0, 8],
        [8, 4],
        [12, 4],
        [16, 1],
        [17, 1],
        [18, 2],
        [20, 4],
      ] as const) {
        this.field('bitmap', at + offset, width);
      }
      const table = image.place(at);
      const entries = image.u32(at + 8);
      this.region('bitmap table', table, entries * 8);
      for (let index = 0; index < Math.min(entries, MOST); index++) {
        this.field('bitmap table', table + index * 8, 8);
        const place = image.place(table + index * 8);
        if (place !== 0) this.region('bitmap data', place, image.clusterSize);
      }
      const bytes = 24 + image.bytes.readUInt16BE(at + 18) + image.u32(at + 20);
      this.region('bitmap bytes', at, bytes);
      at += Math.ceil(bytes / 8) * 8;
    }
  }
}

/** Where everything is in an image that is sound. */
export function qcow2Layout(bytes: Buffer): Layout {
  const image = new Qcow2Bytes(bytes);
  const collector = new Qcow2Collector(image);
  collector.header();
  collector.tables('', image.l1, image.u32(HEADER.l1Size));
  collector.refcounts();
  collector.snapshots();
  const { fields, regions, places } = collector;
  return {
    fields,
    regions,
    places: [...places],
    unit: image.clusterSize,
    little: false,
    scale: 1,
    flags: 0xffn << 56n,
  };
}
