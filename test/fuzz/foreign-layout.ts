import { Collector, type Field, type Layout } from './layout.js';

/** Most entries of one table that become fields of their own. */
const MOST = 256;
const SECTOR = 512;

/** Offset in a structure, width. */
type Shape = readonly (readonly [at: number, width: Field['width']])[];

function fields(collector: Collector, kind: string, start: number, shape: Shape): void {
  for (const [at, width] of shape) collector.field(kind, start + at, width);
}

function finish(collector: Collector, rest: Omit<Layout, 'fields' | 'regions' | 'places'>): Layout {
  const { fields: found, regions, places } = collector;
  return { fields: found, regions, places: [...places], ...rest };
}

/** Sums that readers check are made right again after most mutations, see {@link sealVhdx} and {@link sealVpc}. */
const VMDK_HEADER: Shape = [
  [4, 4],
  [8, 4],
  [12, 8],
  [20, 8],
  [28, 8],
  [36, 8],
  [44, 4],
  [48, 8],
  [56, 8],
  [64, 8],
  [77, 2],
];

function vmdkExtent(collector: Collector, bytes: Buffer, start: number): void {
  fields(collector, 'header', start, VMDK_HEADER);
  collector.region('header bytes', start, 80);
  const number = (at: number): number => Number(bytes.readBigUInt64LE(start + at));
  const [capacity, grain, entries] = [number(12), number(20), bytes.readUInt32LE(start + 44)];
  for (const directory of [number(48), number(56)]) {
    if (directory === 0 || directory * SECTOR > bytes.length) continue;
    collector.places.add(directory * SECTOR);
    for (let table = 0; table < Math.ceil(capacity / (grain * entries)); table++) {
      const at = directory * SECTOR + table * 4;
      collector.field('directory', at, 4);
      const first = bytes.readUInt32LE(at) * SECTOR;
      collector.places.add(first);
      for (let index = 0; index < Math.min(entries, MOST); index++) {
        const entry = first + index * 4;
        const place = bytes.readUInt32LE(entry) * SECTOR;
        if (place <= SECTOR && index > 16) continue;
        collector.field('grain', entry, 4);
        collector.places.add(place);
        if (place === 0 || bytes.readUInt16LE(start + 77) === 0) continue;
        collector.field('grain marker', place, 8);
        collector.field('grain marker', place + 8, 4);
        collector.region('stream', place + 12, bytes.readUInt32LE(place + 8));
      }
    }
  }
}

export function vmdkLayout(bytes: Buffer): Layout {
  const collector = new Collector(bytes);
  if (bytes.toString('latin1', 0, 4) !== 'KDMV') {
    collector.region('descriptor', 0, bytes.length);
  } else {
    const text = Number(bytes.readBigUInt64LE(28)) * SECTOR;
    const end = bytes.indexOf(0, text);
    collector.region('descriptor', text, end - text);
    vmdkExtent(collector, bytes, 0);
    const footer = bytes.length - 2 * SECTOR;
    if (footer > SECTOR && bytes.toString('latin1', footer, footer + 4) === 'KDMV') {
      vmdkExtent(collector, bytes, footer);
      fields(collector, 'marker', footer - SECTOR, [
        [0, 8],
        [8, 4],
        [12, 4],
      ]);
    }
  }
  return finish(collector, { unit: SECTOR, little: true, scale: SECTOR, flags: 0n });
}

const VHDX_HEADER: Shape = [
  [8, 8],
  [64, 2],
  [66, 2],
  [68, 4],
  [72, 8],
];
const VHDX_LOG_ENTRY: Shape = [
  [8, 4],
  [12, 4],
  [16, 8],
  [24, 4],
  [48, 8],
  [56, 8],
];

export function vhdxLayout(bytes: Buffer): Layout {
  const collector = new Collector(bytes);
  for (const header of [0x10000, 0x20000]) {
    fields(collector, 'header', header, VHDX_HEADER);
    collector.region('header bytes', header, 80);
    const [log, length] = [Number(bytes.readBigUInt64LE(header + 72)), bytes.readUInt32LE(header + 68)];
    for (let at = log; at < log + length; at += 4096) {
      if (bytes.toString('latin1', at, at + 4) !== 'loge') continue;
      fields(collector, 'log entry', at, VHDX_LOG_ENTRY);
      collector.region('log bytes', at, bytes.readUInt32LE(at + 8));
      for (let change = 0; change < Math.min(bytes.readUInt32LE(at + 24), 8); change++) {
        const place = at + 64 + change * 32;
        fields(collector, 'log change', place, [
          [0, 4],
          [8, 8],
          [16, 8],
          [24, 8],
        ]);
      }
    }
  }
  for (const table of [0x30000, 0x40000]) {
    collector.field('region table', table + 8, 4);
    for (let index = 0; index < bytes.readUInt32LE(table + 8); index++) {
      const entry = table + 16 + index * 32;
      collector.region('region table bytes', entry, 32);
      fields(collector, 'region', entry, [
        [16, 8],
        [24, 4],
        [28, 4],
      ]);
      const place = Number(bytes.readBigUInt64LE(entry + 16));
      collector.places.add(place);
      if (bytes.toString('latin1', place, place + 8) === 'metadata') {
        vhdxMetadata(collector, bytes, place);
        continue;
      }
      for (let block = 0; block < 32; block++) collector.field('block', place + block * 8, 8);
    }
  }
  return finish(collector, { unit: 1 << 20, little: true, scale: 1, flags: 7n });
}

function vhdxMetadata(collector: Collector, bytes: Buffer, start: number): void {
  collector.field('metadata', start + 10, 2);
  for (let index = 0; index < bytes.readUInt16LE(start + 10); index++) {
    const item = start + 32 + index * 32;
    collector.region('metadata bytes', item, 32);
    fields(collector, 'item', item, [
      [16, 4],
      [20, 4],
      [24, 4],
    ]);
    const place = start + bytes.readUInt32LE(item + 16);
    const length = bytes.readUInt32LE(item + 20);
    collector.region('item bytes', place, length);
    if (length === 8)
      fields(collector, 'parameter', place, [
        [0, 8],
        [0, 4],
        [4, 4],
      ]);
    else collector.field('parameter', place, 4);
  }
}

const VPC_FOOTER: Shape = [
  [8, 4],
  [12, 4],
  [16, 8],
  [28, 4],
  [40, 8],
  [48, 8],
  [56, 2],
  [58, 1],
  [59, 1],
  [60, 4],
];
const VPC_HEADER: Shape = [
  [8, 8],
  [16, 8],
  [24, 4],
  [28, 4],
  [32, 4],
];

export function vpcLayout(bytes: Buffer): Layout {
  const collector = new Collector(bytes);
  for (const footer of [0, bytes.length - SECTOR]) {
    if (bytes.toString('latin1', footer, footer + 8) !== 'conectix') continue;
    fields(collector, 'footer', footer, VPC_FOOTER);
    collector.region('footer bytes', footer, 85);
  }
  if (bytes.toString('latin1', 512, 520) === 'cxsparse') {
    fields(collector, 'header', 512, VPC_HEADER);
    collector.region('header bytes', 512, 64);
    const table = Number(bytes.readBigUInt64BE(512 + 16));
    collector.places.add(table);
    for (let block = 0; block < Math.min(MOST, bytes.readUInt32BE(512 + 28)); block++) {
      collector.field('block', table + block * 4, 4);
      const place = bytes.readUInt32BE(table + block * 4) * SECTOR;
      if (place < bytes.length) collector.region('bitmap', place, SECTOR);
    }
  }
  return finish(collector, { unit: SECTOR, little: false, scale: SECTOR, flags: 0n });
}

export function vdiLayout(bytes: Buffer): Layout {
  const collector = new Collector(bytes);
  for (const at of [0x44, 0x48, 0x4c, 0x154, 0x158, 0x168, 0x178, 0x17c, 0x180, 0x184]) {
    collector.field('header', at, 4);
  }
  collector.field('header', 0x170, 8);
  collector.region('header bytes', 0, 512);
  const table = bytes.readUInt32LE(0x154);
  collector.places.add(table).add(bytes.readUInt32LE(0x158));
  for (let block = 0; block < Math.min(MOST, bytes.readUInt32LE(0x180)); block++) {
    collector.field('block', table + block * 4, 4);
  }
  return finish(collector, { unit: 1 << 20, little: true, scale: 1 << 20, flags: 0n });
}
