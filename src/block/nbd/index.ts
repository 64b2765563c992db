import { StillframeError } from '../../errors.js';
import type { Runtime } from '../../kernels/runtime.js';
import { EXPORT } from '../../nbd/protocol/numbers.js';
import type { NbdDescriptor } from '../node.js';
import { allocateConnections, Connections } from './connections.js';
import { MAX_CONTEXTS } from './control.js';
import { Exchange } from './exchange.js';
import { contextNames, NbdNode } from './node.js';
import { nbdIdentity, parseNbdName } from './uri.js';

export { NbdNode } from './node.js';
export { type Owner, workingFor } from './owner.js';

/**
 * Connects to an export.
 *
 * @throws StillframeError ERR_STILLFRAME_INVALID_ARGUMENT (the name), …_NBD_CONNECTION (the server cannot be reached, or
 *   does not answer in time), …_NBD_REFUSED (it has no such export, or wants TLS), …_NBD_PROTOCOL, …_READ_ONLY,
 *   …_BITMAP_NOT_FOUND (`x-dirty-bitmap`), …_UNSUPPORTED_FEATURE
 */
export function openNbd(
  runtime: Runtime,
  name: string,
  options: { readonly readOnly: boolean; readonly passphrase?: string | undefined },
): NbdDescriptor {
  const { readOnly, passphrase } = options;
  const parsed = parseNbdName(name);
  const target = { ...parsed, tls: parsed.tls && { ...parsed.tls, passphrase } };
  const contexts = contextNames(target.contexts);
  if (contexts.length > MAX_CONTEXTS) throw new RangeError(`more than ${MAX_CONTEXTS} metadata contexts`);
  const control = allocateConnections(runtime.arena, name);
  const connections = new Connections(runtime.arena, {
    path: name,
    target,
    agreed: undefined,
    contexts,
    control,
  });
  try {
    const session = connections.open();
    const { length, minBlock, maxBlock, flags } = session;
    const missing = target.contexts.find((context) => !session.contexts.has(context));
    if (missing !== undefined) {
      throw new StillframeError(
        'ERR_STILLFRAME_BITMAP_NOT_FOUND',
        `'${name}': the server does not have '${missing}'; see 'nbdinfo --list' for what it has`,
      );
    }
    if (!readOnly && (flags & EXPORT.readOnly) !== 0) {
      throw new StillframeError(
        'ERR_STILLFRAME_READ_ONLY',
        `'${name}': the server lets nobody write to this export; serve it writable`,
      );
    }
    return {
      driver: 'nbd',
      path: name,
      readOnly,
      target,
      length,
      minBlock,
      maxBlock,
      flags,
      contexts: contexts.map((context) => session.contexts.has(context)),
      control,
      identity: nbdIdentity(target),
    };
  } catch (error) {
    connections.close(() => undefined);
    throw error;
  }
}

/** This thread's facade of an export. */
export function attachNbd(runtime: Runtime, descriptor: NbdDescriptor): NbdNode {
  return new NbdNode(runtime, descriptor);
}

/** Takes leave of the server. No thread may use a facade of the export any more. Nothing is flushed. */
export function closeNbd(runtime: Runtime, descriptor: NbdDescriptor): void {
  const { path, target, length, control, flags } = descriptor;
  const contexts = contextNames(target.contexts);
  const connections = new Connections(runtime.arena, {
    path,
    target,
    agreed: { ...descriptor, flags },
    contexts,
    control,
  });
  connections.close((taken) => {
    const session = { headers: taken.headers, length };
    new Exchange(path, taken.stream, session, target.timeoutMs, connections.cookie(taken)).disconnect();
  });
}
