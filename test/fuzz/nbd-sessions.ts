/** NBD clients whose sessions are damaged at random, beside one with good manners who must not notice. */
import { readdirSync, readlinkSync, rmSync, statSync, writeFileSync } from 'node:fs';
import { connect, type Socket } from 'node:net';
import { join } from 'node:path';
import type { Duplex } from 'node:stream';
import { setTimeout as sleep } from 'node:timers/promises';
import type { Engine, NbdServer } from '#src/index.js';
import { Random } from '../support/data.js';
import { u16, u32, u64 } from '../support/fake-nbd.js';
import { counted, RawClient } from '../support/nbd-client.js';
import { beforeTls, byKey, speakTls, Tampering } from '../support/tls-client.js';

const LENGTH = 8 << 20;
const KEY = '0123456789abcdef'.repeat(2);
/** Who has said everything and is not let go for this long waits for something that never comes. */
const STUCK_MS = 20_000;
const HANDSHAKE_MS = 400;
/** What the clients at one time may make the server take, and what may be left of it, in bytes of the arena. */
const MOST_BYTES = 256 << 20;
const LEFT_BYTES = 64 << 20;
/** What the process may grow by after the first tenth of the sessions, however many there are. */
const GROWTH_BYTES = 512 << 20;

const option = (number: number, ...data: readonly Uint8Array[]): Buffer => {
  const bytes = Buffer.concat(data);
  return Buffer.concat([Buffer.from('IHAVEOPT'), u32(number), u32(bytes.length), bytes]);
};

function request(
  extended: boolean,
  command: number,
  flags: number,
  offset: number,
  length: number,
  data: Buffer,
) {
  const place = [u16(command), u64(command), u64(offset)];
  return extended
    ? Buffer.concat([u32(0x21e41c71), u16(flags | (data.length > 0 ? 32 : 0)), ...place, u64(length), data])
    : Buffer.concat([u32(0x25609513), u16(flags), ...place, u32(length), data]);
}

/**
 * A whole session of one who does everything, message by message.
 *
 * @param written what it writes at `1 << 20`
 * @param spoils whether it zeroes and trims, too
 */
export function wholeSession(extended: boolean, written: Buffer, spoils = false, startTls = false): Buffer[] {
  const ask = (
    command: number,
    flags: number,
    offset: number,
    length: number,
    data: Buffer = Buffer.alloc(0),
  ) => request(extended, command, flags, offset, length, data);
  return [
    u32(3),
    ...(startTls ? [option(5)] : []),
    option(3),
    option(99, Buffer.alloc(9)),
    option(extended ? 11 : 8),
    option(9, counted(''), u32(0)),
    option(10, counted(''), u32(2), counted('base:allocation'), counted('qemu:allocation-depth')),
    option(6, counted(''), u16(2), u16(1), u16(3)),
    option(7, counted(''), u16(1), u16(3)),
    ask(0, 0, 0, 70_000),
    ask(0, 4, 512, 4096),
    ask(7, 0, 0, 1 << 20),
    ask(1, 1, 1 << 20, written.length, written),
    ask(5, 0, 0, 4096),
    ...(spoils ? [ask(6, 2, 2 << 20, 70_000), ask(4, 1, 3 << 20, 70_000)] : []),
    ask(3, 0, 0, 0),
    ...(extended ? [ask(7, 0, 0, 12, Buffer.concat([u64(4096), u32(1)]))] : []),
    ask(99, 0, 0, 0),
    ask(2, 0, 0, 0),
  ];
}

/** What one of them does. */
export interface DamagedSession {
  readonly extended: boolean;
  /** `asked`: TLS is asked for, and not spoken; `inside`: what is said in it is damaged; `outside`: its records are. */
  readonly tls: 'none' | 'asked' | 'inside' | 'outside';
  readonly damage: readonly string[];
  readonly bytes: Buffer;
  /** How it leaves: it says that it is done and waits, it goes at once, or it takes no answers for a while. */
  readonly leaves: 'done' | 'at once' | 'deaf';
  readonly records?: readonly RecordDamage[];
}

/** What happens to the records of TLS on their way. */
export interface RecordDamage {
  /** Bytes of them before it. */
  readonly at: number;
  readonly kind: 'bit' | 'byte' | 'insert' | 'remove' | 'end';
  readonly value: number;
}

export function damagedSession(seed: number): DamagedSession {
  const random = new Random(seed);
  const extended = random.chance(0.5);
  const asked = random.chance(0.1);
  const messages: Buffer[] = wholeSession(extended, Buffer.from(random.bytes(4096)), true, asked);
  const whole = Buffer.concat(messages);
  const damage: string[] = [];
  for (let left = random.chance(0.4) ? random.between(1, 4) : 0; left > 0; left--) {
    const [one, other] = [random.between(0, messages.length - 1), random.between(0, messages.length - 1)];
    const [message = Buffer.alloc(0), swapped = Buffer.alloc(0)] = [messages[one], messages[other]];
    const kind = random.pick(['drop', 'repeat', 'swap'] as const);
    damage.push(`${kind} message ${one}${kind === 'swap' ? ` and ${other}` : ''}`);
    if (kind === 'drop') messages.splice(one, 1);
    else if (kind === 'repeat') messages.splice(other, 0, Buffer.from(message));
    else messages.splice(one, 1, swapped).splice(other, 1, message);
  }
  let bytes: Buffer = Buffer.concat(messages);
  for (let left = random.between(damage.length > 0 ? 0 : 1, 6); left > 0 && bytes.length > 8; left--) {
    const at = random.between(0, bytes.length - 8);
    const kind = random.pick(['byte', 'byte', 'bit', 'word', 'word', 'insert', 'remove'] as const);
    damage.push(`${kind} at ${at}`);
    if (kind === 'byte') bytes[at] = random.pick([0, 1, 0xff, random.between(0, 255)]);
    else if (kind === 'bit') bytes[at] = (bytes[at] ?? 0) ^ (1 << random.between(0, 7));
    else if (kind === 'word') {
      const words = [0, 1, 0x7fffffff, 0x80000000, 0xffffffff, 32 << 20, 1 << 24, LENGTH, 4097] as const;
      bytes.writeUInt32BE(random.pick(words), at);
    } else {
      const size = random.pick([1, 4, 28, 200]);
      const inserted = kind === 'insert' ? Buffer.from(random.bytes(size)) : Buffer.alloc(0);
      const rest = bytes.subarray(at + (kind === 'insert' ? 0 : size));
      bytes = Buffer.concat([bytes.subarray(0, at), inserted, rest]);
    }
  }
  if (random.chance(0.3)) {
    bytes = bytes.subarray(0, random.between(0, bytes.length));
    damage.push(`nothing behind ${bytes.length}`);
  }
  const leaves = random.pick(['done', 'done', 'done', 'done', 'done', 'done', 'at once', 'deaf'] as const);
  if (asked || !random.chance(0.2)) return { extended, tls: asked ? 'asked' : 'none', damage, bytes, leaves };
  // With the greeting, which comes before TLS, there is nothing to begin with.
  if (random.chance(0.5)) return { extended, tls: 'inside', damage, bytes: bytes.subarray(4), leaves };
  const records = Array.from({ length: random.between(1, 4) }, (): RecordDamage => {
    const kind = random.pick(['bit', 'byte', 'insert', 'remove', 'end'] as const);
    return { at: random.between(0, random.pick([600, 7000])), kind, value: random.between(0, 255) };
  });
  const said = records.map(({ at, kind }) => `${kind} at ${at} of the records`);
  return { extended, tls: 'outside', damage: said, bytes: whole.subarray(4), leaves, records };
}

/** Hands on what a client sends, with its damage. */
function damageRecords(records: readonly RecordDamage[]): (bytes: Buffer, socket: Socket) => Promise<void> {
  let passed = 0;
  return async (bytes, socket) => {
    let out = Buffer.from(bytes);
    let ends = false;
    for (const { at, kind, value } of records) {
      const place = at - passed;
      if (place < 0 || place >= out.length) continue;
      if (kind === 'bit') out[place] = (out[place] ?? 0) ^ (1 << (value % 8));
      else if (kind === 'byte') out[place] = value;
      else {
        const inserted = Buffer.alloc(kind === 'insert' ? value : 0, value);
        const rest = out.subarray(place + (kind === 'remove' ? 1 + (value % 40) : 0));
        out = Buffer.concat([out.subarray(0, place), inserted, kind === 'end' ? Buffer.alloc(0) : rest]);
        ends ||= kind === 'end';
      }
    }
    passed += bytes.length;
    if (out.length > 0 && socket.writable) socket.write(out);
    if (ends) socket.end();
  };
}

/** Connects, up to where the bytes of a session come; undefined where it is put out before. */
async function begin(path: string, { tls, records = [] }: DamagedSession): Promise<Duplex | undefined> {
  if (tls === 'none' || tls === 'asked') return connect({ path, allowHalfOpen: true });
  try {
    const plain = await beforeTls(path);
    const wire = records.length === 0 ? plain : new Tampering(plain, damageRecords(records));
    return await speakTls(wire, byKey('alice', KEY));
  } catch {
    return undefined;
  }
}

/** Says it in one piece; within TLS in several, so that there are several records. */
function say(socket: Duplex, { bytes, tls }: DamagedSession, done: () => void): void {
  if (tls === 'inside' || tls === 'outside') {
    for (let at = 0; at < bytes.length; at += 700) socket.write(bytes.subarray(at, at + 700));
    socket.write(Buffer.alloc(0), () => done());
  } else socket.write(bytes, () => done());
}

/** Plays one. Rejects when the server does not let go of somebody who is done. @returns bytes of the answers */
async function play(path: string, session: DamagedSession): Promise<number> {
  const { leaves } = session;
  const socket = await begin(path, session);
  if (socket === undefined) return 0;
  let taken = 0;
  let closed = false;
  const ended = new Promise<void>((resolve) => {
    for (const event of ['end', 'error', 'close'])
      socket.once(event, () => {
        closed = true;
        resolve();
      });
  });
  if (leaves !== 'deaf') socket.on('data', (data) => (taken += data.length));
  const sent = new Promise<void>((resolve) => say(socket, session, resolve));
  if (leaves === 'done') {
    socket.end();
    const timer = new AbortController();
    await Promise.race([ended, sleep(STUCK_MS, undefined, { signal: timer.signal }).catch(() => undefined)]);
    timer.abort();
  } else {
    await Promise.race([sent, ended]);
    if (leaves === 'deaf') await Promise.race([ended, sleep(20)]);
    closed = true;
  }
  socket.destroy();
  if (!closed) throw new Error(`the server has not let go of it after ${STUCK_MS} ms`);
  return taken;
}

/** Somebody who writes to a drive of its own and reads that back, until it is told to stop. */
class Witness {
  exchanges = 0;
  slowestMs = 0;
  #stopped = false;
  readonly #random = new Random(1);
  readonly #held = Buffer.alloc(LENGTH);

  stop(): void {
    this.#stopped = true;
  }

  async run(client: RawClient): Promise<void> {
    while (!this.#stopped) {
      const length = this.#random.between(1, 20_000);
      const offset = this.#random.between(0, LENGTH - length);
      this.#held.set(this.#random.bytes(length), offset);
      const started = performance.now();
      client.request(1, 1, offset, length, 0, this.#held.subarray(offset, offset + length));
      const { error } = await client.answer();
      // Around it as well: nobody else has been there.
      const [from, to] = [Math.max(0, offset - 4096), Math.min(LENGTH, offset + length + 4096)];
      client.request(0, 2, from, to - from);
      const answer = await client.answer(to - from);
      if (error !== 0 || answer.error !== 0 || !answer.data.equals(this.#held.subarray(from, to)))
        throw new Error('the witness was answered wrongly');
      this.slowestMs = Math.max(this.slowestMs, performance.now() - started);
      this.exchanges++;
      await sleep(1);
    }
  }
}

/** What this process has open: sockets, event loops (one of each thread), and the rest. */
function descriptors(): { sockets: number; threads: number; others: number } {
  const open = { sockets: 0, threads: 0, others: 0 };
  for (const name of readdirSync('/proc/self/fd')) {
    let link = '';
    try {
      link = readlinkSync(`/proc/self/fd/${name}`);
    } catch {
      // The one that lists them.
    }
    if (link.startsWith('socket:')) open.sockets++;
    else if (link.includes('eventpoll')) open.threads++;
    else open.others++;
  }
  return open;
}

export interface SessionsReport {
  readonly sessions: number;
  /** Of those, the ones that came as far as reading. */
  readonly served: number;
  readonly answerBytes: number;
  readonly exchanges: number;
  readonly slowestMs: number;
  readonly mostArenaBytes: number;
  readonly mostThreads: number;
  readonly rssGrowthBytes: number;
}

/**
 * Plays damaged sessions, several at once, to a server with TLS and one without. What it throws names the seed, or
 * the last seeds that began before it went wrong.
 *
 * @param folder for sockets and drives; it is left as it was
 */
export async function playDamagedSessions(
  engine: Engine,
  folder: string,
  { first = 1, count = 1, lanes = 8, onProgress = (_done: number): void => undefined },
): Promise<SessionsReport> {
  const at = (name: string): string => join(folder, `sessions-${name}`);
  const names = ['drive', 'witness', 'keys', 'plain', 'tls'] as const;
  for (const name of ['drive', 'witness'] as const) writeFileSync(at(name), Buffer.alloc(LENGTH));
  writeFileSync(at('keys'), `alice:${KEY}\n`);
  const drive = await engine.openDisk(at('drive'), { format: 'raw' });
  const own = await engine.openDisk(at('witness'), { format: 'raw' });
  const servers: NbdServer[] = [];
  let good: RawClient | undefined;
  try {
    const options = { handshakeTimeoutMs: HANDSHAKE_MS };
    const exports = [{ disk: drive }, { disk: own, name: 'witness' }];
    servers.push(await engine.serveNbd({ listen: `unix:${at('plain')}`, exports, ...options }));
    const tls = { pskFile: at('keys') };
    servers.push(
      await engine.serveNbd({ listen: `unix:${at('tls')}`, exports: [{ disk: drive }], tls, ...options }),
    );
    good = await RawClient.to(at('plain'), { options: [], exportName: 'witness' });
    const witness = new Witness();
    const watching = witness.run(good);
    let disturbed: unknown;
    watching.catch((error: unknown) => {
      disturbed = error;
    });
    const before = engine.arena.usedBytes;
    const openBefore = descriptors();
    let [done, next, answerBytes, served, mostArenaBytes, mostThreads, settled] = [0, first, 0, 0, 0, 0, 0];
    const lane = async (): Promise<void> => {
      while (next < first + count && disturbed === undefined) {
        const seed = next++;
        const session = damagedSession(seed);
        try {
          const taken = await play(at(session.tls === 'none' ? 'plain' : 'tls'), session);
          answerBytes += taken;
          // No handshake is answered by as much.
          if (taken > 60_000) served++;
        } catch (error) {
          disturbed = error;
          throw new Error(`seed ${seed}: ${error instanceof Error ? error.message : String(error)}`);
        }
        mostArenaBytes = Math.max(mostArenaBytes, engine.arena.usedBytes - before);
        mostThreads = Math.max(mostThreads, ...servers.map(({ threads }) => threads));
        if (mostArenaBytes > MOST_BYTES) throw new Error(`seed ${seed}: ${mostArenaBytes} bytes are taken`);
        if (++done === Math.ceil(count / 10)) settled = process.memoryUsage().rss;
        if (done % 1000 === 0) onProgress(done);
      }
    };
    await Promise.all(Array.from({ length: lanes }, lane));
    witness.stop();
    await watching.catch((error: unknown) => {
      throw new Error(`seeds ${Math.max(first, next - lanes)} to ${next - 1}: ${String(error)}`);
    });
    good.destroy();
    const patience = performance.now() + STUCK_MS;
    while (servers.some(({ connections }) => connections > 0)) {
      if (performance.now() > patience) throw new Error('connections are left of clients that went away');
      await sleep(5);
    }
    if (engine.arena.usedBytes - before > LEFT_BYTES)
      throw new Error(`${engine.arena.usedBytes - before} bytes are left of clients that went away`);
    await drive.read(0, LENGTH);
    for (const name of ['drive', 'witness'] as const) {
      const { size } = statSync(at(name));
      if (size !== LENGTH) throw new Error(`the file of the ${name} has ${size} bytes, not ${LENGTH}`);
    }
    const rssGrowthBytes = process.memoryUsage().rss - settled;
    if (rssGrowthBytes > GROWTH_BYTES) throw new Error(`the process has grown by ${rssGrowthBytes} bytes`);
    const { exchanges, slowestMs } = witness;
    const open = descriptors();
    if (open.sockets > openBefore.sockets) throw new Error(`${open.sockets} sockets are open at the end`);
    // Threads that have come meanwhile stay, with what is theirs.
    if (open.others - openBefore.others > 8 * Math.max(0, open.threads - openBefore.threads))
      throw new Error(`${open.others} descriptors are open at the end, of ${open.threads} threads`);
    return {
      sessions: done,
      served,
      answerBytes,
      exchanges,
      slowestMs,
      mostArenaBytes,
      mostThreads,
      rssGrowthBytes,
    };
  } finally {
    good?.destroy();
    for (const server of servers) await server.close();
    await drive.close();
    await own.close();
    for (const name of names) rmSync(at(name), { force: true });
  }
}
