import { readFileSync } from 'node:fs';
import { Arena } from './arena.js';
import { Kernels } from './kernels.js';
import { Module, type WasmMemory, type WasmModule } from './webassembly.js';

/** What every thread of an engine has: the shared memory and the kernels that work on it. */
export interface Runtime {
  readonly arena: Arena;
  readonly kernels: Kernels;
}

/** A runtime as it travels to another thread. */
export interface SharedRuntime {
  readonly memory: WasmMemory;
  readonly module: WasmModule;
}

let compiled: WasmModule | undefined;

function kernelModule(): WasmModule {
  compiled ??= new Module(readFileSync(new URL('./kernels.wasm', import.meta.url)));
  return compiled;
}

/** @param arenaBytes size of the shared memory in bytes */
export function createRuntime(arenaBytes?: number): Runtime & { readonly shared: SharedRuntime } {
  const arena = Arena.create(arenaBytes);
  const module = kernelModule();
  return { arena, kernels: new Kernels(arena, module), shared: { memory: arena.memory, module } };
}

export function attachRuntime(shared: SharedRuntime): Runtime {
  const arena = Arena.attach(shared.memory);
  return { arena, kernels: new Kernels(arena, shared.module) };
}
