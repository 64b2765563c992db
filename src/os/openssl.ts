import { StillframeError } from '../errors.js';
import { throughFfi } from './ffi.js';
import { type Koffi, loadKoffi } from './sockets.js';

/**
 * The OpenSSL that Node has in itself, for threads that block: Node's own TLS needs an event loop. It never touches a
 * socket here: what it wants to send, and what has come for it, passes through a pair of rings in memory. Objects are
 * numbers (addresses), so that threads can pass them on; one {@link TlsChannel} must not be used by two threads at once.
 */
export interface OpenSsl {
  /** What connections have in common. @throws TlsError what is wrong with the certificates */
  createContext(settings: TlsSettings): number;
  /** Channels that were made of it stay good. */
  freeContext(context: number): void;
  /**
   * Asks `keyOf` for the keys of clients in handshakes, which only this thread may carry out from then on.
   *
   * @returns ends it: no handshake may follow
   */
  answerKeys(context: number, keyOf: (identity: string) => Uint8Array | undefined): () => void;
  /**
   * Has the server know a client by its key. Handshakes are for this thread alone.
   *
   * @returns ends it: no handshake may follow
   */
  giveKey(context: number, identity: string, key: Uint8Array): () => void;
  /** The server's end of a connection, before its handshake, which the first reads carry out. */
  open(context: number): TlsChannel;
  /**
   * The client's end of a connection, before its {@link OpenSsl.handshake}.
   *
   * @param hostname what the server's certificate has to be for, where certificates are verified
   * @throws TlsError
   */
  openClient(context: number, hostname: Hostname): TlsChannel;
  /** @returns 1 once it is done, otherwise as {@link OpenSsl.read} @throws TlsError; there may be something to send of it */
  handshake(channel: TlsChannel): number;
  /** Why the other one's certificate is not trusted; undefined where nothing is wrong with it. */
  distrust(channel: TlsChannel): string | undefined;
  /** Nobody may use it any more. */
  free(channel: TlsChannel): void;
  /**
   * Decrypts what has come.
   *
   * @returns the bytes read, {@link TLS_END}, {@link TLS_NEEDS_INPUT} or {@link TLS_NEEDS_ROOM}
   * @throws TlsError where the other one breaks the rules or is not trusted; there may be something to send of it
   */
  read(channel: TlsChannel, bytes: Uint8Array): number;
  /** The same, to an address. */
  readTo(channel: TlsChannel, address: number, length: number): number;
  /**
   * Encrypts what is to be sent. Where that needs room, some was taken: send what there is and call it again with the
   * same bytes.
   *
   * @returns `length`, or {@link TLS_NEEDS_ROOM}
   * @throws TlsError
   */
  write(channel: TlsChannel, bytes: Uint8Array): number;
  writeFrom(channel: TlsChannel, address: number, length: number): number;
  /** Says that nothing more will be written, in what is to be sent. */
  finish(channel: TlsChannel): void;
  /** Whether something has come that was not read, perhaps only a part of what could be. */
  hasPending(channel: TlsChannel): boolean;
  /** Where what comes next is to be put, and how much at most. Only whoever reads may use it. */
  input(channel: TlsChannel): Ring;
  /** So much was put there. */
  putIn(channel: TlsChannel, bytes: number): void;
  /** What is to be sent, or a part of it: length 0: nothing. */
  output(channel: TlsChannel): Ring;
  /** So much of it was sent. */
  tookOut(channel: TlsChannel, bytes: number): void;
}

export interface TlsChannel {
  /** Address of the `SSL`. */
  readonly ssl: number;
  /** Address of the `BIO` of our end of the rings. */
  readonly network: number;
}

export interface Ring {
  readonly address: number;
  readonly length: number;
}

/** A name, or a numerical address. */
export type Hostname = { readonly name: string } | { readonly ip: string };

/** In PEM: a certificate with those up to the authority's, and its key without a passphrase. */
export interface Certificate {
  readonly chain: string;
  readonly key: string;
}

export interface TlsSettings {
  readonly endpoint: 'server' | 'client';
  /** TLS 1.3. */
  readonly suites: string;
  /** TLS 1.2. */
  readonly ciphers: string;
  /** Ours. Undefined: keys that both know, or none. */
  readonly certificate: Certificate | undefined;
  /**
   * PEM: the others need a certificate of one of these; empty: no certificate will do, only a key that both know.
   * Undefined: whatever they have or not.
   */
  readonly authorities: string | undefined;
}

/** The other one has said that nothing more will come. */
export const TLS_END = 0;
/** Nothing more can be read of what has come. */
export const TLS_NEEDS_INPUT = -1;
/** Something has to be sent first. */
export const TLS_NEEDS_ROOM = -2;

/** What OpenSSL says that is wrong. */
export class TlsError extends Error {}

/**
 * Sizes of the rings: of what is to be sent, a few records of TLS, which have up to 16 KiB of data each and some more.
 * With fewer a thread is woken more often, with more they do not stay in the processor's cache.
 */
const OUTPUT_BYTES = 8 * 16640;
const INPUT_BYTES = 128 * 1024;

/** AES-GCM is good for 2^24.5 records with one key (RFC 8446, 5.5), of up to 16 KiB: twice this, and more. */
const RENEW_BYTES = 2 ** 37;
/** What a record has beside its data at most, in bytes. */
const MOST_ADDED = 40;

const TLS1_2_VERSION = 0x0303;
const SSL_ERROR_WANT_READ = 2;
const SSL_ERROR_WANT_WRITE = 3;
const SSL_ERROR_ZERO_RETURN = 6;
const SSL_OP_NO_TICKET = 1 << 14;
const SSL_OP_NO_COMPRESSION = 1 << 17;
const SSL_OP_CIPHER_SERVER_PREFERENCE = 1 << 22;
const SSL_OP_NO_RENEGOTIATION = 1 << 30;
const SSL_KEY_UPDATE_NOT_REQUESTED = 0;
const SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER = 2;
const SSL_CTRL_MODE = 33;
const SSL_CTRL_SET_SESS_CACHE_MODE = 44;
const SSL_CTRL_SET_TLSEXT_HOSTNAME = 55;
const SSL_CTRL_CHAIN_CERT = 89;
const SSL_CTRL_SET_DH_AUTO = 118;
const SSL_CTRL_SET_MIN_PROTO_VERSION = 123;
const X509_CHECK_FLAG_NO_PARTIAL_WILDCARDS = 4;
const SSL_VERIFY_PEER = 1;
const SSL_VERIFY_FAIL_IF_NO_PEER_CERT = 2;

/** Its word for that there is nothing more in a text. */
const END_OF_PEM = 'no start line';

/** The first with all that is called: 1.1.1. */
const OLDEST_VERSION = 0x10101000;

/**
 * Loads it.
 *
 * @param renewBytes what is sent with one key, if there are others (TLS 1.3)
 * @throws Error where there is none that can be called
 */
export function loadOpenSsl(renewBytes = RENEW_BYTES): OpenSsl {
  const koffi: Koffi = loadKoffi();
  const lib = koffi.load(null);
  const number = (prototype: string): ((...args: unknown[]) => number) => {
    const call = lib.func(prototype);
    return (...args) => Number(call(...args));
  };
  const version = number('size_t OpenSSL_version_num()');
  if (version() < OLDEST_VERSION) throw new Error('too old');
  const clearErrors = lib.func('void ERR_clear_error()');
  const peekError = number('size_t ERR_peek_last_error()');
  const reason = lib.func('const char *ERR_reason_error_string(size_t code)');
  const serverMethod = number('size_t TLS_server_method()');
  const clientMethod = number('size_t TLS_client_method()');
  const newContext = number('size_t SSL_CTX_new(size_t method)');
  const freeContext = lib.func('void SSL_CTX_free(size_t context)');
  const contextControl = number(
    'int64 SSL_CTX_ctrl(size_t context, int command, int64 value, size_t pointer)',
  );
  const setOptions = lib.func('uint64 SSL_CTX_set_options(size_t context, uint64 options)');
  const setTickets = number('int SSL_CTX_set_num_tickets(size_t context, size_t count)');
  const setSuites = number('int SSL_CTX_set_ciphersuites(size_t context, const char *suites)');
  const setCiphers = number('int SSL_CTX_set_cipher_list(size_t context, const char *ciphers)');
  const useCertificate = number('int SSL_CTX_use_certificate(size_t context, size_t certificate)');
  const useKey = number('int SSL_CTX_use_PrivateKey(size_t context, size_t key)');
  const checkKey = number('int SSL_CTX_check_private_key(size_t context)');
  const setVerify = lib.func('void SSL_CTX_set_verify(size_t context, int mode, size_t callback)');
  const storeOf = number('size_t SSL_CTX_get_cert_store(size_t context)');
  const addToStore = number('int X509_STORE_add_cert(size_t store, size_t certificate)');
  const addAuthority = number('int SSL_CTX_add_client_CA(size_t context, size_t certificate)');
  const setPskCallback = lib.func('void SSL_CTX_set_psk_server_callback(size_t context, void *callback)');
  const setPskClient = lib.func('void SSL_CTX_set_psk_client_callback(size_t context, void *callback)');
  const memoryMethod = number('size_t BIO_s_mem()');
  const newBio = number('size_t BIO_new(size_t method)');
  const freeBio = number('int BIO_free(size_t bio)');
  const writeBio = number('int BIO_write(size_t bio, void *bytes, int length)');
  const readCertificate = number(
    'size_t PEM_read_bio_X509(size_t bio, size_t to, size_t callback, const char *password)',
  );
  const readKey = number(
    'size_t PEM_read_bio_PrivateKey(size_t bio, size_t to, size_t callback, const char *password)',
  );
  const freeCertificate = lib.func('void X509_free(size_t certificate)');
  const freeKey = lib.func('void EVP_PKEY_free(size_t key)');
  const newPair = number('int BIO_new_bio_pair(void *one, size_t oneBytes, void *other, size_t otherBytes)');
  const peekOut = lib.func('int BIO_nread0(size_t bio, void *address)');
  const takeOut = lib.func('int BIO_nread(size_t bio, void *address, int length)');
  const peekIn = lib.func('int BIO_nwrite0(size_t bio, void *address)');
  const putIn = lib.func('int BIO_nwrite(size_t bio, void *address, int length)');
  const pendingIn = number('size_t BIO_ctrl_pending(size_t bio)');
  const newSsl = number('size_t SSL_new(size_t context)');
  const freeSsl = lib.func('void SSL_free(size_t ssl)');
  const setBio = lib.func('void SSL_set_bio(size_t ssl, size_t read, size_t write)');
  const bioOf = number('size_t SSL_get_rbio(size_t ssl)');
  const accept = lib.func('void SSL_set_accept_state(size_t ssl)');
  const connect = lib.func('void SSL_set_connect_state(size_t ssl)');
  const handshake = lib.func('int SSL_do_handshake(size_t ssl)');
  const setServerName = number('int64 SSL_ctrl(size_t ssl, int command, int64 value, const char *name)');
  const setHost = number('int SSL_set1_host(size_t ssl, const char *name)');
  const setHostFlags = lib.func('void SSL_set_hostflags(size_t ssl, unsigned int flags)');
  const verificationOf = number('size_t SSL_get0_param(size_t ssl)');
  const setIp = number('int X509_VERIFY_PARAM_set1_ip_asc(size_t param, const char *ip)');
  const verified = number('int64 SSL_get_verify_result(size_t ssl)');
  const verifyText = lib.func('const char *X509_verify_cert_error_string(int64 code)');
  const read = lib.func('int SSL_read(size_t ssl, void *bytes, int length)');
  const readTo = lib.func('int SSL_read(size_t ssl, size_t address, int length)');
  const write = lib.func('int SSL_write(size_t ssl, void *bytes, int length)');
  const writeFrom = lib.func('int SSL_write(size_t ssl, size_t address, int length)');
  const sentSoFar = number('uint64 BIO_number_written(size_t bio)');
  const renewKey = number('int SSL_key_update(size_t ssl, int kind)');
  const errorOf = number('int SSL_get_error(size_t ssl, int result)');
  const shutdown = number('int SSL_shutdown(size_t ssl)');
  const hasPending = number('int SSL_has_pending(size_t ssl)');
  const copyTo = lib.func('void *memcpy(size_t to, void *from, size_t length)');

  /** What went wrong last; nothing of it is left for the next call. */
  const failure = (otherwise: string): TlsError => {
    const code = peekError();
    const text = code === 0 ? null : reason(code);
    clearErrors();
    return new TlsError(typeof text === 'string' ? text : otherwise);
  };
  const check = (result: number, what: string): void => {
    if (result <= 0) throw failure(what);
  };
  const withBytes = <T>(bytes: Uint8Array, body: (bio: number) => T): T => {
    const bio = newBio(memoryMethod());
    try {
      check(writeBio(bio, bytes, bytes.length), 'out of memory');
      return body(bio);
    } finally {
      freeBio(bio);
    }
  };
  const certificatesOf = (pem: string, body: (certificate: number, index: number) => void): number =>
    withBytes(new TextEncoder().encode(pem), (bio) => {
      for (let count = 0; ; count++) {
        const certificate = readCertificate(bio, 0, 0, '');
        if (certificate === 0) {
          // The end of the text is an error to it, too.
          const error = failure(END_OF_PEM);
          if (error.message === END_OF_PEM) return count;
          throw error;
        }
        try {
          body(certificate, count);
        } finally {
          freeCertificate(certificate);
        }
      }
    });
  const useChain = (context: number, chain: string): void => {
    const count = certificatesOf(chain, (certificate, index) => {
      // The second adds a reference, as the first does.
      if (index === 0) check(useCertificate(context, certificate), 'the certificate cannot be used');
      else check(contextControl(context, SSL_CTRL_CHAIN_CERT, 1, certificate), 'the chain cannot be used');
    });
    if (count === 0) throw new TlsError('there is no certificate');
  };
  const usePrivateKey = (context: number, pem: string): void =>
    withBytes(new TextEncoder().encode(pem), (bio) => {
      // With an empty password nobody is asked for one.
      const key = readKey(bio, 0, 0, '');
      if (key === 0) throw failure('there is no key');
      try {
        check(useKey(context, key), 'the key cannot be used');
        check(checkKey(context), 'the key does not belong to the certificate');
      } finally {
        freeKey(key);
      }
    });
  const trust = (context: number, authorities: string): void => {
    const store = storeOf(context);
    const count = certificatesOf(authorities, (certificate) => {
      check(addToStore(store, certificate), 'the authority cannot be used');
      check(addAuthority(context, certificate), 'the authority cannot be used');
    });
    if (count === 0) throw new TlsError('there is no certificate of an authority');
  };
  const addressWord = new BigUint64Array(1);
  const otherWord = new BigUint64Array(1);
  /** What became of a call: `result` above 0, or what it says of the rest. */
  const outcome = (ssl: number, result: number): number => {
    if (result > 0) return result;
    switch (errorOf(ssl, result)) {
      case SSL_ERROR_WANT_READ:
        return TLS_NEEDS_INPUT;
      case SSL_ERROR_WANT_WRITE:
        return TLS_NEEDS_ROOM;
      case SSL_ERROR_ZERO_RETURN:
        return TLS_END;
      default:
        throw failure('the rules of TLS were broken');
    }
  };
  const openWith = (context: number): TlsChannel => {
    const ssl = newSsl(context);
    if (ssl === 0) throw failure('out of memory');
    if (newPair(addressWord, OUTPUT_BYTES, otherWord, INPUT_BYTES) <= 0) {
      freeSsl(ssl);
      throw failure('out of memory');
    }
    const inner = Number(addressWord[0]);
    setBio(ssl, inner, inner);
    return { ssl, network: Number(otherWord[0]) };
  };
  const free = ({ ssl, network }: TlsChannel): void => {
    freeSsl(ssl);
    freeBio(network);
    clearErrors();
  };
  /** @param prototype what OpenSSL calls @returns takes the callback away */
  const callBack = (
    context: number,
    set: (context: number, callback: bigint | null) => unknown,
    prototype: unknown,
    answer: (...args: never[]) => number,
  ): (() => void) => {
    const callback = koffi.register(answer, koffi.pointer(prototype));
    set(context, callback);
    return () => {
      set(context, null);
      koffi.unregister(callback);
    };
  };
  /** Other keys for what is sent next, now and then. @param length of what was written last */
  const renewed = (ssl: number, length: number, written: number): number => {
    if (written !== length) return written;
    // Whether the last write went past the next multiple: some bytes are about data, which may make it once too often.
    const sent = sentSoFar(bioOf(ssl));
    if (sent < renewBytes || sent % renewBytes > length + MOST_ADDED * Math.ceil(length / 16384))
      return written;
    // With TLS 1.2 there is no other key.
    if (renewKey(ssl, SSL_KEY_UPDATE_NOT_REQUESTED) <= 0) clearErrors();
    return written;
  };
  return {
    createContext({ endpoint, suites, ciphers, certificate, authorities }) {
      clearErrors();
      const context = newContext(endpoint === 'server' ? serverMethod() : clientMethod());
      if (context === 0) throw failure('out of memory');
      try {
        const options = SSL_OP_NO_COMPRESSION | SSL_OP_NO_RENEGOTIATION | SSL_OP_CIPHER_SERVER_PREFERENCE;
        setOptions(context, options | SSL_OP_NO_TICKET);
        check(contextControl(context, SSL_CTRL_SET_MIN_PROTO_VERSION, TLS1_2_VERSION, 0), 'no TLS 1.2');
        contextControl(context, SSL_CTRL_MODE, SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER, 0);
        contextControl(context, SSL_CTRL_SET_SESS_CACHE_MODE, 0, 0);
        check(setTickets(context, 0), 'tickets cannot be turned off');
        check(setSuites(context, suites), 'no such ciphers');
        check(setCiphers(context, ciphers), 'no such ciphers');
        if (certificate !== undefined) {
          useChain(context, certificate.chain);
          usePrivateKey(context, certificate.key);
        } else if (endpoint === 'server') {
          // Without it the keys of old connections could be found from the shared one, with TLS 1.2.
          check(contextControl(context, SSL_CTRL_SET_DH_AUTO, 1, 0), 'no Diffie-Hellman');
        }
        if (authorities !== undefined) {
          if (authorities !== '') trust(context, authorities);
          setVerify(context, SSL_VERIFY_PEER | SSL_VERIFY_FAIL_IF_NO_PEER_CERT, 0);
        }
        return context;
      } catch (error) {
        freeContext(context);
        throw error;
      }
    },
    freeContext(context) {
      freeContext(context);
    },
    answerKeys(context, keyOf) {
      const prototype = koffi.proto('uint', ['size_t', 'const char *', 'size_t', 'uint']);
      const answer = (_ssl: number, identity: string | null, to: number | bigint, most: number): number => {
        try {
          const key = identity === null ? undefined : keyOf(identity);
          if (key === undefined || key.length > most) return 0;
          copyTo(to, key, key.length);
          return key.length;
        } catch {
          return 0;
        }
      };
      return callBack(context, setPskCallback, prototype, answer);
    },
    giveKey(context, identity, key) {
      const prototype = koffi.proto('uint', ['size_t', 'const char *', 'size_t', 'uint', 'size_t', 'uint']);
      const name = new TextEncoder().encode(`${identity}\0`);
      type Pointer = number | bigint;
      const answer = (
        _ssl: Pointer,
        _hint: string | null,
        nameTo: Pointer,
        nameMost: number,
        keyTo: Pointer,
        keyMost: number,
      ): number => {
        if (name.length > nameMost || key.length > keyMost) return 0;
        copyTo(nameTo, name, name.length);
        copyTo(keyTo, key, key.length);
        return key.length;
      };
      return callBack(context, setPskClient, prototype, answer);
    },
    open(context) {
      const channel = openWith(context);
      accept(channel.ssl);
      return channel;
    },
    openClient(context, hostname) {
      const channel = openWith(context);
      const { ssl } = channel;
      try {
        connect(ssl);
        if ('ip' in hostname) {
          check(setIp(verificationOf(ssl), hostname.ip), 'no such address');
          return channel;
        }
        check(setServerName(ssl, SSL_CTRL_SET_TLSEXT_HOSTNAME, 0, hostname.name), 'no such name');
        setHostFlags(ssl, X509_CHECK_FLAG_NO_PARTIAL_WILDCARDS);
        check(setHost(ssl, hostname.name), 'no such name');
        return channel;
      } catch (error) {
        free(channel);
        throw error;
      }
    },
    handshake({ ssl }) {
      clearErrors();
      return outcome(ssl, Number(handshake(ssl)));
    },
    distrust({ ssl }) {
      const code = verified(ssl);
      return code === 0 ? undefined : String(verifyText(code));
    },
    free,
    // Errors that were left over, by whomever, would be taken for those of the call: they are cleared before each.
    read({ ssl }, bytes) {
      clearErrors();
      return outcome(ssl, Number(read(ssl, bytes, bytes.length)));
    },
    readTo({ ssl }, address, length) {
      clearErrors();
      return outcome(ssl, Number(readTo(ssl, address, length)));
    },
    write({ ssl }, bytes) {
      clearErrors();
      return renewed(ssl, bytes.length, outcome(ssl, Number(write(ssl, bytes, bytes.length))));
    },
    writeFrom({ ssl }, address, length) {
      clearErrors();
      return renewed(ssl, length, outcome(ssl, Number(writeFrom(ssl, address, length))));
    },
    finish({ ssl }) {
      shutdown(ssl);
      clearErrors();
    },
    hasPending: ({ ssl }) => hasPending(ssl) > 0 || pendingIn(bioOf(ssl)) > 0,
    input({ network }) {
      const length = Number(peekIn(network, addressWord));
      return { address: Number(addressWord[0]), length: Math.max(0, length) };
    },
    putIn({ network }, bytes) {
      if (Number(putIn(network, addressWord, bytes)) !== bytes)
        throw new Error('invariant: there was room for it');
    },
    output({ network }) {
      const length = Number(peekOut(network, addressWord));
      return { address: Number(addressWord[0]), length: Math.max(0, length) };
    },
    tookOut({ network }, bytes) {
      if (Number(takeOut(network, addressWord, bytes)) !== bytes) throw new Error('invariant: it was there');
    },
  };
}

/** Undefined as well where this is no ordinary Node, and there is none that can be called. */
const openSsl = throughFfi(() => loadOpenSsl());

/** The OpenSSL of this Node. @throws StillframeError ERR_STILLFRAME_UNSUPPORTED_FEATURE */
export function requireOpenSsl(): OpenSsl {
  const found = openSsl();
  if (found !== undefined) return found;
  throw new StillframeError(
    'ERR_STILLFRAME_UNSUPPORTED_FEATURE',
    'there is no OpenSSL here that can be called: NBD speaks TLS by that of Node, on Linux, with the FFI package',
  );
}
