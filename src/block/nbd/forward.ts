import type { Duplex } from 'node:stream';

/** Bytes on their way in one direction at which no more are read. */
const MAX_PENDING_BYTES = 4 * 1024 * 1024;

/** As `pipe`, but what comes in one turn of the event loop is sent with one call: records of TLS are small. */
export function forward(from: Duplex, to: Duplex): void {
  let corked = false;
  from.on('data', (bytes: Uint8Array) => {
    if (!corked) {
      corked = true;
      to.cork();
      setImmediate(() => {
        corked = false;
        to.uncork();
      });
    }
    to.write(bytes);
    if (to.writableLength > MAX_PENDING_BYTES) from.pause();
  });
  to.on('drain', () => from.resume());
  from.on('end', () => to.end());
}
