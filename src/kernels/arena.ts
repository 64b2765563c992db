import { StillframeError } from '../errors.js';
import { withLock } from './futex.js';
import { Memory, type WasmMemory } from './webassembly.js';

/**
 * The one shared `WebAssembly.Memory` and its allocator. All data in flight, cluster states, metadata caches
 * and control words live here; a pointer is a byte offset into it.
 *
 * The memory has its full size from the start and never grows, so views stay valid for ever and every thread
 * sees the same bytes. Untouched pages cost no physical memory.
 *
 * Layout of the allocator's part, from {@link ARENA_BASE}:
 *
 *     +--------------------+ ARENA_BASE
 *     | lock        int32  |
 *     | -                  |
 *     | high water  uint32 |  bytes at and above it were never handed out, so they are zero
 *     +--------------------+ ARENA_BASE + 64
 *     | block | block | …  |  each: 64-byte header { units uint32, used uint32 }, then the payload
 *     +--------------------+ end of the memory
 *
 * Blocks are multiples of 64 bytes (one cache line). Allocation is first fit over the implicit list, rare
 * (open, close, job start) and serialised by the lock; neighbours are merged while searching.
 */

/** Static data of the WASM module lives below; 64 KiB is far more than the kernels have. */
export const ARENA_BASE = 65536;
const HEADER = 64;
const UNIT = 64;
const WASM_PAGE = 65536;

/** Default size of the arena in bytes: address space, not resident memory. */
export const DEFAULT_ARENA_BYTES = 512 * 1024 * 1024;

export class Arena {
  readonly memory: WasmMemory;
  readonly u8: Uint8Array;
  readonly u16: Uint16Array;
  readonly i32: Int32Array;
  readonly u32: Uint32Array;
  readonly i64: BigInt64Array;
  readonly u64: BigUint64Array;
  readonly f64: Float64Array;
  readonly view: DataView;

  private constructor(memory: WasmMemory) {
    const buffer = memory.buffer;
    this.memory = memory;
    this.u8 = new Uint8Array(buffer);
    this.u16 = new Uint16Array(buffer);
    this.i32 = new Int32Array(buffer);
    this.u32 = new Uint32Array(buffer);
    this.i64 = new BigInt64Array(buffer);
    this.u64 = new BigUint64Array(buffer);
    this.f64 = new Float64Array(buffer);
    this.view = new DataView(buffer);
  }

  /** Makes a new arena of `bytes` bytes (rounded up to 64 KiB, at most 4 GiB - 64 KiB). */
  static create(bytes: number = DEFAULT_ARENA_BYTES): Arena {
    const pages = Math.ceil(bytes / WASM_PAGE);
    if (!(pages >= 4 && pages < 65536)) {
      throw new RangeError(`arena size of ${bytes} bytes is outside 256 KiB to 4 GiB - 64 KiB`);
    }
    const arena = new Arena(new Memory({ initial: pages, maximum: pages, shared: true }));
    const first = ARENA_BASE + HEADER;
    arena.u32[first >> 2] = (arena.u8.length - first) / UNIT;
    arena.u32[(ARENA_BASE + 8) >> 2] = first + HEADER;
    return arena;
  }

  /** The arena of another thread, from its memory. */
  static attach(memory: WasmMemory): Arena {
    return new Arena(memory);
  }

  /**
   * Hands out `bytes` zeroed bytes, 64-byte aligned, until {@link free}.
   *
   * @param purpose names the memory in the error, for example `cluster states of job 'j0'`
   * @throws StillframeError ERR_STILLFRAME_ARENA_EXHAUSTED when the budget does not hold it
   */
  alloc(bytes: number, purpose: string): number {
    if (!Number.isSafeInteger(bytes) || bytes < 0) throw new RangeError(`cannot allocate ${bytes} bytes`);
    const units = Math.ceil(bytes / UNIT) + HEADER / UNIT;
    return withLock(this, ARENA_BASE, () => {
      const u32 = this.u32;
      const end = this.u8.length;
      let block = ARENA_BASE + HEADER;
      while (block < end) {
        let size = this.#units(block);
        if (u32[(block + 4) >> 2] === 0) {
          // Merge free neighbours lazily: free() only marks.
          for (let next = block + size * UNIT; next < end && u32[(next + 4) >> 2] === 0; ) {
            size += this.#units(next);
            next = block + size * UNIT;
          }
          u32[block >> 2] = size;
          if (size >= units) {
            if (size > units) {
              const rest = block + units * UNIT;
              u32[rest >> 2] = size - units;
              u32[(rest + 4) >> 2] = 0;
              u32[block >> 2] = units;
            }
            u32[(block + 4) >> 2] = 1;
            const payload = block + HEADER;
            const payloadEnd = block + units * UNIT;
            const highWater = u32[(ARENA_BASE + 8) >> 2] ?? end;
            // The header of the remainder was written just behind the payload.
            this.u8.fill(0, payload, Math.max(payload, Math.min(payloadEnd, highWater)));
            u32[(ARENA_BASE + 8) >> 2] = Math.max(highWater, Math.min(payloadEnd + HEADER, end));
            return payload;
          }
        }
        block += size * UNIT;
      }
      throw new StillframeError(
        'ERR_STILLFRAME_ARENA_EXHAUSTED',
        `no room for ${bytes} bytes of ${purpose}: the memory budget of ${end} bytes is used up; ` +
          'raise arenaBytes, use larger clusters or run fewer jobs at once',
      );
    });
  }

  /** Gives memory from {@link alloc} back. */
  free(pointer: number): void {
    withLock(this, ARENA_BASE, () => {
      const used = (pointer - HEADER + 4) >> 2;
      if (this.u32[used] !== 1) throw new Error(`arena invariant: ${pointer} is not allocated`);
      this.u32[used] = 0;
    });
  }

  /** Bytes in use, headers included. */
  get usedBytes(): number {
    return withLock(this, ARENA_BASE, () => {
      let used = 0;
      for (let block = ARENA_BASE + HEADER; block < this.u8.length; block += this.#units(block) * UNIT) {
        if (this.u32[(block + 4) >> 2] === 1) used += this.#units(block) * UNIT;
      }
      return used;
    });
  }

  /** A copy of `length` bytes at `pointer`, outside of the shared memory. */
  copyOut(pointer: number, length: number): Uint8Array {
    return this.u8.slice(pointer, pointer + length);
  }

  #units(block: number): number {
    const units = this.u32[block >> 2];
    if (units === undefined || units === 0) throw new Error(`arena invariant: bad block header at ${block}`);
    return units;
  }
}
