import type { OpenSsl, TlsChannel } from './openssl.js';
import type { ServerSockets } from './server-sockets.js';

/** Data of a record of TLS at most, in bytes. */
const RECORD_BYTES = 16 * 1024;

/** Sends of what there is to send as much as the socket takes without waiting. @returns whether that was all */
export function sendOutNow(tls: OpenSsl, channel: TlsChannel, sockets: ServerSockets, fd: number): boolean {
  for (;;) {
    const { address, length } = tls.output(channel);
    if (length === 0) return true;
    const sent = sockets.sendNow(fd, address, length);
    if (sent === 0) return false;
    tls.tookOut(channel, sent);
  }
}

/**
 * Waits for what comes next, and puts it where {@link OpenSsl.input} says; {@link OpenSsl.putIn} is left to the caller.
 *
 * @param toCome so much data at least the other one still has to send, or is sending
 * @returns as {@link ServerSockets.receiveAll}
 */
export function receiveInput(
  tls: OpenSsl,
  channel: TlsChannel,
  sockets: ServerSockets,
  fd: number,
  toCome: number,
): number | undefined {
  const { address, length } = tls.input(channel);
  const sure = Math.min(length, toCome - RECORD_BYTES);
  // Of a part of a record that was taken already as much is missing from what comes.
  return sure > RECORD_BYTES
    ? sockets.receiveAll(fd, address, sure)
    : sockets.receiveTo(fd, address, length, true);
}

/** Says good-bye, as far as the other one takes it, and frees the channel. Never throws. */
export function closeChannel(tls: OpenSsl, channel: TlsChannel, sockets: ServerSockets, fd: number): void {
  try {
    tls.finish(channel);
    sendOutNow(tls, channel, sockets, fd);
  } catch {
    // The other one is gone already.
  }
  tls.free(channel);
}
