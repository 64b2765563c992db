import { StillframeError } from '../../errors.js';
import { type OpenSsl, requireOpenSsl } from '../../os/openssl.js';
import { PSK_CIPHERS, type Psk, readAuthorities, readCertificate, readPskFile } from '../credentials.js';

/** With what a server proves who it is; clients without TLS are not served then. */
export type TlsOptions =
  | {
      /** Folder with `server-cert.pem` and `server-key.pem`, and `ca-cert.pem` where clients are verified. */
      readonly certificates: string;
      /** Only clients with a certificate of that authority are served. Default false. */
      readonly verifyPeer?: boolean | undefined;
      /** What `server-key.pem` is encrypted with. */
      readonly passphrase?: string | undefined;
    }
  | {
      /** File with lines `user:hexadecimal key`: whoever knows one of the keys is served. */
      readonly pskFile: string;
    };

/** What the listener thread needs for it. */
export interface ListenerTls {
  /** As {@link OpenSsl.createContext} makes it. */
  readonly context: number;
  /** Keys of those who are served; none: those with certificates are. */
  readonly keys: readonly Psk[];
}

const CIPHERS = {
  suites: 'TLS_AES_128_GCM_SHA256:TLS_AES_256_GCM_SHA384',
  ciphers: 'ECDHE+AESGCM:ECDHE+CHACHA20',
};

/** TLS in the thread that carries handshakes out. */
export interface TlsHandshakes {
  readonly openSsl: OpenSsl;
  readonly context: number;
  /** No handshake may follow. */
  end(): void;
}

/**
 * @returns what the server has to give back with {@link releaseTls} in the end
 * @throws StillframeError ERR_STILLFRAME_UNSUPPORTED_FEATURE, ERR_STILLFRAME_NOT_FOUND, …_PERMISSION, …_INVALID_ARGUMENT (what is in the files)
 */
export function prepareTls(options: TlsOptions): ListenerTls {
  const { createContext } = requireOpenSsl();
  if ('pskFile' in options) {
    const keys = readPskFile(options.pskFile);
    if (keys.length === 0) {
      throw invalid(options.pskFile, 'has no key: no line like user:0123456789abcdef');
    }
    const settings = {
      endpoint: 'server',
      ...PSK_CIPHERS,
      certificate: undefined,
      authorities: undefined,
    } as const;
    return { context: createContext(settings), keys };
  }
  const { certificates, verifyPeer, passphrase } = options;
  try {
    const certificate = readCertificate(certificates, 'server', passphrase);
    const authorities = verifyPeer === true ? readAuthorities(certificates) : undefined;
    return {
      context: createContext({ endpoint: 'server', ...CIPHERS, certificate, authorities }),
      keys: [],
    };
  } catch (error) {
    if (error instanceof StillframeError) throw error;
    throw invalid(
      certificates,
      `has no certificate and key that belong together: ${error instanceof Error ? error.message : String(error)}`,
    );
  }
}

export function releaseTls({ context }: ListenerTls): void {
  requireOpenSsl().freeContext(context);
}

export function attachTls({ context, keys }: ListenerTls): TlsHandshakes {
  const tls = requireOpenSsl();
  const known = new Map(keys.map(({ identity, key }) => [identity, key]));
  const end = known.size === 0 ? undefined : tls.answerKeys(context, (identity) => known.get(identity));
  return { openSsl: tls, context, end: () => end?.() };
}

function invalid(path: string, what: string): StillframeError {
  return new StillframeError('ERR_STILLFRAME_INVALID_ARGUMENT', `'${path}' ${what}`);
}
