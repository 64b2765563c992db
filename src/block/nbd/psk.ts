/** TLS 1.3 first; the fastest cipher of each version. */
export const PSK_CIPHERS = 'TLS_AES_128_GCM_SHA256:DHE-PSK-AES128-GCM-SHA256:PSK-AES128-GCM-SHA256:PSK';

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
