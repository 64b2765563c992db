import { join } from 'node:path';
import { deflateRawSync } from 'node:zlib';
import { describe, expect, it } from 'vitest';
import { Random } from '../support/data.js';
import { hasPeer, run } from '../support/peers.js';
import { COMPRESSED, Qcow2Bytes } from '../support/qcow2-bytes.js';
import { temporaryFolder, Workbench } from './qcow2-support.js';

const folder = temporaryFolder();
const bench = new Workbench();
const path = join(folder, 'bad.qcow2');

/** An image whose first cluster is compressed to `stream`, at the end of the file; `sectors` are those it takes. */
function image(type: 'zlib' | 'zstd', clusterBits: number, stream: Uint8Array, sectors?: number): Qcow2Bytes {
  bench.create(path, { length: 4 << 20, clusterBits, compressionType: type === 'zstd' ? 1 : 0 });
  const open = bench.open(path, false);
  bench.write(open.node, 0, Buffer.alloc(512, 1));
  open.close();
  const bytes = Qcow2Bytes.read(path);
  const place = bytes.append(stream);
  const x = BigInt(62 - (clusterBits - 8));
  const count = sectors ?? Math.ceil(stream.length / 512);
  bytes.put64(bytes.l2(), COMPRESSED | (BigInt(count - 1) << x) | BigInt(place));
  bytes.save(path);
  return bytes;
}

/** What the first cluster reads as, or what reading it throws; the memory must be back. */
function readCluster(clusterSize: number): Buffer {
  const used = bench.runtime.arena.usedBytes;
  const open = bench.open(path, true);
  try {
    return bench.read(open.node, 0, clusterSize);
  } finally {
    open.close();
    expect(bench.runtime.arena.usedBytes).toBe(used);
  }
}

/** A Zstandard frame (RFC 8878) of blocks. A window descriptor of n is a window of 2^(10 + n / 8) bytes. */
function frame(blocks: readonly Buffer[], options: { window?: number; size?: bigint } = {}): Buffer {
  const { window = 11 << 3, size } = options;
  const head = Buffer.from([0x28, 0xb5, 0x2f, 0xfd, size === undefined ? 0 : 0xc0, window]);
  const sizeBytes = Buffer.alloc(size === undefined ? 0 : 8);
  if (size !== undefined) sizeBytes.writeBigUInt64LE(size);
  const last = blocks.at(-1);
  if (last !== undefined) last[0] = (last[0] ?? 0) | 1;
  return Buffer.concat([head, sizeBytes, ...blocks]);
}

function block(type: number, size: number, content: Uint8Array): Buffer {
  const header = (size << 3) | (type << 1);
  return Buffer.concat([Buffer.from([header & 255, (header >> 8) & 255, header >> 16]), content]);
}
const repeated = (byte: number, count: number): Buffer => block(1, count, Buffer.from([byte]));
const stored = (bytes: Uint8Array): Buffer => block(0, bytes.length, bytes);
const BLOCK = 128 * 1024;

describe.each([9, 12, 16, 21])('clusters of 2^%i bytes', (clusterBits) => {
  const size = 2 ** clusterBits;
  const content = Buffer.alloc(size);
  for (let byte = 0; byte < size; byte++) content[byte] = (byte % 251) ^ (byte >> 8);
  const broken = expect.objectContaining({
    code: 'ERR_STILLFRAME_CORRUPT_IMAGE',
    message: expect.stringMatching(/'.*bad\.qcow2'.* guest offset 0 \(file offset \d+\)/),
  });

  describe('deflate', () => {
    it('a stream of exactly a cluster, with other data behind it', () => {
      image('zlib', clusterBits, Buffer.concat([deflateRawSync(content), Buffer.alloc(400, 0xff)]));
      expect(readCluster(size).equals(content)).toBe(true);
    });

    it('a bomb: what it makes beyond a cluster is never made', () => {
      const bomb = deflateRawSync(
        Buffer.alloc(Math.min(size * 2000, 64 << 20), 0x5a).fill(1, 0, 10),
      ).subarray(0, size * 2);
      image('zlib', clusterBits, bomb);
      expect(readCluster(size).equals(Buffer.alloc(size, 0x5a).fill(1, 0, 10))).toBe(true);
    });

    it('a stream of a byte more than a cluster, or damaged behind it: the cluster', () => {
      image('zlib', clusterBits, deflateRawSync(Buffer.concat([content, content.subarray(0, 1)])));
      expect(readCluster(size).equals(content)).toBe(true);
      const stream = deflateRawSync(Buffer.concat([content, new Random(1).noise(size)]));
      image(
        'zlib',
        clusterBits,
        stream.fill(0xff, stream.length - Math.floor(size / 2)).subarray(0, size * 2),
      );
      expect(readCluster(size).equals(content)).toBe(true);
    });

    it('a stream of a byte less than a cluster', () => {
      image('zlib', clusterBits, deflateRawSync(content.subarray(1)));
      expect(() => readCluster(size)).toThrow(broken);
    });

    it('no stream at all', () => {
      for (const bytes of [Buffer.alloc(512), Buffer.alloc(512, 0xff), new Random(clusterBits).noise(512)]) {
        image('zlib', clusterBits, bytes);
        expect(() => readCluster(size)).toThrow(broken);
      }
    });
  });

  describe('zstd', () => {
    it('a frame of exactly a cluster', () => {
      const blocks = [];
      for (let at = 0; at < size; at += BLOCK) blocks.push(stored(content.subarray(at, at + BLOCK)));
      image('zstd', clusterBits, Buffer.concat([frame(blocks), Buffer.alloc(100, 7)]));
      expect(readCluster(size).equals(content)).toBe(true);
    });

    it('several frames that make a cluster', () => {
      const half = size / 2;
      const part = Math.min(BLOCK, half);
      const blocks = (byte: number) => Array.from({ length: half / part }, () => repeated(byte, part));
      image('zstd', clusterBits, Buffer.concat([frame(blocks(1)), frame(blocks(2))]));
      expect(readCluster(size).equals(Buffer.alloc(size, 1).fill(2, half))).toBe(true);
    });

    it('a bomb of 4 GiB in four bytes for every 128 KiB, which QEMU refuses as well', () => {
      const blocks = Array.from({ length: Math.min(32768, Math.floor((size * 2 - 20) / 4)) }, () =>
        repeated(3, BLOCK),
      );
      image('zstd', clusterBits, frame(blocks));
      expect(() => readCluster(size)).toThrow(broken);
      if (hasPeer('qemu-io')) {
        expect(() => run('qemu-io', ['-r', '-f', 'qcow2', '-c', `read 0 ${size}`, path])).toThrow(
          'read failed',
        );
      }
    });

    it('a frame whose end is behind the compressed data', () => {
      const blocks = Array.from({ length: Math.ceil(size / BLOCK) }, () =>
        repeated(3, Math.min(BLOCK, size)),
      );
      const whole = frame(blocks);
      // The last block says that another one follows.
      const last = blocks.at(-1)?.length ?? 0;
      const at = whole.length - last;
      whole[at] = (whole[at] ?? 0) & ~1;
      const stream = Buffer.concat([
        whole,
        Buffer.alloc(Math.ceil(whole.length / 512) * 512 - whole.length, 0xff),
      ]);
      image('zstd', clusterBits, stream);
      expect(() => readCluster(size)).toThrow(broken);
    });

    it('blocks that are all sequences and no data', () => {
      // 98,303 sequences of the longest copies there are: what does not check them takes minutes.
      const head = Buffer.from([0b0000_0001, 0xff, 0xff, 0xff, 0b0101_0100, 35, 31, 52]);
      const body = Buffer.concat([head, new Random(5).noise(400)]);
      image('zstd', clusterBits, frame([block(2, body.length, body)]));
      expect(() => readCluster(size)).toThrow(broken);
    });

    it('a frame of less than a cluster', () => {
      image('zstd', clusterBits, frame([repeated(3, Math.min(size, BLOCK) - 1)]));
      expect(() => readCluster(size)).toThrow(broken);
    });

    it.each<[string, { window?: number; size?: bigint }]>([
      ['a window of 3.75 TiB', { window: 255 }],
      ['a window of 256 MiB', { window: 18 << 3 }],
      ['a size of 2^64 - 1 bytes', { size: 2n ** 64n - 1n }],
      ['a size of 4 GiB', { size: 2n ** 32n }],
    ])('a frame that claims %s', (_, claim) => {
      const blocks = Array.from({ length: Math.ceil(size / BLOCK) }, () =>
        repeated(3, Math.min(BLOCK, size)),
      );
      image('zstd', clusterBits, frame(blocks, claim));
      expect(() => readCluster(size)).toThrow(broken);
    });

    it('no frame at all', () => {
      for (const bytes of [
        Buffer.alloc(512),
        Buffer.alloc(512, 0xff),
        frame([]),
        frame([block(3, 100, Buffer.alloc(100))]),
      ]) {
        image('zstd', clusterBits, bytes);
        expect(() => readCluster(size)).toThrow(broken);
      }
    });
  });

  it('a range that goes on behind the end of the file reads as short', () => {
    const stream = deflateRawSync(content.fill(0x77));
    const most = 2 ** (clusterBits - 8);
    const bytes = image('zlib', clusterBits, stream, most);
    const end = bytes.bytes.length - size + stream.length;
    new Qcow2Bytes(bytes.bytes.subarray(0, end)).save(path);
    expect(readCluster(size).equals(content)).toBe(true);
    if (hasPeer('qemu-io')) {
      expect(run('qemu-io', ['-r', '-f', 'qcow2', '-c', `read -P 0x77 0 ${size}`, path])).not.toContain(
        'failed',
      );
    }
    new Qcow2Bytes(bytes.bytes.subarray(0, end - stream.length + 2)).save(path);
    expect(() => readCluster(size)).toThrow(broken);
  });
});
