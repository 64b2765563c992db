import { readFileSync } from 'node:fs';
import { Arena } from './arena.js';
import { Kernels } from './kernels.js';

/** What every thread of an engine has: the shared memory and the kernels that work on it. */
export interface Runtime {
  readonly arena: Arena;
  readonly kernels: Kernels;
}

/** A runtime as it travels to another thread. */
export interface SharedRuntime {
  readonly memory: WebAssembly.Memory;
  readonly module: WebAssembly.Module;
}

let compiled: WebAssembly.Module | undefined;

function kernelModule(): WebAssembly.Module {
  compiled ??= new WebAssembly.Module(readFileSync(new URL('./kernels.wasm', import.meta.url)));
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
