/** Programs with a QMP socket that have drives open, and a writer to those. */
import { type ChildProcess, spawn } from 'node:child_process';
import { existsSync, mkdtempSync, readdirSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { type HotBackupOptions, QmpClient } from '#src/index.js';
import { CLI } from '../support/cli.js';
import { Random } from '../support/data.js';
import { hasPeer, run } from '../support/peers.js';

/** Bytes of a drive. */
export const LENGTH = 8 << 20;
const GRANULE = 65536;

/** Who has the drives open: a machine without a guest, QEMU's storage daemon, or ours. */
export type Program = 'qemu-system-x86_64' | 'qemu-storage-daemon' | 'stillframe';
export const PROGRAMS: readonly Program[] = ['qemu-system-x86_64', 'qemu-storage-daemon', 'stillframe'];

/** Whether it, and what is needed to make images and to look at them, is installed. */
export function hasProgram(program: Program): boolean {
  const needed = ['qemu-img', 'qemu-io', ...(program === 'stillframe' ? [] : [program])];
  return needed.map((tool) => hasPeer(tool)).every((there) => there);
}

export interface MachineOptions {
  /** Its options, in addition to the drives, for QEMU's command line. */
  readonly more?: readonly string[];
  /** Options that make the drives of images in that folder, instead of those for plain ones. */
  readonly drivesOf?: (folder: string) => readonly string[];
  readonly count?: number;
  readonly format?: 'qcow2' | 'raw';
}

/** One write to a drive. */
interface Write {
  readonly drive: number;
  readonly offset: number;
  readonly length: number;
  readonly pattern: number;
}

/**
 * A program with drives `drv0`, `drv1`, …, in its folder as `drive0` and so on, and two QMP sockets. Nodes are written to
 * by its monitor, or over NBD.
 */
export class Machine {
  readonly folder = mkdtempSync(join(tmpdir(), 'stillframe-hot-'));
  readonly qmp = join(this.folder, 'qmp');
  readonly program: Program;
  /** What is on the drives. */
  readonly content: Buffer[];
  /** Everything that was written since {@link mark}, in order. */
  #writes: Write[] = [];
  #marked: Buffer[] = [];
  #writing: Promise<void> = Promise.resolve();
  #child: ChildProcess | undefined;
  #ended: Promise<unknown> = Promise.resolve();
  #monitor: QmpClient | undefined;
  readonly #options: MachineOptions;
  readonly #random = new Random(11);

  private constructor(program: Program, options: MachineOptions) {
    this.program = program;
    this.#options = options;
    const { count = 1, format = 'qcow2' } = options;
    this.content = Array.from({ length: count }, () => Buffer.alloc(LENGTH));
    for (const [index, content] of this.content.entries()) {
      const file = this.at(`drive${index}`);
      run('qemu-img', ['create', '-q', '-f', format, file, String(LENGTH)]);
      const commands = Array.from({ length: 10 }, () => this.#some(index)).flatMap((write) => {
        content.fill(write.pattern, write.offset, write.offset + write.length);
        return ['-c', `write -P ${write.pattern} ${write.offset} ${write.length}`];
      });
      run('qemu-io', ['-f', format, ...commands, file]);
    }
  }

  static async start(program: Program, options: MachineOptions = {}): Promise<Machine> {
    const machine = new Machine(program, options);
    await machine.launch();
    return machine;
  }

  at(name: string): string {
    return join(this.folder, name);
  }

  get monitor(): QmpClient {
    if (this.#monitor === undefined) throw new Error('it does not run');
    return this.#monitor;
  }

  /** Starts it, with the drives as they are. */
  async launch(): Promise<void> {
    for (const name of ['qmp', 'other', 'live']) rmSync(this.at(name), { force: true });
    const { format = 'qcow2' } = this.#options;
    const nodes = this.content.map(
      (_, index) =>
        `${format},node-name=drv${index},file.driver=file,file.filename=${this.at(`drive${index}`)}`,
    );
    const [command, args] = this.#commandLine(nodes);
    this.#child = spawn(command, args, { stdio: ['ignore', 'ignore', 'inherit'] });
    const child = this.#child;
    this.#ended = new Promise((resolve) => child.once('exit', resolve));
    while (!existsSync(this.at('other'))) await new Promise((resolve) => setTimeout(resolve, 10));
    for (;;) {
      const client = await QmpClient.connect(this.at('other')).catch(() => undefined);
      if (client !== undefined) {
        this.#monitor = client;
        return;
      }
      await new Promise((resolve) => setTimeout(resolve, 10));
    }
  }

  #commandLine(nodes: readonly string[]): [string, string[]] {
    const { more = [], drivesOf } = this.#options;
    const drives = drivesOf?.(this.folder);
    if (this.program === 'qemu-system-x86_64') {
      const plain = nodes.flatMap((node, index) => [
        ...['-blockdev', node],
        ...['-device', `virtio-blk-pci,drive=drv${index},id=disk${index}`],
      ]);
      return [
        this.program,
        [
          ...['-machine', 'q35,accel=tcg', '-nodefaults', '-display', 'none', '-S'],
          ...(drives ?? plain),
          ...['-qmp', `unix:${this.qmp},server=on,wait=off`],
          ...['-qmp', `unix:${this.at('other')},server=on,wait=off`],
          ...more,
        ],
      ];
    }
    const args = [
      ...(drives ?? nodes.flatMap((node) => ['--blockdev', node])),
      ...['--chardev', `socket,id=c,path=${this.qmp},server=on,wait=off`, '--monitor', 'c'],
      ...['--chardev', `socket,id=d,path=${this.at('other')},server=on,wait=off`, '--monitor', 'd'],
      ...(this.program === 'stillframe' ? [] : this.#live()),
      ...more,
    ];
    return this.program === 'stillframe'
      ? [process.execPath, [CLI, 'daemon', ...args]]
      : [this.program, args];
  }

  /** QEMU's storage daemon has no command to write to a node. */
  #live(): string[] {
    return [
      ...['--nbd-server', `addr.type=unix,addr.path=${this.at('live')}`],
      ...this.content.flatMap((_, index) => [
        '--export',
        `nbd,id=live${index},node-name=drv${index},name=live${index},writable=on`,
      ]),
    ];
  }

  /** Where its NBD server listens, if it has one that is not a backup's. */
  get nbd(): string | undefined {
    return this.program === 'qemu-storage-daemon' ? `unix:${this.at('live')}` : undefined;
  }

  #some(drive: number): Write {
    const random = this.#random;
    const offset = random.between(0, LENGTH / 4096 - 32) * 4096;
    const length = random.between(1, 32) * 4096;
    return { drive, offset, length, pattern: random.between(1, 250) };
  }

  /** Writes somewhere, after whatever is being written. */
  write(drive = 0, given?: Partial<Write>): Promise<void> {
    // Nobody knows in which order two at once are carried out.
    this.#writing = this.#writing.then(() => this.#write(drive, given));
    return this.#writing;
  }

  async #write(drive: number, given: Partial<Write> | undefined): Promise<void> {
    const write = { ...this.#some(drive), ...given };
    const command = `write -P ${write.pattern} ${write.offset} ${write.length}`;
    this.#writes.push(write);
    if (this.program === 'qemu-storage-daemon') {
      const child = spawn('qemu-io', ['-f', 'raw', '-c', command, this.#liveUri(drive)], { stdio: 'ignore' });
      const status = await new Promise((resolve) => child.once('exit', resolve));
      if (status !== 0) throw new Error(`qemu-io: ${status}`);
    } else {
      const said = await this.monitor.execute('human-monitor-command', {
        'command-line': `qemu-io ${this.#device(drive)} "${command}"`,
      });
      if (/error|denied|failed|conflict/i.test(String(said))) throw new Error(String(said));
    }
    this.content[drive]?.fill(write.pattern, write.offset, write.offset + write.length);
  }

  /** How the monitor names a drive as its guest sees it. */
  #device(drive: number): string {
    return this.program === 'stillframe'
      ? `drv${drive}`
      : `-d /machine/peripheral/disk${drive}/virtio-backend`;
  }

  #liveUri(drive: number): string {
    return `nbd+unix:///live${drive}?socket=${this.at('live')}`;
  }

  /** Whoever compares from now on has to do with what is written from now on. */
  mark(): void {
    this.#writes = [];
    this.#marked = this.content.map((content) => Buffer.from(content));
  }

  /**
   * Writes until `until` is over, to all drives in turn, one after the other.
   *
   * @returns how many writes there were
   */
  async writeDuring(until: Promise<unknown>): Promise<number> {
    let over = false;
    const end = (): void => {
      over = true;
    };
    until.then(end, end);
    let count = 0;
    while (!over) await this.write(count++ % this.content.length);
    return count;
  }

  /**
   * Whether images of all drives are those at one moment since {@link mark}: all writes up to some one are in them, and
   * none that came later. @returns the number of writes that are in them
   */
  momentOf(images: readonly string[]): number | undefined {
    const found = images.map((image) => this.raw(image));
    const drives = this.#marked.map((content) => Buffer.from(content));
    const same = (): boolean => drives.every((content, index) => content.equals(found[index] ?? Buffer.of()));
    for (const [index, { drive, offset, length, pattern }] of this.#writes.entries()) {
      if (same()) return index;
      drives[drive]?.fill(pattern, offset, offset + length);
    }
    return same() ? this.#writes.length : undefined;
  }

  /** The bytes of an image with all it lies on. */
  raw(image: string): Buffer {
    const file = this.at('raw');
    run('qemu-img', ['convert', '-O', 'raw', image, file]);
    const bytes = readFileSync(file);
    rmSync(file);
    return bytes;
  }

  /** What there is of ours in it, or beside its drives. */
  async leftovers(): Promise<string[]> {
    const nodes = JSON.stringify(await this.monitor.execute('query-named-block-nodes', { flat: true }));
    const jobs = JSON.stringify(await this.monitor.execute('query-jobs'));
    const exports = JSON.stringify(await this.monitor.execute('query-block-exports'));
    const names = [...`${nodes}${jobs}${exports}`.matchAll(/stillframe-(?:own-)?[0-9a-f]{12}[^"]*/g)];
    const files = readdirSync(this.folder).filter((name) => name.startsWith('.stillframe-'));
    return [...names.map(([name]) => name), ...files];
  }

  /** A dirty bitmap of a drive, as the program tells of it. */
  async bitmap(name: string, drive = 0): Promise<Readonly<Record<string, unknown>> | undefined> {
    const nodes = await this.monitor.execute('query-named-block-nodes', { flat: true });
    const node = (Array.isArray(nodes) ? nodes : []).find((one) => one['node-name'] === `drv${drive}`);
    const bitmaps: unknown = node?.['dirty-bitmaps'];
    return (Array.isArray(bitmaps) ? bitmaps : []).find((one) => one['name'] === name);
  }

  /** The number of granules that were written to since {@link mark}. */
  touched(drive = 0): number {
    const granules = new Set<number>();
    for (const { drive: other, offset, length } of this.#writes) {
      if (other !== drive) continue;
      for (let at = Math.floor(offset / GRANULE); at * GRANULE < offset + length; at++) granules.add(at);
    }
    return granules.size;
  }

  /** Ends it at once; what was not flushed may be lost. */
  async crash(): Promise<void> {
    await this.kill();
    for (const [index, content] of this.content.entries()) this.raw(this.at(`drive${index}`)).copy(content);
  }

  async kill(): Promise<void> {
    this.#child?.kill('SIGKILL');
    await this.#ended;
    this.#monitor?.close();
  }

  /** Ends it in an orderly way. */
  async quit(): Promise<void> {
    await this.monitor.execute('quit').catch(() => undefined);
    await this.#ended;
    this.#monitor?.close();
  }

  /** Has a run of a backup killed while it copies. */
  async killBackup(options: Omit<HotBackupOptions, 'qmp'>): Promise<void> {
    const script = `
      import { backupRunning, createEngine } from ${JSON.stringify(new URL('../../dist/index.js', import.meta.url).href)};
      const [options] = process.argv.slice(1);
      await backupRunning(await createEngine(), { ...JSON.parse(options), onJobs: () => console.log('begun') });`;
    const given = JSON.stringify({ qmp: this.qmp, ...options });
    const child = spawn(process.execPath, ['--input-type=module', '-e', script, given], {
      stdio: ['ignore', 'pipe', 'inherit'],
    });
    await new Promise((resolve) => child.stdout.once('data', resolve));
    child.kill('SIGKILL');
    await new Promise((resolve) => child.once('exit', resolve));
  }

  async remove(): Promise<void> {
    await this.kill();
    rmSync(this.folder, { recursive: true, force: true });
  }
}
