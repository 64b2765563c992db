/** What the tests of formats that are only read have in common. */
import { spawnSync } from 'node:child_process';
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, afterEach, expect } from 'vitest';
import { attachNode, closeNode, type OpenImageOptions, openImage } from '#src/block/graph.js';
import type { MapEntry } from '#src/block/map-batch.js';
import type { BlockNode } from '#src/block/node.js';
import { createRuntime } from '#src/kernels/runtime.js';
import { firstDifference, Random } from '../support/data.js';
import { mapEntries } from '../support/map.js';
import { hasPeer, run } from '../support/peers.js';

export const runtime = createRuntime(64 << 20);
const { arena } = runtime;
const BUFFER_BYTES = 4 << 20;
export const buffer = arena.alloc(BUFFER_BYTES, 'test buffer');
const usedBefore = arena.usedBytes;
export const folder = mkdtempSync(join(tmpdir(), 'stillframe-foreign-'));
export const at = (name: string): string => join(folder, name);
afterAll(() => rmSync(folder, { recursive: true, force: true }));
afterEach(() => expect(arena.usedBytes, 'memory given back').toBe(usedBefore));
export const peers = hasPeer('qemu-img') && hasPeer('qemu-io');

export function qemuImg(...args: string[]): string {
  const { status, stdout, stderr } = spawnSync('qemu-img', args, { cwd: folder, encoding: 'utf8' });
  if (status !== 0) throw new Error(`qemu-img ${args.join(' ')}: ${stderr}`);
  return stdout;
}

export function io(image: string, format: string, ...commands: string[]): void {
  run('qemu-io', ['-f', format, ...commands.flatMap((command) => ['-c', command]), at(image)]);
}

/** Opens an image for the body, which may look at it through a facade. */
export function withImage<T>(
  name: string,
  body: (node: BlockNode) => T,
  options: Partial<OpenImageOptions> = {},
): T {
  const descriptor = openImage(runtime, at(name), { readOnly: true, ...options });
  try {
    return body(attachNode(runtime, descriptor));
  } finally {
    closeNode(runtime, descriptor);
  }
}

export function read(node: BlockNode, offset: number, length: number): Buffer {
  const parts: Uint8Array[] = [];
  for (let done = 0; done < length; done += BUFFER_BYTES) {
    const bytes = Math.min(BUFFER_BYTES, length - done);
    // Whatever a read leaves alone shows.
    arena.u8.fill(0xee, buffer, buffer + bytes);
    node.read(offset + done, buffer, bytes);
    parts.push(arena.copyOut(buffer, bytes));
  }
  return Buffer.concat(parts);
}

export function mapOf(name: string, options: Partial<OpenImageOptions> = {}): MapEntry[] {
  let entries: MapEntry[] = [];
  withImage(
    name,
    (node) => {
      entries = mapEntries(node, at(name));
    },
    options,
  );
  return entries;
}

/** As `qemu-img map --output=json` has them. */
export function shownMap(name: string, options: Partial<OpenImageOptions> = {}): unknown[] {
  return mapOf(name, options).map(({ compressed: _, filename: __, ...entry }) => entry);
}

/** Reads everything, and parts across every kind of border, and compares with the model. */
export function expectContent(
  name: string,
  model: Uint8Array,
  options: Partial<OpenImageOptions> = {},
): void {
  withImage(
    name,
    (node) => {
      expect(node.length).toBe(model.length);
      expect(firstDifference(read(node, 0, node.length), model)).toBe(-1);
      const random = new Random(model.length);
      for (let part = 0; part < 40 && model.length > 0; part++) {
        const offset = random.between(0, model.length - 1);
        const length = random.between(1, Math.min(model.length - offset, random.pick([10, 5000, 300_000])));
        const found = read(node, offset, length);
        expect(firstDifference(found, model.subarray(offset, offset + length))).toBe(-1);
      }
    },
    options,
  );
}

/** 3 MiB and a bit, with zeroes between. */
export function sample(seed: number, length = 3 * 1024 * 1024 + 1536): Uint8Array {
  const random = new Random(seed);
  const data = random.bytes(length);
  data.fill(0, 300_000, 900_000);
  return data;
}
