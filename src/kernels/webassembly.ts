/**
 * The part of the WebAssembly JavaScript API used here. Its global types come with the DOM's, which a Node program
 * need not have: these travel with the package.
 */
export interface WasmMemory {
  readonly buffer: SharedArrayBuffer;
}

/** A compiled module; opaque, and fit to be posted to another thread. */
export interface WasmModule {
  readonly [Symbol.toStringTag]: string;
}

export interface WasmInstance {
  readonly exports: Readonly<Record<string, unknown>>;
}

export type WasmImports = Readonly<Record<string, Readonly<Record<string, unknown>>>>;

interface Api {
  readonly Memory: new (descriptor: { initial: number; maximum: number; shared: true }) => WasmMemory;
  readonly Module: new (bytes: Uint8Array) => WasmModule;
  readonly Instance: new (module: WasmModule, imports: WasmImports) => WasmInstance;
}

export const { Memory, Module, Instance }: Api = Reflect.get(globalThis, 'WebAssembly');
