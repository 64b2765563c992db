import { toStillframeError } from '../errors.js';
import type { Team } from '../job/team.js';
import type { Runtime } from '../kernels/runtime.js';
import type { Comparison, Finding } from './comparison.js';
import { attachNode } from './graph.js';
import { type BlockNode, STATUS_COMPRESSED, STATUS_ZERO } from './node.js';
import { type ChainExtent, chainStatus, shownStatus } from './status.js';

/** Bytes compared in one step. */
const STEP = 1024 * 1024;
/** Bytes that a thread claims at once. */
const CLAIM = 8 * 1024 * 1024;

/** Whether two extents are held in the same way, as strict mode sees it: flags, and whether there is a place. */
function sameStatus(one: ChainExtent, other: ChainExtent): boolean {
  const different = (one.flags ^ other.flags) & ~STATUS_COMPRESSED;
  return different === 0 && one.hostOffset >= 0 === other.hostOffset >= 0;
}

/**
 * Compares what two images read as along with the other threads of the team, like `qemu-img compare`. Ranges that are
 * zero on both sides by their block status are not read; the longer image must be zero where the other one has ended.
 *
 * @param buffer twice {@link STEP} bytes
 * @param onProgress called with bytes done and bytes in all
 * @returns undefined where nothing differs in the parts this thread claimed
 */
export function comparePart(
  runtime: Runtime,
  { first, second, strict }: Comparison,
  team: Team,
  buffer: number,
  onProgress: (done: number, total: number) => void,
): Finding | undefined {
  const { kernels } = runtime;
  const [a, b] = [attachNode(runtime, first), attachNode(runtime, second)];
  const total = Math.max(a.length, b.length);
  /** What a range is, with nothing behind the end. */
  const status = (node: BlockNode, offset: number, length: number): ChainExtent => {
    if (offset < node.length) return chainStatus(node, offset, Math.min(length, node.length - offset));
    return { length, flags: STATUS_ZERO, depth: 0, hostOffset: -1, node: undefined };
  };
  const read = (node: BlockNode, offset: number, pointer: number, length: number): void => {
    const inside = Math.max(0, Math.min(length, node.length - offset));
    if (inside > 0) node.read(offset, pointer, inside);
    if (inside < length) runtime.arena.u8.fill(0, pointer + inside, pointer + length);
  };
  /** Compares what starts at `offset`. @returns its bytes, or what was found */
  const step = (offset: number, most: number): number | Finding => {
    const one = status(a, offset, most);
    const other = status(b, offset, one.length);
    const common = offset < a.length && offset < b.length;
    if (strict && common && !sameStatus(shownStatus(one), shownStatus(other))) {
      return { offset, found: 'allocation' };
    }
    if (one.flags & other.flags & STATUS_ZERO) return other.length;
    const bytes = Math.min(other.length, STEP);
    read(a, offset, buffer, bytes);
    read(b, offset, buffer + STEP, bytes);
    const index = kernels.firstDifference(buffer, buffer + STEP, bytes);
    return index < 0 ? bytes : { offset: offset + index, found: 'content' };
  };
  for (;;) {
    const start = team.claim(CLAIM, total);
    if (start === undefined) return undefined;
    let end = Math.min(start + CLAIM, total);
    for (let offset = start; offset < end; ) {
      let done: number | Finding;
      try {
        // A hole that goes on is looked at as a whole.
        done = step(offset, total - offset);
      } catch (error) {
        done = { offset, found: { error: toStillframeError(error).toPlain() } };
      }
      if (typeof done !== 'number') {
        // Whoever claimed a part before this one looks at the rest of it still.
        team.stop();
        return done;
      }
      const stop = offset + done;
      if (stop > end && team.claimOn(end, stop)) end = stop;
      team.addDone(Math.min(stop, end) - offset);
      onProgress(team.done, total);
      offset = stop;
    }
  }
}

/** Bytes of the buffer that {@link comparePart} needs. */
export const COMPARE_BUFFER_BYTES = 2 * STEP;
