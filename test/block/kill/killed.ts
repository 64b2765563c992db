import { spawn } from 'node:child_process';
import { readFileSync, rmSync, writeFileSync } from 'node:fs';
import { basename, join } from 'node:path';
import { createImage } from '#src/block/create.js';
import { Random } from '../../support/data.js';
import { run } from '../../support/peers.js';
import { type Operation, Patterns, randomOperation } from '../../support/qcow2/operation.js';
import { Ours } from '../../support/qcow2/ours.js';
import { allShapes, imageOptions, type Shape } from '../../support/qcow2/shape.js';

/** Requests that are made at once, each in a part of the drive of its own; then a flush. */
type Round = readonly Operation[];

const PARTS = 12;
const ROUNDS = 60;
const shapes = allShapes().filter(({ depth, compression, clusterSize }) => {
  return depth === 0 && compression === 'none' && clusterSize <= 1 << 18;
});

/** The process to be killed: says after each round how many are flushed, and then once more all of it. */
const program = `
  import { readFileSync } from 'node:fs';
  import { createEngine } from ${JSON.stringify(new URL(import.meta.resolve('#src/index.js')).href)};
  const { rounds, patterns } = JSON.parse(readFileSync(process.argv[2], 'utf8'));
  const contents = patterns.map((path) => readFileSync(path));
  const engine = await createEngine({ workers: 2 });
  const disk = await engine.openDisk(process.argv[1], { format: 'qcow2' });
  const change = ({ kind, offset, length, pattern, unmap }) => {
    if (kind === 'zeroes') return disk.writeZeroes(offset, length, { unmap });
    if (kind === 'discard') return disk.discard(offset, length);
    const bytes = Buffer.alloc(length);
    return disk.write(offset, pattern < 0 ? bytes : bytes.fill(contents[pattern]));
  };
  for (let index = 0; ; index++) {
    await Promise.all(rounds[index % rounds.length].map(change));
    await disk.flush();
    process.stdout.write(index + 1 + '\\n');
  }`;

/** Kills processes that write to an image, again and again. */
export class Killed {
  readonly #folder: string;
  readonly #patterns: Patterns;
  readonly #ours = new Ours(64 << 20);

  constructor(folder: string) {
    this.#folder = folder;
    this.#patterns = new Patterns(folder);
  }

  /** Throws where a flushed byte is not there after a kill, or QEMU's check finds more than leaks. */
  async run(seed: number, kills: number): Promise<void> {
    const random = new Random(seed);
    const shape = shapes[random.between(0, shapes.length - 1)];
    if (shape === undefined) throw new Error('there is no shape to choose');
    const path = join(this.#folder, 'killed');
    const length = PARTS * Math.max(40 * shape.clusterSize, 200_000);
    const lazyRefcounts = shape.version === 3 && random.chance(0.3);
    createImage(this.#ours.runtime, path, {
      ...imageOptions(shape, `${path}.data`),
      length: Math.ceil(length / 512) * 512,
      lazyRefcounts,
    });
    try {
      let before: Buffer = Buffer.alloc(Math.ceil(length / 512) * 512);
      for (let kill = 0; kill < kills; kill++) before = await this.#kill(path, before, random, shape);
    } finally {
      for (const name of [path, `${path}.data`, `${path}.raw`, `${path}.json`]) rmSync(name, { force: true });
    }
  }

  /** @returns what the drive holds in the end */
  async #kill(path: string, before: Buffer, random: Random, shape: Shape): Promise<Buffer> {
    const part = before.length / PARTS;
    const rounds = Array.from({ length: ROUNDS }, (): Round => {
      return Array.from({ length: PARTS }, (_, index) => {
        const operation = randomOperation(random, shape, Math.floor(part));
        return operation.kind === 'flush'
          ? { kind: 'discard', offset: Math.floor(index * part), length: 0 }
          : { ...operation, offset: Math.floor(index * part) + operation.offset };
      });
    });
    const patterns = Array.from({ length: Patterns.COUNT }, (_, index) => this.#patterns.file(index));
    writeFileSync(`${path}.json`, JSON.stringify({ rounds, patterns }));
    const flushed = await killed(path, random.between(1, 30), random.between(0, 40));
    run('qemu-img', ['check', '-q', '-f', 'qcow2', basename(path)], [0, 3], this.#folder);
    run(
      'qemu-img',
      ['convert', '-f', 'qcow2', '-O', 'raw', basename(path), `${basename(path)}.raw`],
      [0],
      this.#folder,
    );
    const after = readFileSync(`${path}.raw`);
    const { content, open } = this.#expected(before, rounds, flushed);
    for (const [at, byte] of after.entries()) {
      if (open[at] === 1 || byte === content[at]) continue;
      throw new Error(`byte ${at} is ${byte} after ${flushed} rounds and a kill, not ${content[at]}`);
    }
    return after;
  }

  /** What the flushed rounds leave, and where the round after them, or a discard, leaves it open. */
  #expected(
    before: Buffer,
    rounds: readonly Round[],
    flushed: number,
  ): { content: Buffer; open: Uint8Array } {
    const content = Buffer.from(before);
    const open = new Uint8Array(before.length);
    for (let index = 0; index <= flushed; index++) {
      for (const operation of rounds[index % rounds.length] ?? []) {
        if (operation.kind === 'flush') continue;
        const { kind, offset, length } = operation;
        const known = index < flushed && kind !== 'discard';
        open.fill(known ? 0 : 1, offset, offset + length);
        if (!known) continue;
        if (kind === 'zeroes') content.fill(0, offset, offset + length);
        else content.set(this.#patterns.bytes(operation.pattern, length), offset);
      }
    }
    return { content, open };
  }
}

/** Kills a process some time after it has flushed as many rounds. Returns how many it has flushed. */
async function killed(path: string, rounds: number, milliseconds: number): Promise<number> {
  const child = spawn(process.execPath, ['--input-type=module', '-e', program, path, `${path}.json`], {
    stdio: ['ignore', 'pipe', 'inherit'],
  });
  let output = '';
  let dying = false;
  const closed = new Promise<NodeJS.Signals | null>((resolve) => {
    child.once('close', (_, signal) => resolve(signal));
  });
  child.stdout.on('data', (data) => {
    output += String(data);
    if (dying || output.split('\n').length <= rounds) return;
    dying = true;
    setTimeout(() => child.kill('SIGKILL'), milliseconds);
  });
  const signal = await closed;
  if (signal !== 'SIGKILL') throw new Error('the process ended by itself');
  return output.split('\n').length - 1;
}
