import type { FrozenDescriptor } from '../../backup/freeze.js';
import { DirtyBitmap } from '../../bitmap/dirty-bitmap.js';
import type { DiskDescriptor } from '../../block/disk.js';
import { bitmapsOfDisk, findBitmap } from '../../block/disk-bitmaps.js';
import { attachNode } from '../../block/graph.js';
import { StillframeError } from '../../errors.js';
import type { Runtime } from '../../kernels/runtime.js';
import { MAX_STRING_BYTES } from '../protocol/numbers.js';
import type { ContextKind, ExportDescriptor } from './exports.js';
import { exportFlags } from './session.js';

/** How a disk is exported. */
export interface ExportOptions {
  /** Name that clients ask for. Default: empty, which is the default export. */
  readonly name?: string | undefined;
  /** What people read about it in a listing. */
  readonly description?: string | undefined;
  /** Clients cannot write, whoever else can. Default: as the disk is open. */
  readonly readOnly?: boolean | undefined;
  /**
   * Persistent dirty bitmaps that clients can read as the metadata contexts `qemu:dirty-bitmap:NAME`; they may be those of
   * another disk of the same length, which this one lies on. Default: all that the image has and that are not damaged.
   */
  readonly bitmaps?:
    | readonly (string | { readonly disk: DiskDescriptor; readonly name: string })[]
    | undefined;
  /** Nobody else may use or change these bitmaps meanwhile (QMP `block-export-add`). Default false. */
  readonly holdBitmaps?: boolean | undefined;
  /** What is written and zeroed is durable before that is answered, whether clients ask for it or not. Default false. */
  readonly writethrough?: boolean | undefined;
  /** Clients can read how deep in the backing chain data is, as `qemu:allocation-depth`. Default true. */
  readonly allocationDepth?: boolean | undefined;
}

/** Metadata contexts of one export: their numbers are as long as two bytes. */
const MAX_BITMAPS = 1000;

/**
 * Prepares a disk for being exported.
 *
 * @throws StillframeError ERR_STILLFRAME_INVALID_ARGUMENT (the name), …_READ_ONLY, …_BITMAP_NOT_FOUND,
 *   …_BITMAP_INCONSISTENT, …_ARENA_EXHAUSTED
 */
export function makeExport(
  runtime: Runtime,
  disk: DiskDescriptor,
  frozen: FrozenDescriptor | undefined,
  options: ExportOptions,
): ExportDescriptor {
  const { name = '', description = '', bitmaps, holdBitmaps = false, allocationDepth = true } = options;
  const { writethrough = false } = options;
  const readOnly = frozen !== undefined || (options.readOnly ?? disk.readOnly);
  for (const text of [name, description]) {
    if (Buffer.byteLength(text) <= MAX_STRING_BYTES && !text.includes('\0')) continue;
    throw new StillframeError(
      'ERR_STILLFRAME_INVALID_ARGUMENT',
      `an export's name and description have at most ${MAX_STRING_BYTES} bytes and no NUL; choose other ones`,
    );
  }
  if (!readOnly && disk.readOnly) {
    throw new StillframeError(
      'ERR_STILLFRAME_READ_ONLY',
      `'${disk.node.path}' is open read-only and can only be exported read-only; open it with readOnly: false`,
    );
  }
  // What they say changes with the live disk.
  const pointers =
    frozen === undefined ? findBitmaps(runtime, disk, bitmaps, holdBitmaps) : new Map<string, number>();
  const contexts: (readonly [string, ContextKind])[] = [
    ['base:allocation', { kind: 'allocation' }],
    ...(frozen === undefined && allocationDepth
      ? [['qemu:allocation-depth', { kind: 'depth' }] as const]
      : []),
    ...[...pointers].map(
      ([bitmap, pointer]) => [`qemu:dirty-bitmap:${bitmap}`, { kind: 'bitmap', pointer }] as const,
    ),
  ];
  return {
    offer: {
      name,
      description,
      length: disk.length,
      flags: exportFlags(readOnly, attachNode(runtime, disk.node).writeZeroesFast !== undefined),
      contexts: contexts.map(([context]) => context),
    },
    disk,
    frozen,
    contexts: contexts.map(([, kind]) => kind),
    writethrough,
    holdsBitmaps: holdBitmaps,
  };
}

/** Gives back what {@link makeExport} took. Nobody may use the export any more. */
export function freeExport(runtime: Runtime, { contexts, holdsBitmaps }: ExportDescriptor): void {
  for (const context of contexts) {
    if (context.kind !== 'bitmap') continue;
    const bitmap = new DirtyBitmap(runtime, context.pointer);
    bitmap.pin(-1);
    if (holdsBitmaps) bitmap.busy = false;
  }
}

/** Pointers of dirty bitmaps, their bits in memory. */
function findBitmaps(
  runtime: Runtime,
  disk: DiskDescriptor,
  wanted: ExportOptions['bitmaps'],
  hold: boolean,
): ReadonlyMap<string, number> {
  const listed =
    wanted ??
    bitmapsOfDisk(runtime, disk)
      .all()
      .map(({ name }) => name)
      .filter((name) => name !== '');
  const found = new Map<string, DirtyBitmap>();
  const checks = hold ? (['busy', 'inconsistent'] as const) : (['inconsistent'] as const);
  for (const one of listed.slice(0, MAX_BITMAPS)) {
    const { disk: owner, name } = typeof one === 'string' ? { disk, name: one } : one;
    try {
      const bitmap = findBitmap(runtime, owner, name, checks);
      if (bitmap.length !== disk.length) {
        throw new StillframeError(
          'ERR_STILLFRAME_SIZE_MISMATCH',
          `Bitmap '${name}' is of ${bitmap.length} bytes and the export of ${disk.length}; export it with its own disk`,
        );
      }
      found.set(name, bitmap);
    } catch (error) {
      // Whoever asked for it by name wants to know.
      if (wanted !== undefined) throw error;
    }
  }
  for (const bitmap of found.values()) {
    bitmap.pin(1);
    if (hold) bitmap.busy = true;
  }
  return new Map([...found].map(([name, { pointer }]) => [name, pointer]));
}
