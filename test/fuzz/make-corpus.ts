/**
 * Makes the images that the fuzzer starts from, with QEMU's own tools: `node bench/dist/test/fuzz/make-corpus.js`.
 * They are kept in test/fuzz/corpus, so that a seed means the same everywhere: those that are there stay as they are.
 */
import { existsSync, mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { brotliCompressSync, constants } from 'node:zlib';
import { cowd, logEntry, putLog, streamOptimized } from '../block/foreign-images.js';
import { run } from '../support/peers.js';
import { COMMON, CORPUS } from './corpus.js';

type Make = (name: string) => void;

const folder = mkdtempSync(join(tmpdir(), 'stillframe-corpus-'));

function img(...args: string[]): void {
  run('qemu-img', args);
}

function io(format: string, file: string, ...commands: string[]): void {
  run('qemu-io', ['-f', format, ...commands.flatMap((command) => ['-c', command]), file]);
}

/** A new image, written to. */
function qcow2(name: string, options: string, size: string, ...commands: string[]): void {
  img('create', '-q', '-f', 'qcow2', '-o', options, name, size);
  if (commands.length > 0) io('qcow2', name, ...commands);
}

/** Data, zeroes and holes, in numbers of clusters of `k` bytes; needs 64 of them. */
function mixed(k: number): string[] {
  const range = (first: number, count: number) => `${Math.floor(first * k)} ${Math.floor(count * k)}`;
  return [
    `write -P 0x11 ${range(0, 3)}`,
    `write -P 0x22 ${range(5, 1)}`,
    `write -P 0x33 ${range(8.5, 1)}`,
    `write -z ${range(12, 4)}`,
    `write -P 0x44 ${range(20, 6)}`,
    `discard ${range(22, 2)}`,
    `write -z -u ${range(24, 1)}`,
    `write -P 0x55 ${range(61, 3)}`,
  ];
}

function overlay(
  name: string,
  backing: string,
  format: string,
  options: string,
  ...commands: string[]
): void {
  img('create', '-q', '-f', 'qcow2', '-b', backing, '-F', format, '-o', options, name);
  if (commands.length > 0) io('qcow2', name, ...commands);
}

/** A raw file that compresses well, every 512 bytes different. */
function patterned(name: string, bytes: number): void {
  const content = Buffer.alloc(bytes);
  for (let at = 0; at < bytes; at++) content[at] = at % 32 < 4 ? (at >> 9) * (1 + (at % 4)) : at >> 13;
  writeFileSync(join(folder, name), content);
}

function compressed(name: string, type: string, clusterSize: string, bytes: number): void {
  patterned('content.raw', bytes);
  const options = `cluster_size=${clusterSize},compression_type=${type}`;
  img('convert', '-c', '-f', 'raw', '-O', 'qcow2', '-o', options, 'content.raw', name);
}

function bits(name: string, field: number, value: bigint): void {
  const bytes = readFileSync(join(folder, name));
  bytes.writeBigUInt64BE(bytes.readBigUInt64BE(field) | value, field);
  writeFileSync(join(folder, name), bytes);
}

const common: Record<(typeof COMMON)[number], Make> = {
  'base.raw': (name) => patterned(name, 40_000),
  'data.raw': (name) => patterned(name, 65_536),
  'base.qcow2': (name) => qcow2(name, 'cluster_size=1k', '48k', ...mixed(700)),
  'middle.qcow2': (name) => overlay(name, 'base.qcow2', 'qcow2', 'cluster_size=2k', 'write -P 0x66 3k 5k'),
  'base.vmdk': (name) => foreign('vmdk', 'subformat=monolithicSparse', '256k', 4096)(name),
  'part.vmdk': (name) => foreign('vmdk', 'subformat=monolithicSparse', '64k', 1024)(name),
  'part-cowd.vmdk': (name) => {
    patterned('content.raw', 32_768);
    writeFileSync(join(folder, name), cowd(readFileSync(join(folder, 'content.raw')), 4));
  },
};

const images: Record<string, Make> = {
  'v3-512': (name) => qcow2(name, 'cluster_size=512', '32k', ...mixed(512)),
  'v3-1k-refcount1': (name) => qcow2(name, 'cluster_size=1k,refcount_bits=1', '64k', ...mixed(1024)),
  'v3-4k-refcount64': (name) => qcow2(name, 'cluster_size=4k,refcount_bits=64', '256k', ...mixed(4096)),
  'v3-512-refcount64': (name) => qcow2(name, 'cluster_size=512,refcount_bits=64', '128k', ...mixed(2048)),
  'v3-2k-refcount4': (name) => qcow2(name, 'cluster_size=2k,refcount_bits=4', '128k', ...mixed(2048)),
  'v2-512': (name) => qcow2(name, 'cluster_size=512,compat=0.10', '32k', ...mixed(512)),
  'v2-4k': (name) => qcow2(name, 'cluster_size=4k,compat=0.10', '256k', ...mixed(4096)),
  'v3-64k': (name) => qcow2(name, 'cluster_size=64k', '256k', ...mixed(4096)),
  'v3-2m': (name) => qcow2(name, 'cluster_size=2M', '4M', 'write -P 0x11 0 4k', 'write -P 0x22 3M 512'),
  'odd-size': (name) => qcow2(name, 'cluster_size=4k', '66048', 'write -P 0x11 60k 4608'),
  empty: (name) => qcow2(name, 'cluster_size=512', '0'),
  sparse: (name) => qcow2(name, 'cluster_size=512', '8M', 'write -P 0x11 1M 2k', 'write -P 0x22 8387584 1k'),
  terabyte: (name) => qcow2(name, 'cluster_size=2M', '1T', 'write -P 0x11 512G 512'),
  prealloc: (name) => qcow2(name, 'cluster_size=1k,preallocation=metadata', '64k', 'write -P 0x11 5k 3k'),
  lazy: (name) => {
    qcow2(name, 'cluster_size=1k,lazy_refcounts=on', '64k', ...mixed(1024));
    bits(name, 72, 1n);
  },
  corrupt: (name) => {
    qcow2(name, 'cluster_size=1k', '64k', ...mixed(1024));
    bits(name, 72, 2n);
  },
  'zlib-512': (name) => compressed(name, 'zlib', '512', 16_384),
  'zlib-4k': (name) => compressed(name, 'zlib', '4k', 65_536),
  'zlib-64k': (name) => {
    compressed(name, 'zlib', '64k', 262_144);
    io('qcow2', name, 'write -P 9 70k 1k');
  },
  'zstd-512': (name) => compressed(name, 'zstd', '512', 16_384),
  'zstd-4k': (name) => compressed(name, 'zstd', '4k', 65_536),
  'zstd-64k': (name) => compressed(name, 'zstd', '64k', 262_144),
  snapshots: (name) => {
    qcow2(name, 'cluster_size=1k', '64k', ...mixed(1024));
    img('snapshot', '-c', 'first', name);
    io('qcow2', name, 'write -P 0x77 1k 5k', 'write -z 20k 3k');
    img('snapshot', '-c', 'the second', name);
    io('qcow2', name, 'write -P 0x78 2k 2k');
  },
  'snapshots-v2': (name) => {
    qcow2(name, 'cluster_size=512,compat=0.10', '32k', ...mixed(512));
    img('snapshot', '-c', 'old', name);
    io('qcow2', name, 'write -P 0x77 1k 5k');
  },
  bitmaps: (name) => {
    qcow2(name, 'cluster_size=1k', '128k', ...mixed(1024));
    img('bitmap', '--add', '-g', '512', name, 'fine');
    img('bitmap', '--add', '-g', '64k', name, 'coarse');
    img('bitmap', '--add', '--disable', '-g', '4k', name, 'disabled');
    io('qcow2', name, 'write -P 0x77 1k 5k', 'write -P 0x78 100k 2k');
  },
  'bitmaps-512': (name) => {
    qcow2(name, 'cluster_size=512', '4M', 'write -P 1 0 512');
    img('bitmap', '--add', '-g', '512', name, 'b');
    io('qcow2', name, 'write -P 0x77 1k 5k', 'write -P 0x78 3M 2k');
  },
  'over-raw': (name) => overlay(name, 'base.raw', 'raw', 'cluster_size=1k', ...mixed(600)),
  'over-raw-v2': (name) => overlay(name, 'base.raw', 'raw', 'cluster_size=512,compat=0.10', ...mixed(512)),
  'over-chain': (name) => overlay(name, 'middle.qcow2', 'qcow2', 'cluster_size=4k', 'write -P 0x11 9k 6k'),
  'over-larger': (name) => {
    img('create', '-q', '-f', 'qcow2', '-b', 'base.raw', '-F', 'raw', '-o', 'cluster_size=512', name, '64k');
    io('qcow2', name, 'write -P 0x11 39k 2k', 'write -z 50k 1k');
  },
  'over-zstd': (name) => {
    const options = 'cluster_size=4k,compression_type=zstd';
    patterned('content.raw', 40_000);
    img(
      'convert',
      '-c',
      '-f',
      'raw',
      '-O',
      'qcow2',
      '-B',
      'base.qcow2',
      '-F',
      'qcow2',
      '-o',
      options,
      'content.raw',
      name,
    );
  },
  subclusters: (name) => qcow2(name, 'cluster_size=16k,extended_l2=on', '256k', ...mixed(4096)),
  'subclusters-over': (name) =>
    overlay(name, 'base.raw', 'raw', 'cluster_size=16k,extended_l2=on', ...mixed(600)),
  'subclusters-zstd': (name) => {
    patterned('content.raw', 131_072);
    const options = 'cluster_size=16k,extended_l2=on,compression_type=zstd';
    img('convert', '-c', '-f', 'raw', '-O', 'qcow2', '-o', options, 'content.raw', name);
    io('qcow2', name, 'write -P 9 20k 1k', 'write -z 40k 2k', 'discard 64k 16k');
  },
  'data-file': (name) => {
    rmSync(join(folder, 'data.raw'));
    qcow2(name, 'cluster_size=1k,data_file=data.raw', '64k', ...mixed(1024));
  },
  'data-file-raw': (name) => {
    rmSync(join(folder, 'data.raw'));
    qcow2(name, 'cluster_size=4k,data_file=data.raw,data_file_raw=on', '64k', ...mixed(1024));
  },
  'data-file-subclusters': (name) => {
    rmSync(join(folder, 'data.raw'));
    qcow2(name, 'cluster_size=16k,data_file=data.raw,extended_l2=on', '64k', ...mixed(1024));
  },
};

/** An image of another format, written to in pieces of `k` bytes. */
function foreign(format: string, options: string, size: string, k: number): Make {
  return (name) => {
    img('create', '-q', '-f', format, ...(options === '' ? [] : ['-o', options]), name, size);
    const commands = mixed(k).filter((command) => !command.startsWith('discard'));
    io(format, name, ...commands.map((command) => command.replace(' -u', '')));
  };
}

function vmdkDescriptor(name: string, createType: string, lines: readonly string[]): void {
  const head = ['# Disk DescriptorFile', 'version=1', 'CID=12345678', 'parentCID=ffffffff'];
  const text = [...head, `createType="${createType}"`, ...lines, ''].join('\n');
  writeFileSync(join(folder, name), text);
}

function edited(name: string, change: (bytes: Buffer) => void): void {
  const bytes = readFileSync(join(folder, name));
  change(bytes);
  writeFileSync(join(folder, name), bytes);
}

const MIB = 1 << 20;

const vmdk: Record<string, Make> = {
  sparse: foreign('vmdk', 'subformat=monolithicSparse', '512k', 8000),
  'sparse-zeroes': foreign('vmdk', 'subformat=monolithicSparse,zeroed_grain=on', '1M', 16_000),
  stream: (name) => {
    patterned('content.raw', 300_032);
    img('convert', '-f', 'raw', '-O', 'vmdk', '-o', 'subformat=streamOptimized', 'content.raw', name);
  },
  'stream-footer': (name) => {
    patterned('content.raw', 300_032);
    writeFileSync(join(folder, name), streamOptimized(readFileSync(join(folder, 'content.raw'))));
  },
  flat: (name) =>
    vmdkDescriptor(name, 'monolithicFlat', ['RW 70 FLAT "base.raw" 0', 'RW 8 FLAT "base.raw" 4']),
  extents: (name) =>
    vmdkDescriptor(name, 'twoGbMaxExtentSparse', ['RW 128 SPARSE "part.vmdk"', 'RW 128 SPARSE "part.vmdk"']),
  esx: (name) => vmdkDescriptor(name, 'vmfsSparse', ['RW 64 VMFSSPARSE "part-cowd.vmdk"']),
  over: (name) => {
    img('create', '-q', '-f', 'vmdk', '-b', 'base.vmdk', '-F', 'vmdk', name);
    io('vmdk', name, 'write -P 0x77 70k 5k');
  },
};

const vhdx: Record<string, Make> = {
  dynamic: foreign('vhdx', 'subformat=dynamic,block_size=1M,log_size=1M', '3M', 40_960),
  fixed: foreign('vhdx', 'subformat=fixed,block_size=1M,log_size=1M', '2M', 20_480),
  log: (name) => {
    foreign('vhdx', 'subformat=dynamic,block_size=1M,log_size=1M', '2M', 20_480)(name);
    edited(name, (bytes) => {
      const table = bytes.readBigUInt64LE(0x30000 + 16 + 16);
      const other = bytes.readBigUInt64LE(0x30000 + 48 + 16);
      const map = Number(
        bytes.toString('latin1', Number(table), Number(table) + 8) === 'metadata' ? other : table,
      );
      const changed = Buffer.from(bytes.subarray(map, map + 4096));
      changed.writeBigUInt64LE(changed.readBigUInt64LE(0), 8);
      const first = Number(changed.readBigUInt64LE(0) & ~0xfffffn);
      const entries = [
        logEntry(7n, 0, bytes.length, [{ offset: first, data: Buffer.alloc(4096, 0x99) }]),
        logEntry(8n, 0, bytes.length, [
          { offset: map, data: changed },
          { offset: first + 8192, data: 4096 },
        ]),
      ];
      putLog(bytes, 0, entries);
    });
  },
};

const vpc: Record<string, Make> = {
  dynamic: foreign('vpc', 'subformat=dynamic,force_size=on', '5M', 65_536),
  fixed: foreign('vpc', 'subformat=fixed,force_size=on', '1M', 16_384),
  geometry: foreign('vpc', 'subformat=dynamic', '1M', 8192),
};

const vdi: Record<string, Make> = {
  dynamic: foreign('vdi', '', '3M', 40_960),
  static: foreign('vdi', 'static=on', '2M', 20_480),
  odd: foreign('vdi', '', String(2 * MIB + 1536), 16_384),
};

const FOREIGN: Readonly<Record<string, Record<string, Make>>> = { vmdk, vhdx, vpc, vdi };

function keep(from: string, format: string, name: string): void {
  const path = join(CORPUS, `${format}.json`);
  const kept: Record<string, string> = existsSync(path) ? JSON.parse(readFileSync(path, 'utf8')) : {};
  if (kept[name] !== undefined) return;
  const params = { [constants.BROTLI_PARAM_LGWIN]: 24 };
  const bytes = brotliCompressSync(readFileSync(join(folder, from)), { params });
  kept[name] = bytes.toString('base64');
  writeFileSync(path, `${JSON.stringify(kept, null, 2)}\n`);
  console.log(`${name}: ${bytes.length} bytes`);
}

mkdirSync(CORPUS, { recursive: true });
try {
  process.chdir(folder);
  for (const name of COMMON) {
    common[name](name);
    keep(name, 'common', name);
  }
  for (const [name, make] of Object.entries(images)) {
    make('image.qcow2');
    keep('image.qcow2', 'qcow2', name);
    rmSync('image.qcow2');
    if (!existsSync('data.raw')) patterned('data.raw', 65_536);
  }
  for (const [format, makers] of Object.entries(FOREIGN)) {
    for (const [name, make] of Object.entries(makers)) {
      make(`image.${format}`);
      keep(`image.${format}`, format, name);
      rmSync(`image.${format}`);
    }
  }
} finally {
  rmSync(folder, { recursive: true, force: true });
}
