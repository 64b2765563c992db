import type { OpenSsl, TlsChannel } from './openssl.js';
import type { ServerSockets } from './server-sockets.js';

/** Data of a record of TLS at most, in bytes. */
const RECORD_BYTES = 16 * 1024;

/** The channel whose addresses are two words of memory; undefined: 0 says that there is none. @param at bytes */
export function loadChannel(words: Float64Array, at: number): TlsChannel | undefined {
  const [ssl = 0, network = 0] = words.subarray(at / 8, at / 8 + 2);
  return ssl === 0 ? undefined : { ssl, network };
}

/** Puts the addresses of a channel where {@link loadChannel} finds them. */
export function storeChannel(words: Float64Array, at: number, channel: TlsChannel | undefined): void {
  words.set([channel?.ssl ?? 0, channel?.network ?? 0], at / 8);
}

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

/** Says that nothing more will be sent, as far as the other one takes it at once. */
export function sayGoodbye(tls: OpenSsl, channel: TlsChannel, sockets: ServerSockets, fd: number): void {
  tls.finish(channel);
  sendOutNow(tls, channel, sockets, fd);
}

/** Says good-bye and frees the channel. Never throws. */
export function closeChannel(tls: OpenSsl, channel: TlsChannel, sockets: ServerSockets, fd: number): void {
  try {
    sayGoodbye(tls, channel, sockets, fd);
  } catch {
    // The other one is gone already.
  }
  tls.free(channel);
}
