import { readFileSync } from 'node:fs';
import { createRequire } from 'node:module';
import { Instance, Module, type WasmImports, type WasmInstance } from '../../kernels/webassembly.js';

/** What the package's module has once it is set up, as Emscripten names it. */
interface ZstdModule {
  instantiateWasm: (imports: WasmImports, ready: (instance: WasmInstance) => void) => unknown;
  readonly HEAPU8: Uint8Array;
  readonly _malloc: (bytes: number) => number;
  readonly _free: (pointer: number) => void;
  readonly _compressBound: (bytes: number) => number;
  /** Bytes of the frame, -1 on failure. */
  readonly _compress: (to: number, capacity: number, from: number, bytes: number, level: number) => number;
  /** Bytes of the content, -1 where the frame is damaged or its content does not fit. */
  readonly _decompress: (to: number, capacity: number, from: number, bytes: number) => number;
}

/** Memory for one call in the module's own heap. */
class HeapBuffer {
  readonly #module: ZstdModule;
  #pointer = 0;
  #capacity = 0;

  constructor(module: ZstdModule) {
    this.#module = module;
  }

  /** @returns a pointer to at least `bytes` bytes, valid until it is asked for more */
  reserve(bytes: number): number {
    if (bytes <= this.#capacity) return this.#pointer;
    if (this.#pointer !== 0) this.#module._free(this.#pointer);
    this.#capacity = 0;
    this.#pointer = this.#module._malloc(bytes);
    if (this.#pointer === 0) throw new RangeError('zstd: out of memory');
    this.#capacity = bytes;
    return this.#pointer;
  }
}

/**
 * The Zstandard library as WebAssembly. Node's own, which Node 20 does not have, is no faster and makes garbage with
 * every cluster. The package sets itself up asynchronously; Emscripten's hook does it at once, since the threads that
 * use it do not return to their event loop in between.
 */
class Zstd {
  readonly #module: ZstdModule;
  readonly #from: HeapBuffer;
  readonly #to: HeapBuffer;

  constructor() {
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
    this.#module = setup as ZstdModule;
    this.#from = new HeapBuffer(this.#module);
    this.#to = new HeapBuffer(this.#module);
  }

  /** @returns one frame, good until the next call */
  compress(input: Uint8Array): Uint8Array {
    const capacity = this.#module._compressBound(input.length);
    const from = this.#from.reserve(input.length);
    const to = this.#to.reserve(capacity);
    this.#module.HEAPU8.set(input, from);
    const bytes = this.#module._compress(to, capacity, from, input.length, LEVEL);
    if (bytes < 0) throw new Error('zstd: the cluster could not be compressed');
    return this.#module.HEAPU8.subarray(to, to + bytes);
  }

  /**
   * @param frame one whole frame
   * @returns its content, good until the next call; undefined where it is damaged or longer than `most` bytes
   */
  decompress(frame: Uint8Array, most: number): Uint8Array | undefined {
    const from = this.#from.reserve(frame.length);
    const to = this.#to.reserve(most);
    this.#module.HEAPU8.set(frame, from);
    const bytes = this.#module._decompress(to, most, from, frame.length);
    return bytes < 0 ? undefined : this.#module.HEAPU8.subarray(to, to + bytes);
  }
}

/** The level that Zstandard takes by itself, and QEMU with it. */
const LEVEL = 3;

let instance: Zstd | undefined;

/** This thread's instance, set up when it is first needed. */
export function zstd(): Zstd {
  instance ??= new Zstd();
  return instance;
}
