/**
 * Rounds in which a daemon changes its graph again and again while four NBD clients write over each other: overlays,
 * streams, commits, mirrors, images opened anew, backups and internal snapshots, in an order left to chance.
 */
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { mkdirSync, rmSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import type { Engine } from '#src/index.js';
import { CLI } from './cli.js';
import { firstDifference, Random } from './data.js';
import { History, LENGTH, readExport, startWriters } from './nbd-rounds.js';
import { hasPeer, run } from './peers.js';
import { type Message, QmpClient } from './qmp.js';

type Format = 'raw' | 'qcow2';

/** A node, of which the file has the same name, and what lies below it. */
interface Layer {
  readonly name: string;
  readonly format: Format;
}

export interface GraphReport {
  /** What was done, in order. Refused is what a job that was under way was in the way of. */
  readonly done: readonly string[];
  readonly requests: number;
}

const OPERATIONS = [
  'overlay',
  'stream',
  'commit',
  'commit-active',
  'mirror',
  'reopen',
  'backup',
  'internal-snapshot',
] as const;

/** How long a step may take, in milliseconds; what takes longer hangs. */
const STEP_MS = 60_000;

/** @throws Error that says what takes too long */
async function within<T>(what: () => string, body: Promise<T>): Promise<T> {
  let timer: NodeJS.Timeout | undefined;
  const late = new Promise<never>((_, reject) => {
    timer = setTimeout(() => reject(new Error(`it hangs: ${what()}`)), STEP_MS);
  });
  try {
    return await Promise.race([body, late]);
  } finally {
    clearTimeout(timer);
  }
}

/** Who is in the way says so, and nothing has changed. */
class Refused extends Error {}

class GraphRound {
  readonly done: string[] = [];
  readonly history = new History();
  /** From the top down. */
  #chain: Layer[];
  #count = 0;
  readonly #client: QmpClient;
  readonly #engine: Engine;
  readonly #folder: string;
  readonly #random: Random;
  readonly #initial: Uint8Array;

  constructor(
    client: QmpClient,
    engine: Engine,
    folder: string,
    random: Random,
    initial: Uint8Array,
    base: Layer,
  ) {
    this.#client = client;
    this.#engine = engine;
    this.#folder = folder;
    this.#random = random;
    this.#initial = initial;
    this.#chain = [base];
  }

  get top(): Layer {
    const [top] = this.#chain;
    if (top === undefined) throw new Error('no drive');
    return top;
  }

  at(name: string): string {
    return join(this.#folder, name);
  }

  judge(bytes: Uint8Array, from: number, to: number, what: string): void {
    const flaw = this.history.flaw(bytes, this.#initial, from, to);
    if (flaw >= 0) throw new Error(`${what} is wrong at byte ${flaw} after ${this.done.join(', ')}`);
  }

  /** Some operations, now and then with a backup under way meanwhile. */
  async play(): Promise<void> {
    for (let left = this.#random.between(3, 7); left > 0; left--) {
      await this.#pause();
      const end = this.#random.chance(0.25) ? await this.#startBackup(2 * LENGTH) : undefined;
      const operation = this.#random.pick(OPERATIONS);
      try {
        await within(() => this.#during(operation), this.#carryOut(operation));
        this.done.push(end === undefined ? operation : `${operation} during a backup`);
      } catch (error) {
        if (!(error instanceof Refused) || end === undefined) throw error;
        this.done.push(`${operation} (refused)`);
      }
      await within(() => this.#during('the end of a backup'), end?.() ?? Promise.resolve());
    }
  }

  #during(what: string): string {
    const names = this.#chain.map(({ name, format }) => `${name} (${format})`);
    return `${what}, with ${names.join(' on ')} after ${this.done.join(', ')}`;
  }

  #carryOut(operation: (typeof OPERATIONS)[number]): Promise<void> {
    switch (operation) {
      case 'overlay':
        return this.#overlay();
      case 'stream':
        return this.#stream();
      case 'commit':
        return this.#commit();
      case 'commit-active':
        return this.#commitActive();
      case 'mirror':
        return this.#mirror();
      case 'reopen':
        return this.#reopen();
      case 'backup':
        return this.#startBackup(0).then((end) => end());
      case 'internal-snapshot':
        return this.#internalSnapshot();
    }
  }

  #pause(): Promise<void> {
    return new Promise((resolve) => setTimeout(resolve, this.#random.between(0, 15)));
  }

  async #execute(command: string, given: Message): Promise<void> {
    const answer = await this.#client.send(JSON.stringify({ execute: command, arguments: given }));
    if ('error' in answer)
      throw new Refused(`${command}: ${JSON.stringify(answer['error'])} after ${this.done.join(', ')}`);
  }

  /** Starts a job. @returns waits for its end */
  async #job(
    command: string,
    given: Message,
  ): Promise<{ readonly id: string; readonly end: () => Promise<void> }> {
    const id = `j${this.#count++}`;
    await this.#execute(command, { 'job-id': id, ...given });
    const end = async (): Promise<void> => {
      await this.#client.event('JOB_STATUS_CHANGE', { id, status: 'null' });
      // That came before.
      const error = this.#client.messages.find(
        ({ event, data }) =>
          event === 'BLOCK_JOB_COMPLETED' &&
          (data as Message)['device'] === id &&
          'error' in (data as Message),
      );
      if (error !== undefined)
        throw new Error(`${command}: ${JSON.stringify(error)} after ${this.done.join(', ')}`);
    };
    return { id, end };
  }

  /** Runs a job. @returns false where it was cancelled at its end */
  async #finishes(command: string, given: Message): Promise<boolean> {
    const cancels = this.#random.chance(0.25);
    const { id, end } = await this.#job(command, { ...given, 'auto-finalize': !cancels });
    if (cancels) {
      await this.#client.event('BLOCK_JOB_PENDING', { id });
      await this.#pause();
      await this.#execute('job-cancel', { id });
      this.done.push('cancel');
    }
    await end();
    return this.#client.messages.some(
      ({ event, data }) => event === 'BLOCK_JOB_COMPLETED' && (data as Message)['device'] === id,
    );
  }

  /** A new image. */
  async #make(format: Format, backing?: Layer): Promise<Layer> {
    const name = `n${this.#count++}`;
    await this.#engine.createImage(this.at(name), {
      format,
      length: LENGTH,
      ...(format === 'raw' ? {} : { clusterSize: this.#random.pick([4096, 65536, 131072]) }),
      // The drive has it open.
      ...(backing === undefined
        ? {}
        : { backingFile: backing.name, backingFormat: backing.format, unsafeBacking: true }),
    });
    return { name, format };
  }

  #options({ name, format }: Layer, backing: string | null): Message {
    return {
      ...{ driver: format, 'node-name': name, discard: 'unmap', file: { driver: 'file', filename: name } },
      ...(format === 'raw' ? {} : { backing }),
    };
  }

  async #overlay(): Promise<void> {
    const { top } = this;
    if (this.#random.chance(0.5)) {
      const name = `n${this.#count++}`;
      await this.#execute('blockdev-snapshot-sync', {
        ...{ 'node-name': top.name, 'snapshot-file': name, 'snapshot-node-name': name },
      });
      this.#chain.unshift({ name, format: 'qcow2' });
    } else {
      const layer = await this.#make('qcow2', top);
      await this.#execute('blockdev-add', this.#options(layer, null));
      await this.#execute('blockdev-snapshot', { node: top.name, overlay: layer.name });
      this.#chain.unshift(layer);
    }
  }

  /** Two layers, one above the other. @param highest the upper one may be, counted from the top */
  async #pair(highest: number): Promise<readonly [number, number]> {
    await this.#atLeast(highest + 2);
    const upper = this.#random.between(highest, this.#chain.length - 2);
    return [upper, this.#random.between(upper + 1, this.#chain.length - 1)];
  }

  async #atLeast(layers: number): Promise<void> {
    while (this.#chain.length < layers) await this.#overlay();
  }

  #name(index: number): string {
    return this.#chain[index]?.name ?? '';
  }

  /** Layers are no part of the drive any more. @param by what is there now */
  async #drop(from: number, count: number, ...by: readonly Layer[]): Promise<void> {
    for (const { name } of this.#chain.splice(from, count, ...by)) {
      try {
        await this.#execute('blockdev-del', { 'node-name': name });
      } catch (error) {
        // It went with the last who used it, unless it was added by its name.
        if (!(error instanceof Refused)) throw error;
      }
    }
  }

  async #stream(): Promise<void> {
    const [device, last] = await this.#pair(0);
    const isWhole = last === this.#chain.length - 1;
    const base = isWhole ? {} : { 'base-node': this.#name(last + 1) };
    const job = { device: this.#name(device), ...base };
    if (await this.#finishes('block-stream', job)) await this.#drop(device + 1, last - device);
  }

  async #commit(): Promise<void> {
    const [top, base] = await this.#pair(1);
    const finishes = await this.#finishes('block-commit', {
      ...{ device: this.top.name, 'top-node': this.#name(top), 'base-node': this.#name(base) },
    });
    if (finishes) await this.#drop(top, base - top);
  }

  async #commitActive(): Promise<void> {
    await this.#atLeast(2);
    const base = this.#random.between(1, this.#chain.length - 1);
    const { id, end } = await this.#job('block-commit', {
      ...{ device: this.top.name, 'base-node': this.#name(base) },
    });
    await this.#client.event('BLOCK_JOB_READY', { device: id });
    await this.#pause();
    const pivots = this.#random.chance(0.7);
    await this.#execute(pivots ? 'job-complete' : 'block-job-cancel', pivots ? { id } : { device: id });
    await end();
    if (pivots) await this.#drop(0, base);
  }

  async #mirror(): Promise<void> {
    const isTop = this.#chain.length > 1 && this.#random.chance(0.4);
    const below = isTop ? this.#chain[1] : undefined;
    const target = await this.#make(isTop ? 'qcow2' : this.#random.pick(['raw', 'qcow2'] as const), below);
    await this.#execute('blockdev-add', this.#options(target, below?.name ?? null));
    const { id, end } = await this.#job('blockdev-mirror', {
      ...{ device: this.top.name, target: target.name, sync: isTop ? 'top' : 'full' },
      'copy-mode': this.#random.pick(['background', 'write-blocking'] as const),
      granularity: this.#random.pick([512, 4096, 65536] as const),
    });
    await this.#client.event('BLOCK_JOB_READY', { device: id });
    await this.#pause();
    if (this.#random.chance(0.6)) {
      await this.#execute('job-complete', { id });
      await end();
      await this.#drop(0, isTop ? 1 : this.#chain.length, target);
    } else {
      const from = this.history.now();
      await this.#execute('block-job-cancel', { device: id });
      await end();
      const to = this.history.now();
      await this.#execute('blockdev-del', { 'node-name': target.name });
      this.judge(await this.#contentOf(target), from, to, 'a mirror');
    }
  }

  #reopen(): Promise<void> {
    const [top, below] = this.#chain;
    if (top === undefined) throw new Error('no drive');
    return this.#execute('blockdev-reopen', { options: [this.#options(top, below?.name ?? null)] });
  }

  /** @param speed in bytes a second @returns waits for its end, and looks at it */
  async #startBackup(speed: number): Promise<() => Promise<void>> {
    const target = await this.#make('qcow2');
    await this.#execute('blockdev-add', this.#options(target, null));
    const from = this.history.now();
    const { end } = await this.#job('blockdev-backup', {
      ...{ device: this.top.name, target: target.name, sync: 'full', speed },
    });
    const to = this.history.now();
    return async () => {
      await end();
      await this.#execute('blockdev-del', { 'node-name': target.name });
      this.judge(await this.#contentOf(target), from, to, 'a backup');
    };
  }

  async #internalSnapshot(): Promise<void> {
    if (this.top.format !== 'qcow2') await this.#overlay();
    const { top } = this;
    const name = `s${this.#count++}`;
    const from = this.history.now();
    await this.#execute('blockdev-snapshot-internal-sync', { device: top.name, name });
    const to = this.history.now();
    await this.#pause();
    this.judge(await this.#contentOf(top, name), from, to, 'an internal snapshot');
    if (this.#random.chance(0.5))
      await this.#execute('blockdev-snapshot-delete-internal-sync', { device: top.name, name });
  }

  /** What lies below may be open for writing in the daemon. */
  async #contentOf({ name, format }: Layer, snapshot?: string): Promise<Uint8Array> {
    const disk = await this.#engine.openDisk(this.at(name), {
      ...{ format, readOnly: true, forceShare: true },
      ...(snapshot === undefined ? {} : { snapshot: { name: snapshot } }),
    });
    try {
      return await disk.read(0, LENGTH);
    } finally {
      await disk.close();
    }
  }

  /** What is left in the files is what clients have read last, and sound. */
  async checkFiles(last: Uint8Array): Promise<void> {
    const after = this.done.join(', ');
    const flaw = firstDifference(await this.#contentOf(this.top), last);
    if (flaw >= 0) throw new Error(`the file of the drive is wrong at byte ${flaw} after ${after}`);
    if (!hasPeer('qemu-img')) return;
    for (const { name, format } of this.#chain) {
      if (format === 'qcow2') run('qemu-img', ['check', '-q', this.at(name)]);
    }
    writeFileSync(this.at('last'), last);
    run('qemu-img', [
      'compare',
      '-q',
      '-f',
      'raw',
      '-F',
      this.top.format,
      this.at('last'),
      this.at(this.top.name),
    ]);
  }
}

/**
 * One round. What it throws names the seed.
 *
 * @param folder for a folder of its own; it is left as it was, but for a failure
 */
export async function runGraphRound(engine: Engine, folder: string, seed: number): Promise<GraphReport> {
  const random = new Random(seed);
  const work = join(folder, `graph-${seed}`);
  mkdirSync(work);
  const initial = random.bytes(LENGTH);
  const base: Layer = { name: 'base', format: random.pick(['raw', 'qcow2']) };
  await engine.createImage(join(work, base.name), { format: base.format, length: LENGTH });
  const disk = await engine.openDisk(join(work, base.name), { format: base.format });
  await disk.write(0, initial);
  await disk.close();
  const daemon = spawn(
    process.execPath,
    [CLI, 'daemon', '--chardev', 'socket,id=c,path=qmp,server=on,wait=off', '--monitor', 'c'],
    // Whoever interrupts a soak does not interrupt the round.
    { cwd: work, stdio: ['ignore', 'ignore', 'inherit'], detached: true },
  );
  const ended = once(daemon, 'exit');
  try {
    const client = await QmpClient.connect(join(work, 'qmp'), () => daemon.exitCode ?? undefined);
    const round = new GraphRound(client, engine, work, random, initial, base);
    await client.execute('qmp_capabilities');
    await client.execute('blockdev-add', {
      ...{ driver: base.format, 'node-name': 'base', discard: 'unmap' },
      file: { driver: 'file', filename: 'base' },
    });
    await client.execute('nbd-server-start', { addr: { type: 'unix', data: { path: 'nbd' } } });
    await client.execute('block-export-add', {
      ...{ type: 'nbd', id: 'e', 'node-name': 'base', name: 'drive', writable: true },
    });
    const stop = await startWriters(join(work, 'nbd'), round.history, seed, 'drive');
    await round.play();
    await within(() => `the last requests after ${round.done.join(', ')}`, stop());
    const end = round.history.now();
    const last = await readExport(join(work, 'nbd'), 'drive');
    round.judge(last, end, end, 'the drive');
    client.close();
    daemon.kill('SIGTERM');
    const [status] = await within(() => `the end of the daemon after ${round.done.join(', ')}`, ended);
    if (status !== 0) throw new Error(`the daemon ended with ${status} after ${round.done.join(', ')}`);
    await round.checkFiles(last);
    rmSync(work, { recursive: true });
    return { done: round.done, requests: round.history.changes.length };
  } catch (error) {
    throw new Error(`seed ${seed}: ${error instanceof Error ? error.message : String(error)}`, {
      cause: error,
    });
  } finally {
    daemon.kill('SIGKILL');
    await ended;
  }
}
