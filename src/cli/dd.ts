import { createEngine } from '../index.js';
import {
  ALLOW_BACKING,
  type Command,
  FORCE_SHARE,
  FORMAT,
  OUTPUT,
  OUTPUTS,
  parseSize,
  TARGET_FORMATS,
  usageError,
} from './command.js';
import { howToOpen, IMAGE_NAMES, namedImage, newFile } from './image-names.js';
import { cancelOnSignal, tellInterrupted } from './signals.js';

const OPERANDS = ['bs', 'count', 'skip', 'if', 'of'] as const;
type Operand = (typeof OPERANDS)[number];

const MOST_BLOCK_BYTES = 2 ** 31 - 1;

/** What was given as NAME=VALUE; the last one counts. @throws StillframeError ERR_STILLFRAME_INVALID_ARGUMENT */
function operandsOf(words: readonly string[]): ReadonlyMap<Operand, string> {
  const given = new Map<Operand, string>();
  for (const word of words) {
    const equals = word.indexOf('=');
    const name = OPERANDS.find((known) => known === word.slice(0, Math.max(0, equals)));
    if (name === undefined) {
      throw usageError(`unrecognized operand ${word.split('=', 1)[0]}; there are ${OPERANDS.join(', ')}`);
    }
    given.set(name, word.slice(equals + 1));
  }
  return given;
}

export const dd: Command = {
  name: 'dd',
  usage: '[options] [bs=SIZE] [count=BLOCKS] [skip=BLOCKS] if=FILE of=FILE',
  summary:
    'Copies a part of an image into a new one. Blocks have 512 bytes, or what bs says. The first skip blocks are left\n' +
    'out, and count says after how many blocks of the image the copy ends: like qemu-img, it counts those left out, too.',
  positionals: [0, Infinity],
  options: [
    FORMAT,
    { long: 'target-format', short: 'O', value: 'FMT', help: 'format of the new image: raw or qcow2 (raw)' },
    FORCE_SHARE,
    ALLOW_BACKING,
    ...IMAGE_NAMES,
    OUTPUT,
  ],
  run: async (args) => {
    const given = operandsOf(args.positionals);
    const [source, target] = [given.get('if'), given.get('of')];
    if (source === undefined || target === undefined) {
      throw usageError('Must specify both input and output files: if=FILE of=FILE');
    }
    const size = (name: Operand): number | undefined => {
      const text = given.get(name);
      return text === undefined ? undefined : parseSize(text, name);
    };
    const [block = 512, count = Infinity, skip = 0] = [size('bs'), size('count'), size('skip')];
    if (block < 1 || block > MOST_BLOCK_BYTES) {
      throw usageError(`bs=${given.get('bs')}: blocks have 1 to ${MOST_BLOCK_BYTES} bytes`);
    }
    const format = args.choice('target-format', TARGET_FORMATS, 'raw');
    const json = args.choice('output', OUTPUTS, 'human') === 'json';
    const engine = await createEngine();
    const ending = new AbortController();
    const signals = cancelOnSignal(() => ending.abort());
    try {
      const named = await namedImage(engine, args, source);
      await engine.convertImage(named.path, newFile(target), {
        source: howToOpen(named, args),
        format,
        range: { skip: skip * block, end: count * block },
        signal: ending.signal,
        onMessage: (text) => process.stderr.write(`stillframe: ${text}\n`),
      });
      if (json) console.log(JSON.stringify({ type: 'result', filename: target, format }));
      return 0;
    } catch (error) {
      if (!signals.interrupted()) throw error;
      return tellInterrupted(json);
    } finally {
      signals.stop();
      await engine.close();
    }
  },
};
