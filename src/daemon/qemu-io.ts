import type { DiskHandle } from '../engine/disk.js';
import { toStillframeError } from '../errors.js';
import { jobErrorText } from '../qmp/errors.js';
import type { Graph } from './graph.js';

/** Most bytes of one request. */
const MAX_BYTES = 2 ** 31 - 512;
const CHUNK = 1024 * 1024;
const UNITS = ['bytes', 'KiB', 'MiB', 'GiB', 'TiB'];

/**
 * The monitor command `qemu-io [-d] NODE "COMMAND"`, by which people poke a drive: `read` and `aio_read` (`-P`), `write`
 * and `aio_write` (`-P`, `-z`, `-u`), `discard`, `flush`, `aio_flush`. What it says goes to `say`.
 *
 * @returns what the monitor answers: nothing, or why nothing was done
 */
export async function monitorCommand(
  graph: Graph,
  line: string,
  say: (text: string) => void,
): Promise<string> {
  const [name, ...given] = wordsOf(line);
  if (name !== 'qemu-io') return `unknown command: '${name ?? ''}'\r\n`;
  const words = given[0] === '-d' ? given.slice(1) : given;
  const [device, command] = words;
  if (device === undefined || command === undefined) return 'qemu-io: device and command are needed\r\n';
  const node = graph.find(device);
  if (node === undefined) return `Error: Cannot find device='${device}' nor node-name='${device}'\r\n`;
  await carryOut(await graph.disk(node), wordsOf(command), say);
  return '';
}

/** Words with quotes around those that have spaces. */
function wordsOf(line: string): string[] {
  const words = line.match(/"(?:[^"\\]|\\.)*"|'[^']*'|[^\s"']+/g) ?? [];
  return words.map((word) => (/^["']/.test(word) ? word.slice(1, -1).replaceAll(/\\(.)/g, '$1') : word));
}

async function carryOut(
  disk: DiskHandle,
  [verb = '', ...words]: readonly string[],
  say: (text: string) => void,
): Promise<void> {
  const command = verb.replace(/^aio_/, '');
  if (command === 'flush') {
    await disk.flush();
    return;
  }
  const options = optionsOf(words);
  if (typeof options === 'string') {
    say(`${options}\n`);
    return;
  }
  const { offset, length, pattern } = options;
  const done: Readonly<Record<string, string>> = { read: 'read', write: 'wrote', discard: 'discard' };
  if (done[command] === undefined) {
    say(`command "${verb}" not found\n`);
    return;
  }
  const begun = performance.now();
  try {
    if (command === 'discard') await disk.discard(offset, length);
    else if (command === 'write' && options.zeroes) {
      await disk.writeZeroes(offset, length, { unmap: options.unmap });
    } else {
      for (let at = 0; at < length; at += CHUNK) {
        const bytes = Math.min(CHUNK, length - at);
        if (command === 'write') {
          await disk.write(offset + at, new Uint8Array(bytes).fill(pattern ?? 0xcd));
          continue;
        }
        const found = await disk.read(offset + at, bytes);
        if (pattern === undefined || found.every((byte) => byte === pattern)) continue;
        say(`Pattern verification failed at offset ${offset + at}, ${bytes} bytes\n`);
        break;
      }
    }
  } catch (error) {
    say(`${verb} failed: ${jobErrorText(toStillframeError(error))}\n`);
    return;
  }
  const seconds = Math.max(1e-6, (performance.now() - begun) / 1000);
  const rate = `${human(length / seconds)}/sec and ${(1 / seconds).toFixed(4)} ops/sec`;
  say(
    `${done[command]} ${length}/${length} bytes at offset ${offset}\n` +
      `${human(length)}, 1 ops; 00:00:${seconds.toFixed(2).padStart(5, '0')} (${rate})\n`,
  );
}

interface IoOptions {
  readonly offset: number;
  readonly length: number;
  readonly pattern: number | undefined;
  readonly zeroes: boolean;
  readonly unmap: boolean;
}

/** @returns what is wrong, or what is wanted */
function optionsOf(words: readonly string[]): IoOptions | string {
  let pattern: number | undefined;
  let [zeroes, unmap] = [false, false];
  const places: number[] = [];
  for (let index = 0; index < words.length; index++) {
    const word = words[index] ?? '';
    if (word === '-P') pattern = Number(words[++index]);
    else if (word === '-z') zeroes = true;
    else if (word === '-u') unmap = true;
    else if (!/^-[a-z]$/.test(word)) places.push(sizeOf(word));
  }
  const [offset = Number.NaN, length = Number.NaN] = places;
  if (!Number.isSafeInteger(offset) || offset < 0) return 'non-numeric offset argument';
  if (!Number.isSafeInteger(length) || length < 0 || length > MAX_BYTES) {
    return 'non-numeric length argument, or one that is too large';
  }
  if (pattern !== undefined && !(pattern >= 0 && pattern <= 255)) return 'invalid pattern byte';
  return { offset, length, pattern, zeroes, unmap };
}

function sizeOf(word: string): number {
  const [, digits, unit = ''] = /^((?:0x[0-9a-f]+)|\d+)([bkmgt]?)$/i.exec(word) ?? [];
  return digits === undefined
    ? Number.NaN
    : Number(digits) * 1024 ** Math.max(0, 'bkmgt'.indexOf(unit.toLowerCase()));
}

function human(bytes: number): string {
  const power = Math.min(UNITS.length - 1, bytes < 1 ? 0 : Math.floor(Math.log2(bytes) / 10));
  const value = bytes / 1024 ** power;
  return `${Number.isInteger(value) ? value : value.toFixed(3)} ${UNITS[power]}`;
}
