import type { OpenSsl, TlsChannel } from '../../os/openssl.js';
import type { ServerSockets } from '../../os/server-sockets.js';

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

/** Says good-bye, as far as the client takes it, and frees the channel. Never throws. */
export function closeChannel(tls: OpenSsl, channel: TlsChannel, sockets: ServerSockets, fd: number): void {
  try {
    tls.finish(channel);
    sendOutNow(tls, channel, sockets, fd);
  } catch {
    // The client is gone already.
  }
  tls.free(channel);
}
