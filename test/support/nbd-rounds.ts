/** Rounds of several NBD clients that write over each other, many requests at once each, while backups are taken. */
import { rmSync } from 'node:fs';
import { join } from 'node:path';
import type { BackupJob, Disk, Engine, NbdServer } from '#src/index.js';
import { Random } from './data.js';
import { RawClient } from './nbd-client.js';

export const LENGTH = 512 * 1024;
const CLIENTS = 4;
const DEPTH = 32;
const READ = 0;
const WRITE = 1;
const TRIM = 4;
const ZEROES = 6;

/** Bytes that are surely whose stamp they hold. */
const CERTAIN = 16;

/** A request that changes the drive, with the moments between which it has happened. */
export interface Change {
  readonly offset: number;
  readonly end: number;
  /** What it writes, the byte of an offset at offset modulo 4; undefined: zeroes. */
  readonly stamp: Buffer | undefined;
  /** A hint: it may change nothing. */
  readonly mayStay: boolean;
  readonly sent: number;
  answered: number;
}

type Segment = [start: number, stop: number, covering: Change[]];

/** Everything that clients ask for, and what may be seen at a moment. */
export class History {
  readonly changes: Change[] = [];
  #clock = 0;

  now(): number {
    return ++this.#clock;
  }

  /**
   * Where bytes of an instant cannot be what the drive had then: -1 is nowhere.
   *
   * @param from moment when it had not been taken yet
   * @param to moment when it had been
   */
  flaw(bytes: Uint8Array, initial: Uint8Array, from: number, to: number): number {
    const segments = this.#segments(to);
    const flaw = flawIn(segments, bytes, initial, from);
    if (flaw >= 0) return flaw;
    // It is one moment for the whole drive: what was answered before something was sent that is seen is seen, too.
    return flawIn(segments, bytes, initial, Math.max(from, latestSeen(segments, bytes, initial)));
  }

  /** Ranges between the edges of all changes sent before a moment, with those that cover them. */
  #segments(to: number): Segment[] {
    const seen = this.changes.filter(({ sent }) => sent < to);
    const edges = new Set([0, LENGTH, ...seen.flatMap(({ offset, end }) => [offset, end])]);
    const sorted = [...edges].sort((one, other) => one - other);
    const places = new Map(sorted.map((edge, index) => [edge, index]));
    const segments = sorted.slice(1).map((stop, index): Segment => [sorted[index] ?? 0, stop, []]);
    for (const change of seen) {
      const last = places.get(change.end) ?? 0;
      for (let index = places.get(change.offset) ?? 0; index < last; index++)
        segments[index]?.[2].push(change);
    }
    return segments;
  }
}

/** When the last change was sent that alone can have made some bytes what they are; 0: there is none. */
function latestSeen(segments: readonly Segment[], bytes: Uint8Array, initial: Uint8Array): number {
  let latest = 0;
  for (const [start, stop, covering] of segments) {
    // A few bytes may be anybody's.
    if (stop - start < CERTAIN) continue;
    const seen = covering.filter((change) => change.sent > latest && shows(bytes, start, stop, change));
    const [only] = seen;
    const others = covering.some((change) => change !== only && shows(bytes, start, stop, change));
    const untouched = Buffer.compare(bytes.subarray(start, stop), initial.subarray(start, stop)) === 0;
    if (only !== undefined && !others && !untouched) latest = only.sent;
  }
  return latest;
}

/** The first byte that nothing explains: -1 where there is none. */
function flawIn(segments: readonly Segment[], bytes: Uint8Array, initial: Uint8Array, from: number): number {
  for (const [start, stop, covering] of segments) {
    // What surely came before another one that surely came before the instant cannot be seen any more.
    const last = Math.max(
      0,
      ...covering.filter(({ answered, mayStay }) => answered < from && !mayStay).map(({ sent }) => sent),
    );
    const visible = covering.filter(({ answered }) => answered >= last);
    const untouched =
      last === 0 && Buffer.compare(bytes.subarray(start, stop), initial.subarray(start, stop)) === 0;
    if (untouched || visible.some((change) => shows(bytes, start, stop, change))) continue;
    for (let at = start; at < stop; at++) {
      const byte = bytes[at];
      const explained =
        (last === 0 && byte === initial[at]) ||
        visible.some(({ stamp }) => (stamp === undefined ? 0 : stamp[at % 4]) === byte);
      if (!explained) return at;
    }
  }
  return -1;
}

function shows(bytes: Uint8Array, start: number, stop: number, { stamp }: Change): boolean {
  for (let at = start; at < stop; at++) {
    if (bytes[at] !== (stamp === undefined ? 0 : stamp[at % 4])) return false;
  }
  return true;
}

/** One client: it keeps {@link DEPTH} requests under way until it is told to stop. */
class Writer {
  readonly #client: RawClient;
  readonly #history: History;
  readonly #random: Random;
  readonly #pending = new Map<number, Change>();
  #next: number;
  #stopped = false;

  constructor(client: RawClient, history: History, random: Random, first: number) {
    this.#client = client;
    this.#history = history;
    this.#random = random;
    this.#next = first;
  }

  stop(): void {
    this.#stopped = true;
  }

  async run(): Promise<void> {
    for (let index = 0; index < DEPTH; index++) this.#send();
    while (this.#pending.size > 0) {
      const { cookie, error } = await this.#client.answer();
      const change = this.#pending.get(Number(cookie));
      if (change === undefined || error !== 0) throw new Error(`request ${cookie}: error ${error}`);
      change.answered = this.#history.now();
      this.#pending.delete(Number(cookie));
      if (!this.#stopped) this.#send();
    }
  }

  #send(): void {
    const random = this.#random;
    const length = random.pick([random.between(1, 3000), random.between(1, 80_000), 4096, 65536]);
    let offset = random.between(0, LENGTH - length);
    if (random.chance(0.3)) offset -= offset % 4096;
    const cookie = this.#next;
    this.#next += CLIENTS;
    const command = random.chance(0.75) ? WRITE : random.chance(0.7) ? ZEROES : TRIM;
    const stamp = command === WRITE ? Buffer.alloc(4) : undefined;
    stamp?.writeUInt32LE((Math.imul(cookie + 1, 0x9e3779b1) | 0x01010101) >>> 0);
    const change = {
      offset,
      end: offset + length,
      stamp,
      mayStay: command === TRIM,
      sent: this.#history.now(),
      answered: Number.POSITIVE_INFINITY,
    };
    this.#history.changes.push(change);
    this.#pending.set(cookie, change);
    const turned = stamp && Buffer.concat([stamp, stamp]).subarray(offset % 4, (offset % 4) + 4);
    const data = turned === undefined ? Buffer.alloc(0) : Buffer.alloc(length, turned);
    const flags = command === ZEROES && random.chance(0.5) ? 2 : 0;
    this.#client.request(command, cookie, offset, length, flags, data);
  }
}

/** Has clients write over each other. @returns has them stop, and take their leave */
export async function startWriters(
  socket: string,
  history: History,
  seed: number,
  exportName = '',
): Promise<() => Promise<void>> {
  const clients = await Promise.all(
    Array.from({ length: CLIENTS }, () => RawClient.to(socket, { options: [], exportName })),
  );
  const writers = clients.map(
    (client, index) => new Writer(client, history, new Random(seed + index), index),
  );
  const writing = Promise.all(writers.map((writer) => writer.run()));
  writing.catch(() => undefined);
  return async () => {
    for (const writer of writers) writer.stop();
    try {
      await writing;
    } finally {
      for (const client of clients) client.destroy();
    }
  };
}

/** All that an export holds. */
export async function readExport(socket: string, exportName: string): Promise<Uint8Array> {
  const reader = await RawClient.to(socket, { options: [], exportName });
  const parts: Buffer[] = [];
  for (let offset = 0; offset < LENGTH; offset += 65536) {
    reader.request(READ, offset, offset, 65536);
    parts.push((await reader.answer(65536)).data);
  }
  reader.destroy();
  return Buffer.concat(parts);
}

const KINDS = ['full', 'top', 'none', 'incremental', 'frozen'] as const;

export interface NbdReport {
  readonly kind: (typeof KINDS)[number];
  readonly requests: number;
}

/** A server for rounds, and the path of its socket. */
export interface RoundServer {
  readonly server: NbdServer;
  readonly socket: string;
}

/** @param folder for its socket */
export async function serveRounds(engine: Engine, folder: string): Promise<RoundServer> {
  const socket = join(folder, 'socket');
  return { socket, server: await engine.serveNbd({ listen: `unix:${socket}`, exports: [] }) };
}

/**
 * One round. What it throws names the seed.
 *
 * @param folder for images; it is left as it was
 */
export async function runNbdRound(
  engine: Engine,
  { server, socket }: RoundServer,
  folder: string,
  seed: number,
): Promise<NbdReport> {
  const random = new Random(seed);
  const at = (name: string): string => join(folder, `${name}-${seed}`);
  const kind = random.pick(KINDS);
  const format = random.pick(['raw', 'qcow2', 'qcow2'] as const);
  const [name, still] = [`drive-${seed}`, `still-${seed}`];
  const history = new History();
  await engine.createImage(at('disk'), { format, length: LENGTH });
  const disk = await engine.openDisk(at('disk'), { format });
  try {
    const initial = random.bytes(LENGTH);
    await disk.write(0, initial);
    await disk.editBitmap({ action: 'add', name: 'b' });
    await server.addExport({ disk, name });
    const stop = await startWriters(socket, history, seed, name);
    const pause = (): Promise<void> => new Promise((resolve) => setTimeout(resolve, random.between(0, 15)));
    await pause();
    const judge = (bytes: Uint8Array, from: number, to: number, what: string): void => {
      const flaw = history.flaw(bytes, initial, from, to);
      if (flaw >= 0) throw new Error(`seed ${seed}: ${what} (${kind}, ${format}) is wrong at byte ${flaw}`);
    };
    let from = history.now();
    if (kind === 'frozen') {
      const frozen = await disk.freeze();
      const to = history.now();
      await server.addExport({ disk: frozen, name: still });
      for (let pass = 0; pass < 2; pass++) {
        await pause();
        judge(await readExport(socket, still), from, to, 'the frozen export');
      }
      await frozen.close();
      await stop();
    } else {
      if (kind === 'incremental') {
        await copyWhole(disk, at('target'));
        await pause();
        from = history.now();
      }
      const job = await startJob(disk, kind, at('target'), random);
      const to = history.now();
      await pause();
      if (kind === 'none') {
        // Target and source together are the instant only as long as nobody writes past it.
        await stop();
        job.cancel();
      }
      await job.result();
      if (kind !== 'none') {
        await pause();
        await stop();
      }
      judge(await contentOf(engine, at('target'), job), from, to, 'the backup');
    }
    const end = history.now();
    judge(await disk.read(0, LENGTH), end, end, 'the drive itself');
    return { kind, requests: history.changes.length };
  } finally {
    await server.removeExport(name);
    await disk.close();
    for (const file of ['disk', 'target']) rmSync(at(file), { force: true });
  }
}

/** A whole backup; what is dirty since then makes it another instant. */
async function copyWhole(disk: Disk, target: string): Promise<void> {
  const job = await disk.backup({
    ...{ target, format: 'qcow2', sync: 'full', bitmap: 'b', bitmapMode: 'on-success' },
  });
  await job.result();
}

async function startJob(
  disk: Disk,
  kind: Exclude<(typeof KINDS)[number], 'frozen'>,
  target: string,
  random: Random,
): Promise<BackupJob> {
  const fleece = kind !== 'none' && random.chance(0.4);
  const speed = random.chance(0.5) ? 8 * LENGTH : 0;
  if (kind !== 'incremental') {
    return await disk.backup({ target, format: 'qcow2', sync: kind, fleece, speed });
  }
  return await disk.backup({ target, existing: true, sync: 'incremental', bitmap: 'b', fleece, speed });
}

async function contentOf(engine: Engine, path: string, job: BackupJob): Promise<Uint8Array> {
  const image = await engine.openDisk(path, { readOnly: true, forceShare: job.sync === 'none' });
  try {
    return await image.read(0, LENGTH);
  } finally {
    await image.close();
  }
}
