import { spawnSync } from 'node:child_process';
import { existsSync, mkdirSync, rmSync } from 'node:fs';
import { join } from 'node:path';
import { isDeepStrictEqual } from 'node:util';
import { CLI, type Finished } from '../../../support/cli.js';
import { run } from '../../../support/peers.js';
import { type Operation, Patterns, qemuIoCommand } from '../../../support/qcow2/operation.js';
import { qemuApply } from '../../../support/qcow2/qemu.js';
import { Diverged, type Divergence, divergenceOf, PREPARATION } from '../divergence.js';
import { compareSides, SIDES } from './comparison.js';
import { losesData, refusesNeedlessly } from './faults.js';
import { Look } from './look.js';
import type { Preparation, Story } from './story.js';
import type { Command } from './words.js';

/** Images that commands make. */
const NEW = ['new.raw', 'new.qcow2', 'new.qcow2.data'];

/** Commands after which more or less may be allocated: QEMU copies in other pieces than we do. */
const COPYING = ['commit', 'rebase', 'convert', 'dd'];

/** Commands that make an image, and leave what had its name half overwritten with QEMU. */
const MAKING = ['convert', 'dd', 'create'];

/** Commands that change nothing, whose output has to be the same for the same image. */
const READING = ['map', 'compare', 'measure', 'info'];

/** Tells the commands of a story to both sides and compares what has become of their images. */
export class CommandReplay {
  readonly #folder: string;
  readonly #patterns: Patterns;

  constructor(folder: string) {
    this.#folder = folder;
    this.#patterns = new Patterns(folder);
  }

  /** undefined: the sides agree. */
  run(story: Story): Divergence | undefined {
    try {
      this.#prepare(story.preparations);
      const killed = story.preparations.some((one) => typeof one !== 'string' && one.killed === true);
      if (!story.commands.every((command) => this.#tell(command, killed))) return undefined;
      const copied = story.commands.some(([name = '']) => COPYING.includes(name));
      compareSides(this.#folder, copied);
      return undefined;
    } catch (error) {
      return divergenceOf(error);
    } finally {
      for (const side of ['made', ...SIDES] as const)
        rmSync(this.#at(side), { recursive: true, force: true });
    }
  }

  #at(side: (typeof SIDES)[number] | 'made', name = ''): string {
    return join(this.#folder, side, name);
  }

  /** The same images for both sides. */
  #prepare(preparations: readonly Preparation[]): void {
    const made = this.#at('made');
    mkdirSync(made);
    try {
      for (const preparation of preparations) {
        if (typeof preparation === 'string') run('qemu-img', preparation.split(' '), [0], made);
        else {
          const { image, format, operations, killed } = preparation;
          if (killed === true) this.#kill(made, image, operations);
          else qemuApply(join(made, image), operations, this.#patterns, format);
        }
      }
      for (const side of SIDES) run('cp', ['-a', made, this.#at(side)]);
    } catch (error) {
      throw new Diverged(PREPARATION, String(error));
    }
  }

  #kill(folder: string, image: string, operations: readonly Operation[]): void {
    const lines = operations.map((operation) => qemuIoCommand(operation, this.#patterns));
    const input = `${lines.join('\n')}\nsigraise 9\n`;
    const { signal } = spawnSync('qemu-io', ['-f', 'qcow2', '-d', 'unmap', image], { cwd: folder, input });
    if (signal !== 'SIGKILL') throw new Error(`qemu-io was to die with '${image}' open`);
  }

  #run(program: string, line: string, folder: string): Finished {
    const { status, stdout, stderr, error } = spawnSync(`exec ${program} ${line}`, {
      shell: true,
      cwd: folder,
      encoding: 'utf8',
      maxBuffer: 1 << 28,
      timeout: 30_000,
    });
    if (error) throw new Diverged('time', `${line}: ${error.message}`);
    return { status, stdout, stderr };
  }

  /** False: QEMU has failed, or both have and have left an image half written that others may be on. */
  #tell(words: Command, killed: boolean): boolean {
    const [name = ''] = words;
    const command = words.join(' ');
    if (this.#isLeftOut(words)) return true;
    const reading = READING.includes(name) || (name === 'check' && !command.includes(' -r '));
    const existed = NEW.some((file) => existsSync(this.#at('ours', file)));
    const stillframe = `'${process.execPath}' '${CLI}'`;
    const own = name === 'create' ? `${command} --force` : command;
    const ours = this.#run(stillframe, own, this.#at('ours'));
    const theirs = this.#run('qemu-img', command, this.#at(reading ? 'ours' : 'theirs'));
    if (ours.status === 0 && refusesNeedlessly(theirs.stderr)) return false;
    expectSameStatus(command, reading || name === 'check', ours, theirs);
    if (ours.status === 0) {
      if (reading) expectSameOutput(command, killed, ours, theirs);
      return true;
    }
    // QEMU changes what comes first and refuses the rest.
    if (name === 'amend') return false;
    if (!MAKING.includes(name)) return true;
    for (const side of SIDES) for (const file of NEW) rmSync(this.#at(side, file), { force: true });
    return !existed && !command.includes(' -n ');
  }

  /** What would make images that nobody can read, or that QEMU damages. */
  #isLeftOut(command: Command): boolean {
    const folder = this.#at('theirs');
    const [, backing] =
      command.map((word) => /^-b ([^'\s]+)/.exec(word)).find((found) => found !== null) ?? [];
    if (backing !== undefined && !existsSync(join(folder, backing))) return true;
    const image = command.at(-1) ?? '';
    if (!['check', 'rebase'].includes(command[0] ?? '') || !existsSync(join(folder, image))) return false;
    return losesData(command, new Look(folder, image).info);
  }
}

/** @param exact the number means something, and not only whether it is 0 */
function expectSameStatus(command: string, exact: boolean, ours: Finished, theirs: Finished): void {
  const status = (finished: Finished): unknown => (exact ? finished.status : finished.status === 0);
  if (status(ours) === status(theirs)) return;
  const told = (finished: Finished): string => `${finished.status} ${finished.stderr.trim()}`;
  const kind = `${command.split(' ')[0]} ends with ${ours.status} and ${theirs.status}`;
  throw new Diverged(kind, `${command}\n  ours: ${told(ours)}\n  QEMU: ${told(theirs)}`);
}

/** @param killed there are bitmaps that were in use: QEMU counts what they would take though they cannot be copied */
function expectSameOutput(command: string, killed: boolean, ours: Finished, theirs: Finished): void {
  const measured = killed && command.startsWith('measure');
  const output = ({ stdout }: Finished): string =>
    measured ? stdout.replace(/"bitmaps": \d+,|^bitmaps size: \d+\n/m, '') : stdout;
  const [own, other] = [output(ours), output(theirs)];
  const json = command.includes('--output=json');
  if (json ? isDeepStrictEqual(JSON.parse(own), JSON.parse(other)) : own === other) return;
  throw new Diverged('output', `${command}\n  ours: ${ours.stdout}\n  QEMU: ${theirs.stdout}`);
}
