/** VHDX images that were not closed: what their log holds is shown as if it were in its place. */
import { copyFileSync, readFileSync, writeFileSync } from 'node:fs';
import { beforeAll, describe, expect, it } from 'vitest';
import { openImage } from '#src/block/graph.js';
import { Random } from '../support/data.js';
import { type LoggedChange, logEntry, putLog, seal, vhdxHeader } from './foreign-images.js';
import { at, expectContent, io, peers, qemuImg, runtime } from './foreign-support.js';

const MIB = 1024 * 1024;
const SECTOR = 4096;

/** Refuses as corrupt, with the words. */
function expectCorrupt(name: string, words: RegExp): void {
  const corrupt = expect.objectContaining({
    code: 'ERR_STILLFRAME_CORRUPT_IMAGE',
    message: expect.stringMatching(words),
  });
  expect(() => openImage(runtime, at(name), { readOnly: true })).toThrow(corrupt);
}

describe.skipIf(!peers)('the log of a VHDX', () => {
  let clean: Buffer;
  let tableAt: number;
  let firstBlock: number;

  beforeAll(() => {
    qemuImg('create', '-q', '-f', 'vhdx', '-o', 'block_size=1M', 'clean.vhdx', '8M');
    io('clean.vhdx', 'vhdx', 'write -P 1 0 1M', 'write -P 2 3M 1M');
    clean = readFileSync(at('clean.vhdx'));
    tableAt = regionOf(clean, '6677c22d23f600429d64115e9bfd4a08');
    firstBlock = Number(clean.readBigUInt64LE(tableAt) >> 20n) * MIB;
  });

  /** Offset of a region of the file. */
  function regionOf(image: Buffer, guid: string): number {
    const table = image.subarray(0x30000, 0x40000);
    for (let entry = 0; entry < table.readUInt32LE(8); entry++) {
      const bytes = table.subarray(16 + entry * 32);
      if (bytes.toString('hex', 0, 16) === guid) return Number(bytes.readBigUInt64LE(16));
    }
    throw new Error(`no region ${guid}`);
  }

  function image(position: number, entries: readonly Buffer[], longer = 0): Buffer {
    const bytes = Buffer.concat([clean, Buffer.alloc(longer)]);
    putLog(bytes, position, entries);
    return bytes;
  }

  /** The image reads as the clean one does after the changes. */
  function expectReplayed(name: string, bytes: Buffer, changes: readonly LoggedChange[]): void {
    writeFileSync(at(name), bytes);
    const whole = Math.max(clean.length, ...changes.map(({ offset }) => offset + MIB));
    const changed = Buffer.concat([clean, Buffer.alloc(Math.ceil((whole - clean.length) / MIB) * MIB)]);
    for (const { offset, data } of changes) {
      if (typeof data === 'number') changed.fill(0, offset, offset + data);
      else changed.set(data, offset);
    }
    writeFileSync(at('changed.vhdx'), changed);
    qemuImg('convert', '-O', 'raw', 'changed.vhdx', 'changed.raw');
    expectContent(name, readFileSync(at('changed.raw')));
    expect(readFileSync(at(name)).equals(bytes), 'the image is left as it is').toBe(true);
  }

  /** And as QEMU reads a copy of it whose log it has replayed. */
  function expectReplayedAlike(name: string): void {
    copyFileSync(at(name), at('replayed.vhdx'));
    qemuImg('check', '-q', '-r', 'all', 'replayed.vhdx');
    qemuImg('convert', '-O', 'raw', 'replayed.vhdx', 'replayed.raw');
    expectContent(name, readFileSync(at('replayed.raw')));
  }

  /** The sector of the block table with the first entries, one of them changed. */
  function tableWith(entry: number, value: bigint): LoggedChange {
    const data = Buffer.from(clean.subarray(tableAt, tableAt + SECTOR));
    data.writeBigUInt64LE(value, entry * 8);
    return { offset: tableAt, data };
  }

  it('is replayed: data, zeroes and the block table', () => {
    const random = new Random(1);
    const changes = [
      { offset: firstBlock + 8 * SECTOR, data: random.noise(SECTOR) },
      { offset: firstBlock + 16 * SECTOR, data: 32 * SECTOR },
      tableWith(3, 0n),
    ];
    expectReplayed('log.vhdx', image(0, [logEntry(7n, 0, clean.length, changes)]), changes);
    expectReplayedAlike('log.vhdx');
  });

  it('of several entries, the newer one winning, around its end', () => {
    const random = new Random(2);
    const change = (sector: number): LoggedChange => ({
      offset: firstBlock + sector * SECTOR,
      data: random.noise(SECTOR),
    });
    const position = MIB - 3 * SECTOR;
    const changes = [
      [change(0), change(1), { offset: firstBlock + 2 * SECTOR, data: 8 * SECTOR }],
      [change(4), change(5), { offset: firstBlock + 64 * SECTOR, data: 8 * SECTOR }],
      [{ offset: firstBlock + 5 * SECTOR, data: SECTOR }, change(2), change(66)],
      [{ offset: firstBlock + SECTOR, data: 3 * SECTOR }],
    ];
    const entries = changes.map((part, index) => logEntry(20n + BigInt(index), position, clean.length, part));
    for (const start of [position, position - SECTOR, position + SECTOR]) {
      const moved = changes.map((part, index) => logEntry(20n + BigInt(index), start, clean.length, part));
      expectReplayed('around.vhdx', image(start, moved), changes.flat());
    }
    for (const entry of entries) seal(entry.fill(0, 12, 16));
    expectReplayed('in-order.vhdx', image(0, entries), changes.flat());
    expectReplayedAlike('in-order.vhdx');
  });

  it('of many changes in one entry', () => {
    const random = new Random(3);
    const changes = Array.from(
      { length: 200 },
      (_, index): LoggedChange => ({ offset: firstBlock + index * SECTOR, data: random.noise(SECTOR) }),
    );
    expectReplayed('many.vhdx', image(0, [logEntry(2n ** 33n, 0, clean.length, changes)]), changes);
    // What fits into one sector of descriptors; QEMU refuses more.
    const fewer = changes.slice(0, 126);
    expectReplayed('many.vhdx', image(0, [logEntry(2n, 0, clean.length, fewer)]), fewer);
    expectReplayedAlike('many.vhdx');
  });

  it('that makes the file longer', () => {
    const entry = BigInt(clean.length) | 6n;
    const changes = [tableWith(5, entry), { offset: clean.length, data: new Random(4).noise(SECTOR) }];
    const log = logEntry(3n, 0, clean.length, changes);
    for (const missing of [0, SECTOR]) {
      log.writeBigUInt64LE(BigInt(clean.length + MIB - missing), 56);
      expectReplayed('longer.vhdx', image(0, [seal(log)]), changes);
    }
    expectReplayedAlike('longer.vhdx');
  });

  it('starts at the tail of its newest entry: older ones are done', () => {
    const change = (value: number): LoggedChange => ({
      offset: firstBlock,
      data: Buffer.alloc(SECTOR, value),
    });
    const older = logEntry(5n, 0, clean.length, [change(5), { offset: firstBlock + SECTOR, data: SECTOR }]);
    const newer = logEntry(6n, older.length, clean.length, [change(6)]);
    expectReplayed('tail.vhdx', image(0, [older, newer]), [change(6)]);
  });

  it.each<[string, (bytes: Buffer, log: Buffer) => void]>([
    ['of another GUID', (_, log) => seal(Buffer.from(log.fill(1, 32, 48))).copy(log)],
    ['half-written', (_, log) => log.fill(0x99, 5000)],
    ['of no length', (_, log) => log.writeUInt32LE(0, 8)],
    ['longer than the log', (_, log) => log.writeUInt32LE(2 * MIB, 8)],
  ])('with an entry %s has nothing to replay', (_, change) => {
    const entry = logEntry(7n, 0, clean.length, [{ offset: firstBlock, data: Buffer.alloc(SECTOR, 9) }]);
    const bytes = Buffer.from(clean);
    change(bytes, entry);
    putLog(bytes, 0, [entry]);
    expectReplayed('nothing.vhdx', bytes, []);
    expectReplayedAlike('nothing.vhdx');
  });

  it('whose newest entry has its tail nowhere is refused', () => {
    const entry = logEntry(7n, 9 * SECTOR, clean.length, [{ offset: firstBlock, data: SECTOR }]);
    writeFileSync(at('nowhere.vhdx'), image(0, [entry]));
    expectCorrupt('nowhere.vhdx', /but not all of them/);
  });

  it.each<[string, RegExp, (entry: Buffer) => void]>([
    ['a change that is none', /number 0, that is none/, (entry) => entry.write('what', 64)],
    ['a change of another entry', /number 0, that is none/, (entry) => entry.writeBigUInt64LE(6n, 64 + 24)],
    ['a place between sectors', /number 0, that is none/, (entry) => entry.writeBigUInt64LE(1n, 64 + 16)],
    [
      'a place beyond all files',
      /number 0, that is none/,
      (entry) => entry.writeBigUInt64LE(2n ** 63n, 64 + 16),
    ],
    ['data of another entry', /belong to another/, (entry) => entry.writeUInt32LE(8, 2 * SECTOR - 4)],
    ['more changes than it has room for', /too few for 1000/, (entry) => entry.writeUInt32LE(1000, 24)],
    ['more changes than can be', /65536 changes/, (entry) => entry.writeUInt32LE(0xffffffff, 24)],
    [
      'less data than changes',
      /too few for its data/,
      (entry) => {
        entry.writeUInt32LE(2, 24);
        entry.copy(entry, 96, 64, 96);
      },
    ],
    ['a file that is longer', /it is cut off/, (entry) => entry.writeBigUInt64LE(2n ** 40n, 48)],
  ])('with %s is refused', (_, words, change) => {
    const entry = logEntry(7n, 0, clean.length, [{ offset: firstBlock, data: Buffer.alloc(SECTOR, 9) }]);
    change(entry);
    writeFileSync(at('bad.vhdx'), image(0, [seal(entry)]));
    const refused = expect.objectContaining({
      code: expect.stringMatching(/CORRUPT_IMAGE|UNSUPPORTED_FEATURE/),
      message: expect.stringMatching(words),
    });
    expect(() => openImage(runtime, at('bad.vhdx'), { readOnly: true })).toThrow(refused);
  });

  it('whose entries overlap is refused, and not summed up for ever', () => {
    const bytes = Buffer.from(clean);
    const entry = logEntry(7n, 0, clean.length, []);
    entry.writeUInt32LE(MIB, 8);
    putLog(
      bytes,
      0,
      Array.from({ length: 256 }, () => entry),
    );
    writeFileSync(at('overlap.vhdx'), bytes);
    expectCorrupt('overlap.vhdx', /overlap each other/);
  });

  it.each<[string, RegExp, (header: Buffer) => void]>([
    ['not in whole MiB', /whole MiB/, (header) => header.writeBigUInt64LE(5000n, 72)],
    ['of no length', /whole MiB/, (header) => header.writeUInt32LE(0, 68)],
    ['beyond the end', /beyond the end/, (header) => header.writeBigUInt64LE(2n ** 40n, 72)],
    ['of an unknown version', /log of version 9/, (header) => header.writeUInt16LE(9, 64)],
  ])('%s is refused', (_, words, change) => {
    const bytes = image(0, []);
    const header = vhdxHeader(bytes);
    change(header);
    seal(header);
    writeFileSync(at('place.vhdx'), bytes);
    const refused = expect.objectContaining({ message: expect.stringMatching(words) });
    expect(() => openImage(runtime, at('place.vhdx'), { readOnly: true })).toThrow(refused);
  });
});
