import { readFileSync } from 'node:fs';
import { createRequire } from 'node:module';
import * as zlib from 'node:zlib';
import { Instance, Module, type WasmImports, type WasmInstance } from '../../kernels/webassembly.js';

/**
 * Compresses one cluster as QEMU reads it: raw deflate with a window of 4 KiB, or one Zstandard frame.
 *
 * @param compressionType of the image's header: 0 deflate, 1 Zstandard
 * @returns the compressed data, good until the next call, or undefined where it would not be smaller than the cluster
 */
export function compressCluster(cluster: Uint8Array, compressionType: number): Uint8Array | undefined {
  const output = compressionType === 1 ? zstd(cluster) : deflate(cluster);
  return output.length < cluster.length ? output : undefined;
}

/** One level above zlib's default, which QEMU takes: Node's zlib makes a little more of the default than others do. */
const DEFLATE_LEVEL = 7;

function deflate(cluster: Uint8Array): Uint8Array {
  return zlib.deflateRawSync(cluster, {
    level: DEFLATE_LEVEL,
    windowBits: 12,
    memLevel: 9,
    // What does not compress is a little larger: it comes in two parts then.
    chunkSize: Math.max(1024, cluster.length),
  });
}

type SyncCompressor = (input: Uint8Array) => Uint8Array;

/** Set up with the first cluster that needs it. */
let compressor: SyncCompressor | undefined;

function zstd(cluster: Uint8Array): Uint8Array {
  compressor ??= setUpZstd();
  return compressor(cluster);
}

/** What the package's module has once it is set up, as Emscripten names it. */
interface ZstdModule {
  instantiateWasm: (imports: WasmImports, ready: (instance: WasmInstance) => void) => unknown;
  readonly HEAPU8: Uint8Array;
  readonly _malloc: (bytes: number) => number;
  readonly _free: (pointer: number) => void;
  readonly _compressBound: (bytes: number) => number;
  /** Bytes of the frame, -1 on failure. */
  readonly _compress: (to: number, capacity: number, from: number, bytes: number, level: number) => number;
}

/** The level that Zstandard takes by itself, and QEMU with it. */
const ZSTD_LEVEL = 3;

/**
 * The Zstandard library as WebAssembly. Node's own, which Node 20 does not have, is no faster and makes garbage with
 * every cluster. The package sets itself up asynchronously; Emscripten's hook does it at once, since the threads that
 * compress do not return to their event loop in between.
 */
function setUpZstd(): SyncCompressor {
  const require = createRequire(import.meta.url);
  const code = readFileSync(require.resolve('@foxglove/wasm-zstd/dist/wasm-zstd.wasm'));
  const factory = require('@foxglove/wasm-zstd/dist/wasm-zstd.js') as (module: object) => unknown;
  const setup: Pick<ZstdModule, 'instantiateWasm'> = {
    instantiateWasm: (imports, ready) => {
      const instance = new Instance(new Module(code), imports);
      ready(instance);
      return instance.exports;
    },
  };
  factory(setup);
  // The hook has put everything else there by now.
  const module = setup as ZstdModule;
  let capacity = 0;
  let from = 0;
  let to = 0;
  return (input) => {
    if (input.length > capacity) {
      for (const pointer of [from, to]) if (pointer !== 0) module._free(pointer);
      from = module._malloc(input.length);
      to = module._malloc(module._compressBound(input.length));
      if (from === 0 || to === 0) throw new RangeError('zstd: out of memory');
      capacity = input.length;
    }
    module.HEAPU8.set(input, from);
    const bytes = module._compress(to, module._compressBound(capacity), from, input.length, ZSTD_LEVEL);
    if (bytes < 0) throw new Error('zstd: the cluster could not be compressed');
    return module.HEAPU8.subarray(to, to + bytes);
  };
}
