/**
 * One session of commands, played to QEMU's daemon and to ours in folders of the same content. What the two are to have
 * in common: answers, what commands of the shell print, and the events of each job in their order.
 */
import { type ChildProcess, spawn } from 'node:child_process';
import { mkdirSync, mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { expect } from 'vitest';
import { CLI } from './cli.js';
import { hasPeer } from './peers.js';
import { type Message, QmpClient } from './qmp.js';

export const KiB = 1024;
export const MiB = 1024 * KiB;

/**
 * A command of QMP with its arguments; a job that is to have one of these statuses before anything else happens; an event
 * that is to have come since the step before; or a line for the shell in the session's folder.
 */
export type Step =
  | Command
  | { readonly job: string; readonly is: readonly string[] }
  | { readonly event: string; readonly data: Message }
  | { readonly copied: string; readonly bytes: number }
  | { readonly sh: string };

export type Command = readonly [command: string, given?: Message];

/** `null`: there is no such job, or no more. */
export const until = (job: string, ...is: readonly string[]): Step => ({ job, is });
/** The job has come so far, in bytes. */
export const copied = (job: string, bytes: number): Step => ({ copied: job, bytes });
export const event = (name: string, data: Message = {}): Step => ({ event: name, data });
export const sh = (line: string): Step => ({ sh: line });

/** A node with an image of its own name. */
export const qcow2 = (name: string, more: Message = {}): Command => [
  'blockdev-add',
  { driver: 'qcow2', 'node-name': name, file: { driver: 'file', filename: `${name}.qcow2` }, ...more },
];
export const raw = (name: string, more: Message = {}): Command => [
  'blockdev-add',
  { driver: 'raw', 'node-name': name, file: { driver: 'file', filename: `${name}.raw` }, ...more },
];
/** A node that fails requests as the rules say. */
export const blkdebug = (name: string, image: string, ...rules: readonly Message[]): Command => [
  'blockdev-add',
  {
    ...{ driver: 'blkdebug', 'node-name': name, image },
    'inject-error': rules.map((rule) => ({ event: 'none', ...rule })),
  },
];
export const del = (name: string): Command => ['blockdev-del', { 'node-name': name }];
/** A full backup of `d` to `t` by the job `j`, but for what is said. */
export const backup = (given: Message = {}): Command => [
  'blockdev-backup',
  { device: 'd', target: 't', sync: 'full', 'job-id': 'j', ...given },
];
export const bitmap = (action: string, name: string, more: Message = {}): Command => [
  `block-dirty-bitmap-${action}`,
  { node: 'd', name, ...more },
];
export const sha256 = (name: string, node = 'd'): Command => [
  'x-debug-block-dirty-bitmap-sha256',
  { node, name },
];
export const nodes: Step = ['query-named-block-nodes', { flat: true }];
export const jobs: readonly Step[] = [['query-jobs'], ['query-block-jobs']];
export const transaction = (actions: readonly unknown[], mode?: 'grouped'): Command => [
  'transaction',
  { actions, ...(mode === undefined ? {} : { properties: { 'completion-mode': mode } }) },
];
/** The same as an action of a transaction. */
export const action = (step: Command): Message => ({
  type: step[0],
  data: step[1] ?? {},
});
/** Starts an NBD server, and exports nodes by their names for writing. */
export const serve = (...names: readonly string[]): readonly Step[] => [
  ['nbd-server-start', { addr: { type: 'unix', data: { path: 'n.sock' } } }],
  ...names.map((name): Step => ['block-export-add', { ...exported(name), writable: true }]),
];
export const exported = (node: string, more: Message = {}): Message => ({
  ...{ type: 'nbd', id: `e-${node}`, 'node-name': node },
  ...more,
});
/** A client of that server. */
export const guest = (name: string, ...commands: readonly string[]): Step => {
  const words = commands.map((command) => `-c '${command}'`).join(' ');
  return sh(`qemu-io -f raw ${words} 'nbd+unix:///${name}?socket=n.sock'`);
};

const NEEDED = ['qemu-storage-daemon', 'qemu-system-x86_64', 'qemu-img', 'qemu-io', 'qemu-nbd'];

/** Whether QEMU is here to play the other side. */
export function hasQemu(): boolean {
  return NEEDED.map((tool) => hasPeer(tool)).every((present) => present);
}

/** Plays a session to both, and compares. */
export async function same(session: Session): Promise<void> {
  const folder = mkdtempSync(join(tmpdir(), 'stillframe-session-'));
  try {
    const peer = session.peer ?? 'qemu-storage-daemon';
    const [theirs, ours] = await Promise.all([
      play(peer, join(folder, 'qemu'), session),
      play('stillframe', join(folder, 'ours'), session),
    ]);
    // One by one: what is different first is what matters.
    for (const [index, answer] of theirs.answers.entries()) expect(ours.answers[index]).toEqual(answer);
    expect(ours.events).toEqual(theirs.events);
  } finally {
    rmSync(folder, { recursive: true, force: true });
  }
}

/** What QEMU's side is: its storage daemon, or (for devices and the human monitor) the emulator without a machine. */
export type Peer = 'qemu-storage-daemon' | 'qemu-system-x86_64';

export interface Session {
  /** Lines for the shell before the daemon starts, in the session's folder. */
  readonly prepare: string;
  readonly steps: readonly Step[];
  readonly peer?: Peer | undefined;
  /** Options of the daemon, as both have them. */
  readonly options?: readonly string[] | undefined;
  /** Options of ours alone. */
  readonly own?: readonly string[] | undefined;
  /** Lines for the shell after the daemon has ended; what they print is compared. */
  readonly after?: string | undefined;
  /**
   * QEMU has jobs pause for a moment whenever the graph changes, and tells of it: events of being paused by nobody do not
   * count.
   */
  readonly drains?: true | undefined;
  /** How it ends; default: by `quit`. */
  readonly end?: 'SIGTERM' | 'SIGKILL' | undefined;
}

export interface Played {
  /** Answers and what the shell said, in their order. */
  readonly answers: readonly unknown[];
  /** Events of each job, and others. */
  readonly events: Readonly<Record<string, readonly unknown[]>>;
}

/** How long a step may take, in milliseconds: nothing of a session takes a tenth of it. */
const STEP_MS = 20_000;

/** A step took too long. */
class Hung extends Error {}

/** Plays a session in a new folder. @param who `stillframe` or the peer */
export async function play(who: 'stillframe' | Peer, place: string, session: Session): Promise<Played> {
  try {
    return await playOnce(who, place, session);
  } catch (error) {
    // Not the peer is on trial: it may hang once.
    if (who === 'stillframe' || !(error instanceof Hung)) throw error;
    console.warn(`played to it again: ${error.message}`);
    return await playOnce(who, place, session);
  }
}

async function playOnce(who: 'stillframe' | Peer, place: string, session: Session): Promise<Played> {
  rmSync(place, { recursive: true, force: true });
  mkdirSync(place);
  const answers: unknown[] = [];
  const prepared = await shell(place, session.prepare);
  if (prepared.status !== 0) throw new Error(`cannot prepare the session: ${prepared.said}`);
  const own = who === 'stillframe' ? (session.own ?? []) : [];
  const daemon = start(who, place, [...(session.options ?? []), ...own]);
  let said = '';
  daemon.stderr?.on('data', (data) => {
    said += String(data);
  });
  const ended = new Promise<unknown>((resolve) => {
    daemon.once('exit', (code, signal) => resolve(signal ?? code));
  });
  const client = await QmpClient.connect(join(place, 'q.sock'), () => {
    const how = daemon.exitCode ?? daemon.signalCode;
    return how === null ? undefined : `${who} ended with ${how}: ${said}`;
  });
  const events: Message[] = [];
  try {
    const negotiated = await within('qmp_capabilities', () => client.execute('qmp_capabilities'));
    answers.push({ negotiated });
    // The emulator may take commands before it has told that it runs.
    await within('start', () => running(client));
    const begun = client.messages.length;
    let since = begun;
    const last: readonly Step[] = session.end === undefined ? [['quit']] : [];
    for (const step of [...session.steps, ...last]) {
      if ('sh' in step) {
        answers.push({ sh: step.sh, ...(await shell(place, step.sh)) });
      } else if ('job' in step) {
        await within(step, () => settled(client, step.job, step.is));
      } else if ('copied' in step) {
        await within(step, () => reached(client, step.copied, step.bytes));
      } else if ('event' in step) {
        const from = since;
        since = client.messages.length;
        await within(step, () => happened(client.messages.slice(from), step));
      } else {
        since = client.messages.length;
        const [execute, given = {}] = step;
        const answer = client.send(JSON.stringify({ execute, arguments: given }));
        answers.push({ execute, given, answer: normalise(await within(step, () => answer)) });
      }
    }
    if (session.end !== undefined) daemon.kill(session.end);
    answers.push({ ended: await within('end', () => ended) });
    events.push(...client.messages.slice(begun).filter((message) => 'event' in message));
  } catch (error) {
    const Failure = error instanceof Hung ? Hung : Error;
    throw new Failure(
      `${who}: ${String(error)}\n${said}${JSON.stringify(client.messages.slice(-6), null, 1)}`,
    );
  } finally {
    client.close();
    daemon.kill('SIGKILL');
  }
  if (session.after !== undefined) {
    answers.push({ sh: session.after, ...(await shell(place, session.after)) });
  }
  return { answers, events: byJob(events, session.drains === true) };
}

function start(who: 'stillframe' | Peer, cwd: string, options: readonly string[]): ChildProcess {
  const monitor = ['--chardev', 'socket,id=c,path=q.sock,server=on,wait=off', '--monitor', 'c'];
  const machine = ['-machine', 'none', '-nodefaults', '-nographic', '-monitor', 'none'];
  const [command, words] =
    who === 'stillframe'
      ? [process.execPath, [CLI, 'daemon', ...options, ...monitor]]
      : who === 'qemu-storage-daemon'
        ? [who, [...options, ...monitor]]
        : [who, [...machine, ...options, '-qmp', 'unix:q.sock,server=on,wait=off']];
  return spawn(command, words, { cwd, stdio: ['ignore', 'ignore', 'pipe'] });
}

async function shell(
  cwd: string,
  line: string,
): Promise<{ readonly status: number | null; readonly said: string }> {
  const child = spawn('sh', ['-c', line], { cwd, stdio: ['ignore', 'pipe', 'pipe'], detached: true });
  const said = { stdout: '', stderr: '' };
  for (const name of ['stdout', 'stderr'] as const) {
    child[name].setEncoding('utf8').on('data', (text: string) => {
      said[name] += text;
    });
  }
  const ended = new Promise<{ readonly status: number | null }>((resolve, reject) => {
    child.once('error', reject);
    child.once('close', (status) => resolve({ status }));
  });
  try {
    const { status } = await within(line, () => ended);
    return { status, said: withoutSpeed(said.stdout + said.stderr) };
  } catch (error) {
    // With all that the shell has started.
    if (child.pid !== undefined) process.kill(-child.pid, 'SIGKILL');
    throw error;
  }
}

/** What qemu-io says of how fast it was, and the folder, are no matter. */
function withoutSpeed(text: string): string {
  return text.replaceAll(/\d+ ops; [^\n]*/g, 'ops').replaceAll(/disk size: .*\n/g, '');
}

async function within<T>(what: unknown, body: () => T | undefined | Promise<T>): Promise<T> {
  const end = performance.now() + STEP_MS;
  for (;;) {
    const left = end - performance.now();
    if (left <= 0) throw new Hung(`too long: ${JSON.stringify(what)}`);
    const got = await Promise.race([body(), pause(left).then(() => undefined)]);
    if (got !== undefined && got !== false) return got;
    await pause(5);
  }
}

function pause(timeoutMs: number): Promise<void> {
  return new Promise((resolve) => {
    setTimeout(resolve, timeoutMs).unref();
  });
}

async function running(client: QmpClient): Promise<boolean> {
  const status = (await client.execute('query-status').catch(() => undefined)) as Message | undefined;
  // A storage daemon has no machine to ask for.
  return status === undefined || status['running'] === true;
}

/** Whether a job has one of these statuses, and monitors were told of it. */
async function settled(client: QmpClient, job: string, statuses: readonly string[]): Promise<boolean> {
  const jobs = (await client.execute('query-jobs')) as readonly Message[];
  const status = String(jobs.find(({ id }) => id === job)?.['status'] ?? null);
  if (!statuses.includes(status)) return false;
  const told = client.messages.findLast(
    ({ event: name, data }) => name === 'JOB_STATUS_CHANGE' && (data as Message)['id'] === job,
  );
  return told === undefined || (told['data'] as Message)['status'] === status;
}

async function reached(client: QmpClient, job: string, bytes: number): Promise<boolean> {
  const jobs = (await client.execute('query-jobs')) as readonly Message[];
  return Number(jobs.find(({ id }) => id === job)?.['current-progress'] ?? 0) >= bytes;
}

function happened(
  messages: readonly Message[],
  wanted: { readonly event: string; readonly data: Message },
): boolean {
  return messages.some(({ event: name, data = {} }) => {
    const same = Object.entries(wanted.data).every(([key, value]) => (data as Message)[key] === value);
    return name === wanted.event && same;
  });
}

/**
 * Names that nobody chose, what a file system makes of a file, and flags that we set later, are no matter; nor is how a
 * node with rules is called by its options.
 */
function normalise(answer: unknown): unknown {
  const text = JSON.stringify(answer, (key, value) => {
    if (key === 'actual-size') return undefined;
    if (TIMES.has(key)) return 0;
    if (key === 'image' && value?.format === 'file') return { ...value, 'virtual-size': 0 };
    if (key === 'flags' && Array.isArray(value)) return value.filter((flag) => flag !== 'in-use');
    if (value?.drv === 'blkdebug') {
      return { ...value, file: 'rules', image: { ...value.image, filename: 'rules' } };
    }
    return value;
  });
  return JSON.parse(text.replaceAll(/#block\d+/g, '#block'));
}

/** When a snapshot was made. */
const TIMES: ReadonlySet<string> = new Set(['date-sec', 'date-nsec', 'vm-clock-sec', 'vm-clock-nsec']);

/** Whether a job goes on now that had stood still. */
function isResumed(told: unknown, status: unknown): boolean {
  const still = { running: 'paused', ready: 'standby' }[String(status)];
  return still !== undefined && JSON.stringify(told ?? null).includes(`"status":"${still}"`);
}

function byJob(events: readonly Message[], drains: boolean): Record<string, unknown[]> {
  const found: Record<string, unknown[]> = {};
  for (const { event: name, data } of events) {
    // The emulator tells of its own end.
    if (name === 'SHUTDOWN') continue;
    const { id, device } = (data ?? {}) as Message;
    const key = String(id ?? device ?? '');
    const before = found[key] ?? [];
    const { status } = (data ?? {}) as Message;
    if (drains && isResumed(before.at(-1), status)) {
      before.splice(-1);
      continue;
    }
    found[key] = [...before, normalise({ event: name, data })];
  }
  return found;
}
