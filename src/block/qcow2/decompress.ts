import { createRuntime, type Runtime } from '../../kernels/runtime.js';
import { zstd } from './zstd.js';

/**
 * Decompression of one cluster. The input is what the file holds from the start of the compressed data on: other
 * data may follow the stream. The output is exactly one cluster. Of deflate a stream with more is cut there, of Zstandard
 * it is damaged, both as in QEMU; whatever a stream claims, the memory used stays in proportion to a cluster.
 *
 * @returns the cluster, or undefined where the stream is damaged or yields less than a cluster
 */
export function decompressCluster(
  input: Uint8Array,
  compressionType: number,
  clusterSize: number,
): Uint8Array | undefined {
  if (compressionType === 1) return unzstd(input, clusterSize);
  inflater ??= new Inflater();
  return inflater.inflate(input, clusterSize);
}

// ---- Deflate --------------------------------------------------------------------------------------------------

/** Memory of an {@link Inflater}: the longest compressed data and the largest cluster of the format, and some room. */
const INFLATER_BYTES = 8 * 1024 * 1024;
/** What `inflate` may write behind the cluster. */
const SLACK = 8;

/**
 * Inflates in memory of its own. Node's zlib keeps what belongs to a damaged stream until its thread comes back to its
 * event loop, which a thread that reads image after image does not.
 */
class Inflater {
  readonly #runtime: Runtime = createRuntime(INFLATER_BYTES);
  readonly #work: number;
  #buffer = 0;
  #capacity = 0;

  constructor() {
    this.#work = this.#runtime.arena.alloc(this.#runtime.kernels.inflateWorkspace, 'tables of codes');
  }

  inflate(input: Uint8Array, clusterSize: number): Uint8Array | undefined {
    const { arena, kernels } = this.#runtime;
    const needed = clusterSize + SLACK + input.length;
    if (needed > this.#capacity) {
      if (this.#capacity > 0) arena.free(this.#buffer);
      this.#capacity = 0;
      this.#buffer = arena.alloc(needed, 'compressed data and a cluster');
      this.#capacity = needed;
    }
    const from = this.#buffer + clusterSize + SLACK;
    arena.u8.set(input, from);
    const bytes = kernels.inflate(from, input.length, this.#buffer, clusterSize, this.#work);
    return bytes === clusterSize ? arena.copyOut(this.#buffer, clusterSize) : undefined;
  }
}

/** This thread's, made with the first cluster that needs it. */
let inflater: Inflater | undefined;

// ---- Zstandard ------------------------------------------------------------------------------------------------

const ZSTD_MAGIC = 0xfd2fb528;
/** Largest window of a frame, in bytes; a writer of clusters never needs more than a cluster. */
const MAX_WINDOW = 8 * 1024 * 1024;
/** Bytes of the longest header of a frame. What holds a frame holds more: compressed data is in whole sectors. */
const MAX_ZSTD_HEADER = 18;

/** One frame after the other, until they are a cluster; they have to end with it, as QEMU wants them to. */
function unzstd(input: Uint8Array, clusterSize: number): Uint8Array | undefined {
  const output = new Uint8Array(clusterSize);
  let filled = 0;
  for (let at = 0; filled < clusterSize; ) {
    const rest = input.subarray(at);
    const frame = zstdFrameLength(rest);
    if (frame === undefined) return undefined;
    const content = zstd().decompress(rest.subarray(0, frame), clusterSize - filled);
    if (content === undefined) return undefined;
    output.set(content, filled);
    filled += content.length;
    at += frame;
  }
  return output;
}

/**
 * Bytes of the header of the Zstandard frame at the start of `input` (RFC 8878, section 3.1.1.1), or undefined where
 * there is no frame or one that asks for more memory than {@link MAX_WINDOW}.
 */
function zstdHeaderLength(input: Uint8Array): number | undefined {
  const view = new DataView(input.buffer, input.byteOffset, input.byteLength);
  if (input.length < MAX_ZSTD_HEADER || view.getUint32(0, true) !== ZSTD_MAGIC) return undefined;
  const descriptor = view.getUint8(4);
  const singleSegment = (descriptor & 0x20) !== 0;
  const sizeFlag = descriptor >> 6;
  const idBytes = [0, 1, 2, 4][descriptor & 3] ?? 0;
  const sizeBytes = sizeFlag === 0 ? (singleSegment ? 1 : 0) : 2 ** sizeFlag;
  const sizeAt = 5 + (singleSegment ? 0 : 1) + idBytes;
  // Sizes of one and two bytes are small whatever they say.
  const high = sizeBytes === 8 ? view.getUint32(sizeAt + 4, true) : 0;
  const size = sizeBytes >= 4 ? view.getUint32(sizeAt, true) : 0;
  const window = view.getUint8(5);
  const windowSize = singleSegment ? size : 2 ** (10 + (window >> 3)) * (1 + (window & 7) / 8);
  if (high !== 0 || size > MAX_WINDOW || windowSize > MAX_WINDOW) return undefined;
  return sizeAt + sizeBytes;
}

/** Bytes of the frame at the start of `input`, or undefined where it is none or is cut off. */
function zstdFrameLength(input: Uint8Array): number | undefined {
  const headerLength = zstdHeaderLength(input);
  if (headerLength === undefined) return undefined;
  let at = headerLength;
  for (;;) {
    if (at + 3 > input.length) return undefined;
    const header = (input[at] ?? 0) | ((input[at + 1] ?? 0) << 8) | ((input[at + 2] ?? 0) << 16);
    const runLength = ((header >> 1) & 3) === 1;
    at += 3 + (runLength ? 1 : header >> 3);
    if ((header & 1) !== 0) break;
  }
  if (((input[4] ?? 0) & 4) !== 0) at += 4;
  return at <= input.length ? at : undefined;
}
