/** The fastest cipher of TLS 1.3 (of those with the hash that keys are for), and of TLS 1.2. */
export const PSK_SUITES = 'TLS_AES_128_GCM_SHA256';
export const PSK_CIPHERS = 'DHE-PSK-AES128-GCM-SHA256:PSK-AES128-GCM-SHA256:PSK';

/** A key that both sides know, and whose it is. */
export interface Psk {
  readonly identity: string;
  readonly key: Uint8Array;
}

/** The keys of a file with lines `user:hexadecimal key`; what is no such line is passed over. */
export function parsePskFile(text: string): Psk[] {
  return text.split('\n').flatMap((line) => {
    const [, identity, key] = /^([^#:][^:]*):([0-9a-f]{2,})\s*$/i.exec(line) ?? [];
    return identity === undefined || key === undefined ? [] : [{ identity, key: Buffer.from(key, 'hex') }];
  });
}
