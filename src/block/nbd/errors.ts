import { StillframeError } from '../../errors.js';

/** The server broke the rules of the protocol: nothing that it says can be relied on. */
export function protocolError(name: string, what: string): StillframeError {
  return new StillframeError(
    'ERR_STILLFRAME_NBD_PROTOCOL',
    `'${name}': the server does not keep to the NBD protocol: ${what}`,
  );
}

/** There is no connection, or not any more. */
export function connectionError(name: string, what: string, cause?: unknown): StillframeError {
  return new StillframeError(
    'ERR_STILLFRAME_NBD_CONNECTION',
    `'${name}': ${what}; see that the server runs and can be reached`,
    { cause },
  );
}

/** The server does not give what was asked for, and said so. */
export function refusedError(name: string, what: string): StillframeError {
  return new StillframeError('ERR_STILLFRAME_NBD_REFUSED', `'${name}': ${what}`);
}

/** Text of a server, fit for a message: one line without control characters, not too long. */
export function serverText(bytes: Uint8Array): string {
  const text = new TextDecoder().decode(bytes.subarray(0, 1024)).replace(/\p{C}+/gu, ' ');
  return text.length > 200 ? `${text.slice(0, 200)}…` : text;
}

/** Client and server do not agree on TLS, or do not trust each other. */
export function untrustedError(name: string, what: string): StillframeError {
  return refusedError(name, `no TLS with the server: ${what}`);
}
