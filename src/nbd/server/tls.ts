import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { createSecureContext } from 'node:tls';
import { type Psk, parsePskFile } from '../../block/nbd/psk.js';
import { StillframeError, systemError } from '../../errors.js';

/** With what a server proves who it is; clients without TLS are not served then. */
export type TlsOptions =
  | {
      /** Folder with `server-cert.pem` and `server-key.pem`, and `ca-cert.pem` where clients are verified. */
      readonly certificates: string;
      /** Only clients with a certificate of that authority are served. Default false. */
      readonly verifyPeer?: boolean | undefined;
    }
  | {
      /** File with lines `user:hexadecimal key`: whoever knows one of the keys is served. */
      readonly pskFile: string;
    };

/** The same, as the relay threads get it. */
export type RelaySecrets =
  | { readonly cert: string; readonly key: string; readonly ca: string | undefined }
  | { readonly keys: readonly Psk[] };

/** @throws StillframeError ERR_STILLFRAME_NOT_FOUND, …_PERMISSION, …_INVALID_ARGUMENT (what is in the files) */
export function loadSecrets(options: TlsOptions): RelaySecrets {
  if ('pskFile' in options) {
    const keys = parsePskFile(readText(options.pskFile));
    if (keys.length > 0) return { keys };
    throw invalid(options.pskFile, 'has no key: no line like user:0123456789abcdef');
  }
  const at = (name: string): string => join(options.certificates, name);
  const cert = readText(at('server-cert.pem'));
  const key = readText(at('server-key.pem'));
  const ca = options.verifyPeer === true ? readText(at('ca-cert.pem')) : undefined;
  try {
    createSecureContext({ cert, key, ca });
  } catch (error) {
    throw invalid(
      options.certificates,
      `has no certificate and key that belong together: ${error instanceof Error ? error.message : String(error)}`,
    );
  }
  return { cert, key, ca };
}

function invalid(path: string, what: string): StillframeError {
  return new StillframeError('ERR_STILLFRAME_INVALID_ARGUMENT', `'${path}' ${what}`);
}

function readText(path: string): string {
  try {
    return readFileSync(path, 'utf8');
  } catch (error) {
    throw systemError(`cannot read '${path}'`, error);
  }
}
