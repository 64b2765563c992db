import type { Arena } from '../../kernels/arena.js';
import { advance, load, store, withLock } from '../../kernels/futex.js';
import { sockets } from '../../os/sockets.js';
import type { NbdDescriptor } from '../node.js';

/**
 * The connections to one export, shared by all threads. A thread takes one for itself, makes any number of requests and
 * gives it back; further connections are made when all are taken and the server allows several.
 *
 *     +0   lock         int32   held for taking and giving back
 *     +4   sequence     int32   advanced when a connection may have become free
 *     +8   interrupted  int32   nobody is to wait for this export any more
 *     +12  mutations    int32   counts changes that were asked for: what was known of the block status is void
 *     +16  edge lock    int32   held while a block is read, changed in part and written back
 *     +20  lost         int32   a connection was lost after writes that were not made durable
 *     +24  limit        int32   most connections
 *     +28  open         int32   connections that are there or being made
 *     +32  written      float64 counts writes that were carried out
 *     +40  flushed      float64 the number of those that are durable
 *     +48  leaving      int32   nobody waits for the server to come back any more, or for long for an answer
 *     +64  slots        16 × 72 bytes: one for each connection
 *
 * A slot:
 *
 *     +0  state     int32   see FREE
 *     +4  fd        int32   -1 while there is none
 *     +8  fd lock   int32   held while the descriptor is closed or shut down
 *     +12 owner     int32   mark of whoever has it; 0 nobody's
 *     +16 cookie    uint32  no request with this one or a later one was made
 *     +20 headers   int32   index into HEADERS
 *     +24 contexts  6 × int32  numbers of the contexts of the descriptor, -1 where the server has it not
 *     +48 ready     int32   1 while there is a connection that requests can be made on
 *     +56 channel   2 × float64: addresses of what speaks TLS with the server; 0: nothing does
 */
export const SEQUENCE = 4;
export const INTERRUPTED = 8;
export const MUTATIONS = 12;
export const EDGE_LOCK = 16;
export const LOST = 20;
export const LIMIT = 24;
export const OPEN = 28;
export const WRITTEN = 32;
export const FLUSHED = 40;
export const LEAVING = 48;
export const SLOTS = 64;
export const SLOT_BYTES = 72;
export const MAX_CONNECTIONS = 16;
/** Contexts that a descriptor can have, `base:allocation` included. */
export const MAX_CONTEXTS = 6;
export const CONTROL_BYTES = SLOTS + MAX_CONNECTIONS * SLOT_BYTES;

export const STATE = 0;
export const FD = 4;
export const FD_LOCK = 8;
export const OWNER = 12;
export const COOKIE = 16;
export const HEADERS_AT = 20;
export const CONTEXTS = 24;
export const READY = 48;
export const CHANNEL = 56;

/** The export is about to be closed: nobody waits for a server that is gone to come back, or for long for one that hangs. */
export function leaveNbd(arena: Arena, { control }: NbdDescriptor): void {
  store(arena, control + LEAVING, 1);
}

/**
 * Ends the requests that threads wait for, at once. For the host thread: it takes no lock that is held for long.
 *
 * @param mark of the owner whose requests are ended, unless those under way are still to be answered; without it
 *   everybody's, and nothing can be done with the export any more but close it
 */
export function interruptNbd(arena: Arena, { control, target }: NbdDescriptor, mark?: number): void {
  if (mark === undefined) store(arena, control + INTERRUPTED, 1);
  const cut = mark === undefined || target.cut;
  for (let index = 0; cut && index < MAX_CONNECTIONS; index++) {
    const at = control + SLOTS + index * SLOT_BYTES;
    if (mark !== undefined && load(arena, at + OWNER) !== (mark | 0)) continue;
    withLock(arena, at + FD_LOCK, () => {
      const fd = load(arena, at + FD);
      if (fd >= 0) sockets()?.shutdown(fd);
    });
  }
  advance(arena, control + SEQUENCE);
}
