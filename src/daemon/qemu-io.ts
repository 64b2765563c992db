import { readFileSync } from 'node:fs';
import { isBlkdebugEvent } from '../block/filters/blkdebug-events.js';
import { type Extent, STATUS_ALLOCATED } from '../block/node.js';
import type { Preallocation } from '../block/qcow2/index.js';
import type { Engine } from '../engine/engine.js';
import type { GuestRequest } from '../engine/tasks.js';
import { toStillframeError } from '../errors.js';
import { ALL_PERMISSIONS, RESIZE, WRITE } from '../os/image-lock.js';
import { BLOCKDEV } from '../qmp/blockdev-schema.js';
import { jobErrorText, QmpError } from '../qmp/errors.js';
import { parseKeyval } from '../qmp/keyval.js';
import { coerce, isObject, type JsonObject, type Members } from '../qmp/types.js';
import type { Breakpoints } from './breakpoints.js';
import { LockError, type Release } from './file-locks.js';
import { getopt } from './getopt.js';
import type { Graph } from './graph.js';
import type { GraphNode } from './graph-node.js';
import { dump, humanSize, parsePattern, parseSize, report } from './qemu-io-format.js';

/** Most bytes of one request. */
const MAX_BYTES = 2 ** 31 - 512;
/** Bytes of a request that are in memory at once. */
const PIECE_BYTES = 16 * 1024 * 1024;
const PATTERN_BYTES = 65536;
/** Options of nodes of every driver. */
const ALL_OPTIONS: Members = Object.assign({}, ...Object.values(BLOCKDEV.variants));
const DEFAULT_PATTERN = 0xcd;
const SECTOR = 512;
const PREALLOCATION: readonly Preallocation[] = ['off', 'metadata', 'falloc', 'full'];
/** What `-c` says of how the host caches. */
const CACHES: Readonly<Record<string, JsonObject>> = {
  none: { direct: true },
  off: { direct: true },
  directsync: { direct: true },
  writeback: {},
  writethrough: {},
  unsafe: { 'no-flush': true },
};

const NO_BREAKPOINTS = 'Operation not supported';
const NO_SUCH = 'No such file or directory';

/** The words of a command that was given, and what it is carried out on. */
interface Call {
  readonly node: GraphNode;
  readonly name: string;
  readonly words: readonly string[];
}

interface Command {
  readonly short?: string;
  readonly arguments?: string;
  readonly summary: string;
  /** Least and most words; undefined: no most. */
  readonly count: readonly [least: number, most: number | undefined];
  /** Permissions on the drive, which it changes. */
  readonly needs?: number;
  readonly run: (call: Call) => Promise<void>;
}

/** A command is wrong: what goes to stdout, and what to stderr. */
class Wrong extends Error {
  readonly toErrors: string;

  constructor(text: string, toErrors = '') {
    super(text);
    this.toErrors = toErrors;
  }
}

/** What the monitor is to answer. */
class Answer extends Error {}

/** Where output goes. */
export interface QemuIoOutput {
  readonly out: (text: string) => void;
  readonly errors: (text: string) => void;
}

/** What carries out what is not a request. */
export interface QemuIoActions {
  readonly resize: (node: GraphNode, size: number, preallocation: Preallocation) => Promise<void>;
  /** @param options as QMP `blockdev-reopen` has them */
  readonly reopen: (options: JsonObject) => Promise<void>;
}

interface Transfer {
  readonly node: GraphNode;
  readonly offset: number;
  readonly length: number;
}

/** The commands of `qemu-io`, by which people poke a node. What they say goes to the program's stdout and stderr, as in QEMU. */
export class QemuIo {
  readonly #engine: Engine;
  readonly #graph: Graph;
  readonly #output: QemuIoOutput;
  readonly #actions: QemuIoActions;
  readonly #commands: Readonly<Record<string, Command>>;
  /** Requests of `aio_` commands that are under way. */
  readonly #background = new Set<Promise<void>>();

  constructor(engine: Engine, graph: Graph, output: QemuIoOutput, actions: QemuIoActions) {
    this.#engine = engine;
    this.#graph = graph;
    this.#output = output;
    this.#actions = actions;
    this.#commands = this.#table();
  }

  /** Carries a command out. @returns what the monitor answers */
  async run(node: GraphNode, line: string): Promise<string> {
    const [name, ...words] = line.split(' ').filter((word) => word !== '');
    if (name === undefined) return '';
    const found = Object.entries(this.#commands).find(
      ([known, { short }]) => known === name || short === name,
    );
    if (found === undefined) {
      this.#output.errors(`command "${name}" not found\n`);
      return '';
    }
    const [known, command] = found;
    const wrongCount = countText(known, command.count, words.length);
    if (wrongCount !== undefined) {
      this.#output.errors(`${wrongCount}\n`);
      return '';
    }
    if (command.needs !== undefined && node.descriptor.readOnly) return 'Block node is read-only';
    let release: Release = () => undefined;
    try {
      const needed = command.needs ?? 0;
      if (needed !== 0) {
        release = this.#graph.locks.claim([{ node, role: 'root', needed, shared: ALL_PERMISSIONS }]);
      }
      await command.run({ node, name: known, words });
    } catch (error) {
      if (error instanceof LockError) return `${error.message}\n${error.hint}`;
      if (error instanceof Answer) return error.message;
      if (!(error instanceof Wrong)) throw error;
      if (error.toErrors !== '') this.#output.errors(`${error.toErrors}\n`);
      if (error.message !== '') this.#output.out(`${error.message}\n`);
    } finally {
      // Some of its requests may still be under way.
      if (this.#background.size === 0) release();
      else void Promise.allSettled(this.#background).then(release);
    }
    return '';
  }

  #table(): Record<string, Command> {
    const vector = [2, undefined] as const;
    return {
      aio_flush: {
        summary: 'completes all outstanding aio requests',
        count: [0, 0],
        run: async () => {
          await Promise.all(this.#background);
        },
      },
      aio_read: {
        arguments: '[-Ciqv] [-P pattern] off len [len..]',
        summary: 'asynchronously reads a number of bytes',
        count: vector,
        run: async (call) => this.#aioRead(call),
      },
      aio_write: {
        arguments: '[-Cfiquz] [-P pattern] off len [len..]',
        summary: 'asynchronously writes a number of bytes',
        count: vector,
        needs: WRITE,
        run: async (call) => this.#aioWrite(call),
      },
      alloc: {
        short: 'a',
        arguments: 'offset [count]',
        summary: 'checks if offset is allocated in the file',
        count: [1, 2],
        run: (call) => this.#alloc(call),
      },
      break: {
        arguments: 'event tag',
        summary: 'sets a breakpoint on event and tags the stopped request as tag',
        count: [2, 2],
        run: async (call) => this.#break(call),
      },
      discard: {
        short: 'd',
        arguments: '[-Cq] off len',
        summary: 'discards a number of bytes at a specified offset',
        count: vector,
        needs: WRITE,
        run: (call) => this.#discard(call),
      },
      flush: {
        short: 'f',
        summary: 'flush all in-core file state to disk',
        count: [0, 0],
        run: async ({ node }) => {
          // QEMU says nothing of a flush that fails.
          await this.#request(node, { op: 'flush' }).catch(() => undefined);
        },
      },
      help: {
        short: '?',
        arguments: '[command]',
        summary: 'help for one or all commands',
        count: [0, 1],
        run: async ({ words: [name] }) => this.#help(name),
      },
      info: {
        short: 'i',
        summary: 'prints information about the current file',
        count: [0, 0],
        run: ({ node }) => this.#info(node),
      },
      length: {
        short: 'l',
        summary: 'gets the length of the current file',
        count: [0, 0],
        run: async ({ node }) => {
          const disk = await this.#graph.disk(node);
          this.#output.out(`${humanSize(disk.length)}\n`);
        },
      },
      map: {
        arguments: '',
        summary: 'prints the allocated areas of a file',
        count: [0, 0],
        run: ({ node }) => this.#map(node),
      },
      read: {
        short: 'r',
        arguments: '[-abCqv] [-P pattern [-s off] [-l len]] off len',
        summary: 'reads a number of bytes at a specified offset',
        count: vector,
        run: (call) => this.#read(call),
      },
      readv: {
        arguments: '[-Cqv] [-P pattern] off len [len..]',
        summary: 'reads a number of bytes at a specified offset',
        count: vector,
        run: (call) => this.#readv(call),
      },
      remove_break: {
        arguments: 'tag',
        summary: 'remove a breakpoint by tag',
        count: [1, 1],
        run: async ({ node, words: [tag = ''] }) => {
          const points = breakpointsOf(node);
          if (points?.remove(tag) === true) return;
          const why = points === undefined ? NO_BREAKPOINTS : NO_SUCH;
          throw new Wrong(`Could not remove breakpoint ${tag}: ${why}`);
        },
      },
      reopen: {
        arguments: '[(-r|-w)] [-c cache] [-o options]',
        summary: 'reopens an image with new options',
        count: [0, undefined],
        run: (call) => this.#reopen(call),
      },
      resume: {
        arguments: 'tag',
        summary: 'resumes the request tagged as tag',
        count: [1, 1],
        run: async ({ node, words: [tag = ''] }) => {
          const points = breakpointsOf(node);
          if (points?.resume(tag) === true) return;
          throw new Wrong(`Could not resume request: ${points === undefined ? NO_BREAKPOINTS : NO_SUCH}`);
        },
      },
      sleep: {
        summary: 'waits for the given value in milliseconds',
        count: [1, 1],
        run: async ({ words: [text = ''] }) => {
          if (!/^\d+$/.test(text)) throw new Wrong(`${text} is not a valid number`);
          // No timer is longer.
          await new Promise((resolve) => setTimeout(resolve, Math.min(Number(text), 2 ** 31 - 1)).unref());
        },
      },
      truncate: {
        short: 't',
        arguments: '[-m prealloc_mode] off',
        summary: 'truncates the current file at the given offset',
        count: [1, 3],
        needs: WRITE | RESIZE,
        run: (call) => this.#truncate(call),
      },
      wait_break: {
        arguments: 'tag',
        summary: 'waits for the suspension of a request',
        count: [1, 1],
        run: async ({ node, words: [tag = ''] }) => {
          // Nobody will ever be suspended there.
          await breakpointsOf(node)?.suspended(tag);
        },
      },
      write: {
        short: 'w',
        arguments: '[-bcCfnquz] [-P pattern | -s source_file] off len',
        summary: 'writes a number of bytes at a specified offset',
        count: vector,
        needs: WRITE,
        run: (call) => this.#write(call),
      },
      writev: {
        arguments: '[-Cfq] [-P pattern] off len [len..]',
        summary: 'writes a number of bytes at a specified offset',
        count: vector,
        needs: WRITE,
        run: (call) => this.#writev(call),
      },
    };
  }

  /** @throws Wrong with how the command is used */
  #usage(name: string, toErrors = ''): never {
    throw new Wrong(this.#line(name), toErrors);
  }

  #line(name: string): string {
    const { arguments: given, summary } = this.#commands[name] ?? { summary: '' };
    return `${name}${given === undefined ? '' : ` ${given}`} -- ${summary}`;
  }

  #help(name: string | undefined): void {
    if (name === undefined) {
      const lines = Object.keys(this.#commands).map((one) => `${this.#line(one)}\n`);
      this.#output.out(`${lines.join('')}\nUse 'help commandname' for extended help.\n`);
    } else if (this.#commands[name] === undefined) this.#output.out(`command ${name} not found\n`);
    else this.#output.out(`${this.#line(name)}\n`);
  }

  /** The words of a command: `has` for a flag, `value` for the last value of an option. */
  #words({ name, words }: Call, letters: string) {
    const found = getopt(name, letters, words);
    if (typeof found === 'string') this.#usage(name, found);
    const { options, rest } = found;
    return {
      options,
      rest,
      has: (letter: string): boolean => options.some(([one]) => one === letter),
      value: (letter: string): string | undefined => options.findLast(([one]) => one === letter)?.[1],
    };
  }

  // ---- Requests -----------------------------------------------------------------------------------------------

  async #read(call: Call): Promise<void> {
    const { options, rest, has } = this.#words(call, 'bCl:pP:qs:v');
    let pattern: number | undefined;
    let [from, verified]: [number | undefined, number | undefined] = [undefined, undefined];
    for (const [letter, value] of options) {
      if (letter === 'P') pattern = patternOf(value);
      else if (letter === 's') from = sizeOf(value);
      else if (letter === 'l') verified = sizeOf(value);
    }
    const [first, second] = rest;
    if (first === undefined || second === undefined || rest.length !== 2) this.#usage(call.name);
    const offset = sizeOf(first);
    const length = lengthOf(second);
    if (pattern === undefined && (from !== undefined || verified !== undefined)) this.#usage(call.name);
    const start = from ?? 0;
    const bytes = verified ?? length - start;
    if (bytes < 0 || start + bytes > length) {
      throw new Wrong('pattern verification range exceeds end of read data');
    }
    if (has('b')) {
      checkSectors(offset, length);
      throw new Wrong('read failed: Operation not supported');
    }
    const verify = pattern === undefined ? undefined : { pattern, start, length: bytes };
    await this.#carryOutRead({ node: call.node, offset, length }, 'read', has, verify);
  }

  async #readv(call: Call): Promise<void> {
    const { has, value, rest } = this.#words(call, 'CP:qv');
    const pattern = value('P');
    const byte = pattern === undefined ? undefined : patternOf(pattern);
    const transfer = this.#vector(call, rest);
    const verify = byte === undefined ? undefined : { pattern: byte, start: 0, length: transfer.length };
    await this.#carryOutRead(transfer, 'readv', has, verify);
  }

  #aioRead(call: Call): void {
    const { has, value, rest } = this.#words(call, 'CP:iqv');
    const pattern = value('P');
    const byte = pattern === undefined ? undefined : patternOf(pattern);
    if (has('i')) {
      this.#output.out('injecting invalid read request\n');
      return;
    }
    const transfer = this.#vector(call, rest);
    const verify = byte === undefined ? undefined : { pattern: byte, start: 0, length: transfer.length };
    this.#inBackground(this.#carryOutRead(transfer, 'readv', has, verify));
  }

  async #carryOutRead(
    transfer: Transfer,
    failing: string,
    has: (letter: string) => boolean,
    verify: { readonly pattern: number; readonly start: number; readonly length: number } | undefined,
  ): Promise<void> {
    const { node, offset, length } = transfer;
    const begun = performance.now();
    const shown: string[] = [];
    let matches = true;
    await this.#failing(failing, () =>
      this.#pieces(length, async (at, pointer, bytes) => {
        await this.#request(node, { op: 'read', offset: offset + at, pointer, length: bytes });
        const data = this.#engine.arena.u8.subarray(pointer, pointer + bytes);
        if (verify !== undefined) {
          const [from, to] = [verify.start, verify.start + verify.length].map((end) =>
            Math.max(0, Math.min(bytes, end - at)),
          );
          matches &&= holds(data.subarray(from, to), verify.pattern);
        }
        if (has('v') && !has('q')) shown.push(dump(data, offset + at));
      }),
    );
    const took = performance.now() - begun;
    if (verify !== undefined && !matches) {
      const at = offset + verify.start;
      this.#output.out(`Pattern verification failed at offset ${at}, ${verify.length} bytes\n`);
    }
    if (has('q')) return;
    for (const text of shown) this.#output.out(text);
    this.#output.out(report('read', offset, length, took, has('C')));
  }

  async #write(call: Call): Promise<void> {
    const { options, rest, has, value } = this.#words(call, 'bcCfnpP:qs:uz');
    let pattern = DEFAULT_PATTERN;
    for (const [letter, text] of options) if (letter === 'P') pattern = patternOf(text);
    const [first, second] = rest;
    if (first === undefined || second === undefined || rest.length !== 2) this.#usage(call.name);
    if (has('b') && has('z')) throw new Wrong('-b and -z cannot be specified at the same time');
    if (has('f') && (has('b') || has('c'))) {
      throw new Wrong('-f and -b or -c cannot be specified at the same time');
    }
    if (has('n') && !has('z')) throw new Wrong('-n requires -z to be specified');
    if (has('u') && !has('z')) throw new Wrong('-u requires -z to be specified');
    if (['z', 'P', 's'].filter(has).length > 1) {
      throw new Wrong('Only one of -z, -P, and -s can be specified at the same time');
    }
    const offset = sizeOf(first);
    const length = sizeOf(second);
    if (length > MAX_BYTES && !has('n')) {
      throw new Wrong(`length cannot exceed ${MAX_BYTES} without -n, given ${second}`);
    }
    if (has('b') || has('c')) checkSectors(offset, length);
    const source = value('s');
    const content = source === undefined ? Uint8Array.of(pattern) : patternFile(source);
    if (has('b')) throw new Wrong('write failed: Operation not supported');
    const transfer = { node: call.node, offset, length };
    await this.#carryOutWrite(transfer, 'write', has, content);
  }

  async #writev(call: Call): Promise<void> {
    const { has, value, rest } = this.#words(call, 'CfqP:');
    const pattern = value('P');
    const byte = pattern === undefined ? DEFAULT_PATTERN : patternOf(pattern);
    await this.#carryOutWrite(this.#vector(call, rest), 'writev', has, Uint8Array.of(byte));
  }

  #aioWrite(call: Call): void {
    const { has, value, rest } = this.#words(call, 'CfiP:quz');
    const pattern = value('P');
    const byte = pattern === undefined ? DEFAULT_PATTERN : patternOf(pattern);
    if (has('i')) {
      this.#output.out('injecting invalid write request\n');
      return;
    }
    if (rest.length < 2) this.#usage(call.name);
    if (has('z') && rest.length !== 2) throw new Wrong('-z supports only a single length parameter');
    if (has('u') && !has('z')) throw new Wrong('-u requires -z to be specified');
    const transfer = this.#vector(call, rest);
    this.#inBackground(this.#carryOutWrite(transfer, 'aio_write', has, Uint8Array.of(byte)));
  }

  /** @param content what is written, again and again */
  async #carryOutWrite(
    transfer: Transfer,
    failing: string,
    has: (letter: string) => boolean,
    content: Uint8Array,
  ): Promise<void> {
    const { node, offset, length } = transfer;
    const begun = performance.now();
    await this.#failing(failing, async () => {
      if (has('z')) {
        const request = { op: 'zeroes', offset, length, unmap: has('u'), fast: has('n') } as const;
        await this.#request(node, request);
      } else {
        await this.#pieces(length, async (at, pointer, bytes) => {
          fill(this.#engine.arena.u8.subarray(pointer, pointer + bytes), content, at);
          const op = has('c') ? 'write-compressed' : 'write';
          await this.#request(node, { op, offset: offset + at, pointer, length: bytes });
        });
      }
      if (has('f')) await this.#request(node, { op: 'flush' });
    });
    if (has('q')) return;
    this.#output.out(report('wrote', offset, length, performance.now() - begun, has('C')));
  }

  async #discard(call: Call): Promise<void> {
    const { has, rest } = this.#words(call, 'Cq');
    const [first, second] = rest;
    if (first === undefined || second === undefined || rest.length !== 2) this.#usage(call.name);
    const offset = sizeOf(first);
    const length = lengthOf(second);
    const begun = performance.now();
    await this.#failing('discard', () => this.#request(call.node, { op: 'discard', offset, length }));
    if (has('q')) return;
    this.#output.out(report('discard', offset, length, performance.now() - begun, has('C')));
  }

  /** An offset, and lengths that follow each other. */
  #vector(call: Call, rest: readonly string[]): Transfer {
    const [first, ...lengths] = rest;
    if (first === undefined || lengths.length === 0) this.#usage(call.name);
    const offset = sizeOf(first);
    let length = 0;
    for (const text of lengths) {
      const one = sizeOf(text);
      if (one > MAX_BYTES) throw new Wrong(`Argument '${text}' exceeds maximum size ${MAX_BYTES}`);
      length += one;
      if (length > MAX_BYTES)
        throw new Wrong(`The total number of bytes exceed the maximum size ${MAX_BYTES}`);
    }
    return { node: call.node, offset, length };
  }

  /** Runs `body` over parts of a request, one after the other, each with memory. */
  async #pieces(
    length: number,
    body: (at: number, pointer: number, bytes: number) => Promise<void>,
  ): Promise<void> {
    const { arena } = this.#engine;
    const buffer = arena.alloc(Math.max(1, Math.min(length, PIECE_BYTES)), 'a request of qemu-io');
    try {
      for (let at = 0; at < Math.max(length, 1); at += PIECE_BYTES) {
        await body(at, buffer, Math.min(PIECE_BYTES, length - at));
      }
    } finally {
      arena.free(buffer);
    }
  }

  async #request(node: GraphNode, request: GuestRequest): Promise<void> {
    const disk = await this.#graph.disk(node);
    await disk.request(request);
  }

  /** @throws Wrong with why it failed */
  async #failing(what: string, body: () => Promise<void>): Promise<void> {
    try {
      await body();
    } catch (error) {
      throw new Wrong(`${what} failed: ${errorText(error)}`);
    }
  }

  #inBackground(request: Promise<void>): void {
    const ended = request
      .catch((error: unknown) => this.#output.out(`${error instanceof Error ? error.message : error}\n`))
      .finally(() => this.#background.delete(ended));
    this.#background.add(ended);
  }

  // ---- The drive itself ---------------------------------------------------------------------------------------

  #status(node: GraphNode, offset: number, length: number): Promise<Extent> {
    return this.#graph.disk(node).then((disk) => disk.status(offset, length));
  }

  /** The range from `offset` on that is allocated in the node, or is not. */
  async #allocated(
    node: GraphNode,
    offset: number,
    end: number,
  ): Promise<{ readonly length: number; readonly allocated: boolean }> {
    let length = 0;
    let allocated: boolean | undefined;
    while (offset + length < end) {
      const extent = await this.#status(node, offset + length, end - offset - length);
      const here = (extent.flags & STATUS_ALLOCATED) !== 0;
      if (here !== (allocated ?? here)) break;
      allocated = here;
      length += extent.length;
    }
    return { length, allocated: allocated ?? false };
  }

  async #alloc({ node, words: [first = '', second] }: Call): Promise<void> {
    const start = sizeOf(first);
    const wanted = second === undefined ? SECTOR : sizeOf(second);
    const end = Math.min(start + wanted, (await this.#graph.disk(node)).length);
    let sum = 0;
    for (let at = start; at < end; ) {
      const { length, allocated } = await this.#allocated(node, at, end);
      if (allocated) sum += length;
      at += length;
    }
    const total = Math.max(0, end - start);
    this.#output.out(`${sum}/${total} bytes allocated at offset ${humanSize(start)}\n`);
  }

  async #map(node: GraphNode): Promise<void> {
    const end = (await this.#graph.disk(node)).length;
    for (let at = 0; at < end; ) {
      const { length, allocated } = await this.#allocated(node, at, end);
      const size = `${humanSize(length)} (0x${length.toString(16)}) bytes`;
      const what = allocated ? '    allocated' : 'not allocated';
      this.#output.out(`${size} ${what} at offset ${humanSize(at)} (0x${at.toString(16)})\n`);
      at += length;
    }
  }

  /** @throws Answer with what is said of its format */
  async #info({ descriptor, driver }: GraphNode): Promise<void> {
    const image = descriptor.driver === 'qcow2' ? descriptor : undefined;
    const clusterSize = image === undefined ? 0 : 2 ** image.clusterBits;
    let stateOffset = 0;
    if (image !== undefined) {
      const table = clusterSize * (clusterSize / (image.extendedL2 ? 16 : 8));
      stateOffset = Math.ceil(image.length / table) * table;
    }
    this.#output.out(
      `format name: ${driver}\ncluster size: ${humanSize(clusterSize)}\nvm state offset: ${humanSize(stateOffset)}\n`,
    );
    if (image === undefined) return;
    this.#output.out('Format specific information:\n');
    const lines = [
      `compat: ${image.version === 3 ? '1.1' : '0.10'}`,
      `compression type: ${image.compressionType === 1 ? 'zstd' : 'zlib'}`,
      ...(image.version === 3 ? [`lazy refcounts: ${image.lazyRefcounts}`] : []),
      `refcount bits: ${image.refcountBits}`,
      ...(image.version === 3 ? [`corrupt: ${image.corrupt}`, `extended l2: ${image.extendedL2}`] : []),
    ];
    throw new Answer(lines.map((line) => `    ${line}`).join('\n'));
  }

  async #truncate(call: Call): Promise<void> {
    const { rest, value } = this.#words(call, 'm:');
    const word = value('m') ?? 'off';
    const mode = PREALLOCATION.find((one) => one === word);
    if (mode === undefined) throw new Answer(`Invalid preallocation mode '${word}'`);
    const [text = ''] = rest;
    const size = sizeOf(text);
    try {
      await this.#actions.resize(call.node, size, mode);
    } catch (error) {
      throw new Answer(error instanceof QmpError ? error.message : errorText(error));
    }
  }

  async #reopen(call: Call): Promise<void> {
    const { options, rest, has, value } = this.#words(call, 'c:o:rw');
    for (const [letter, text] of options) {
      if (letter === 'c' && CACHES[text] === undefined) throw new Answer(`Invalid cache option: ${text}`);
    }
    if (options.filter(([letter]) => letter === 'r' || letter === 'w').length > 1) {
      throw new Answer('Only one -r/-w option may be given');
    }
    if (rest.length > 0) this.#usage(call.name);
    const { node } = call;
    try {
      const given = options.flatMap(([letter, text]) => (letter === 'o' ? [parseKeyval(text)] : []));
      const wanted = nested(Object.assign({}, ...given));
      const readOnly = has('r') ? true : has('w') ? false : undefined;
      if (readOnly !== undefined && wanted['read-only'] !== undefined) {
        throw new Answer("Cannot set both -r/-w and 'read-only'");
      }
      const cache = CACHES[value('c') ?? ''];
      const changed = {
        ...wanted,
        ...(readOnly === undefined ? {} : { 'read-only': readOnly }),
        ...(cache === undefined ? {} : { cache }),
      };
      await this.#actions.reopen({ ...asTheyAre(node), ...changed });
    } catch (error) {
      if (error instanceof Answer) throw error;
      throw new Answer(error instanceof QmpError ? error.message : errorText(error));
    }
  }

  #break({ node, words: [event = '', tag = ''] }: Call): void {
    const points = breakpointsOf(node);
    const why =
      points === undefined
        ? NO_BREAKPOINTS
        : !isBlkdebugEvent(event)
          ? NO_SUCH
          : points.set(event, tag, this.#output.out)
            ? undefined
            : 'Cannot allocate memory';
    if (why !== undefined) throw new Wrong(`Could not set breakpoint: ${why}`);
  }
}

/** The options of a node by which it would stay what it is. */
function asTheyAre({ options, name, children }: GraphNode): JsonObject {
  const below = children.map(({ role, node }) => [role, node.name]);
  return { ...options, 'node-name': name, ...Object.fromEntries(below) };
}

/** Words made into what the options of nodes are. */
function nested(given: JsonObject): JsonObject {
  const typed = coerce({ struct: { ...BLOCKDEV.members, ...ALL_OPTIONS } }, given);
  return isObject(typed) ? typed : {};
}

/** Those of the node itself, or of the first below it that has some. */
function breakpointsOf(node: GraphNode): Breakpoints | undefined {
  if (node.breakpoints !== undefined) return node.breakpoints;
  const below = node.children.find(({ role }) => role === 'file' || role === 'image');
  return below === undefined ? undefined : breakpointsOf(below.node);
}

function countText(
  name: string,
  [least, most]: readonly [number, number | undefined],
  count: number,
): string | undefined {
  if (count >= least && (most === undefined || count <= most)) return undefined;
  const expected =
    most === undefined
      ? `expected at least ${least} arguments`
      : least === most
        ? `expected ${least} arguments`
        : `expected between ${least} and ${most} arguments`;
  return `bad argument count ${count} to ${name}, ${expected}`;
}

function patternOf(text: string): number {
  const pattern = parsePattern(text);
  if (pattern === undefined) throw new Wrong(`${text} is not a valid pattern byte`);
  return pattern;
}

function sizeOf(text: string): number {
  const size = parseSize(text);
  if (typeof size === 'string') throw new Wrong(size);
  return size;
}

function lengthOf(text: string): number {
  const length = sizeOf(text);
  if (length > MAX_BYTES) throw new Wrong(`length cannot exceed ${MAX_BYTES}, given ${text}`);
  return length;
}

function checkSectors(offset: number, length: number): void {
  for (const [name, value] of Object.entries({ offset, count: length })) {
    if (value % SECTOR !== 0) throw new Wrong(`${value} is not a sector-aligned value for '${name}'`);
  }
}

/** @throws Wrong */
function patternFile(path: string): Uint8Array {
  let content: Uint8Array;
  try {
    content = readFileSync(path);
  } catch (error) {
    throw new Wrong('', `${path}: ${errorText(error)}`);
  }
  if (content.length === 0) throw new Wrong('', `${path}: file is empty`);
  return content;
}

/** Fills `target`, the part from `at` on of something larger, with `content` again and again. */
function fill(target: Uint8Array, content: Uint8Array, at: number): void {
  const [first = 0] = content;
  if (content.length === 1) {
    target.fill(first);
    return;
  }
  for (let done = 0; done < target.length; ) {
    const from = (at + done) % content.length;
    const part = content.subarray(from, Math.min(content.length, from + target.length - done));
    target.set(part, done);
    done += part.length;
  }
}

/** Whether all bytes are the same one. */
function holds(data: Uint8Array, pattern: number): boolean {
  const wanted = Buffer.alloc(Math.min(PATTERN_BYTES, data.length), pattern);
  for (let at = 0; at < data.length; at += PATTERN_BYTES) {
    const part = data.subarray(at, at + PATTERN_BYTES);
    if (Buffer.compare(wanted.subarray(0, part.length), part) !== 0) return false;
  }
  return true;
}

/** What the C library says of the error behind ours. */
function errorText(error: unknown): string {
  const known = toStillframeError(error);
  switch (known.code) {
    case 'ERR_STILLFRAME_OUT_OF_RANGE':
      return 'Input/output error';
    case 'ERR_STILLFRAME_READ_ONLY':
      return 'Operation not permitted';
    case 'ERR_STILLFRAME_UNSUPPORTED_FEATURE':
      return 'Operation not supported';
    default:
      return jobErrorText(known);
  }
}
