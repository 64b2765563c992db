/**
 * Numbers of the NBD protocol, for client and server. Everything is big-endian. Source: doc/proto.md of
 * NetworkBlockDevice/nbd.
 */

export const NBD_MAGIC = 0x4e42444d41474943n;
export const OPTION_MAGIC = 0x49484156454f5054n;
export const OLD_MAGIC = 0x00420281861253n;
export const OPTION_REPLY_MAGIC = 0x0003e889045565a9n;

export const HANDSHAKE = { fixedNewstyle: 1, noZeroes: 2 } as const;

export const OPTION = {
  exportName: 1,
  abort: 2,
  list: 3,
  startTls: 5,
  info: 6,
  go: 7,
  structuredReply: 8,
  listMetaContext: 9,
  setMetaContext: 10,
  extendedHeaders: 11,
} as const;

export const REPLY = { ack: 1, server: 2, info: 3, metaContext: 4 } as const;
export const REPLY_ERROR = 0x80000000;
export const OPTION_ERROR = {
  unsupported: 0x80000001,
  policy: 0x80000002,
  invalid: 0x80000003,
  platform: 0x80000004,
  tlsRequired: 0x80000005,
  unknown: 0x80000006,
  shutdown: 0x80000007,
  blockSizeRequired: 0x80000008,
  tooBig: 0x80000009,
  extendedHeadersRequired: 0x8000000a,
} as const;

export const INFO = { export: 0, name: 1, description: 2, blockSize: 3 } as const;

/** Transmission flags of an export. */
export const EXPORT = {
  hasFlags: 1 << 0,
  readOnly: 1 << 1,
  flush: 1 << 2,
  fua: 1 << 3,
  trim: 1 << 5,
  writeZeroes: 1 << 6,
  /** Only where structured replies were agreed on. */
  df: 1 << 7,
  multiConn: 1 << 8,
  cache: 1 << 10,
  fastZero: 1 << 11,
  /** Only where extended headers were agreed on. */
  blockStatusPayload: 1 << 12,
} as const;

export const COMMAND = {
  read: 0,
  write: 1,
  disconnect: 2,
  flush: 3,
  trim: 4,
  cache: 5,
  writeZeroes: 6,
  blockStatus: 7,
} as const;
export type Command = (typeof COMMAND)[keyof typeof COMMAND];

export const COMMAND_FLAG = {
  fua: 1,
  noHole: 2,
  df: 4,
  reqOne: 8,
  fastZero: 16,
  /** With extended headers: the length is that of data that follows. */
  payloadLength: 32,
} as const;

export const REQUEST_MAGIC = 0x25609513;
export const EXTENDED_REQUEST_MAGIC = 0x21e41c71;
export const SIMPLE_REPLY_MAGIC = 0x67446698;
export const STRUCTURED_REPLY_MAGIC = 0x668e33ef;
export const EXTENDED_REPLY_MAGIC = 0x6e8a278c;
export const OPTION_BYTES = 16;
export const OPTION_REPLY_BYTES = 20;
export const REQUEST_BYTES = 28;
/** Requests and replies with extended headers. */
export const EXTENDED_BYTES = 32;
export const SIMPLE_REPLY_BYTES = 16;
export const CHUNK_BYTES = 20;

export const CHUNK_DONE = 1;
export const CHUNK = {
  none: 0,
  offsetData: 1,
  offsetHole: 2,
  blockStatus: 5,
  blockStatusExtended: 6,
  error: 0x8001,
  errorOffset: 0x8002,
} as const;
/** Bit of chunk types that report an error. */
export const CHUNK_ERROR = 0x8000;

/** Bits of `base:allocation`. */
export const STATE = { hole: 1, zero: 2 } as const;

/** Bit of `qemu:dirty-bitmap:NAME`. */
export const DIRTY = 1;

/** Longest string of the protocol, in bytes. */
export const MAX_STRING_BYTES = 4096;

/** Error numbers of the wire. */
export const WIRE_ERROR = {
  EPERM: 1,
  EIO: 5,
  ENOMEM: 12,
  EINVAL: 22,
  ENOSPC: 28,
  EOVERFLOW: 75,
  ENOTSUP: 95,
  ESHUTDOWN: 108,
} as const;
export type WireError = (typeof WIRE_ERROR)[keyof typeof WIRE_ERROR];

/** Names of the error numbers that may be on the wire; any other one means EINVAL. */
export const ERRNO: Readonly<Record<number, string>> = Object.fromEntries(
  Object.entries(WIRE_ERROR).map(([name, number]) => [number, name]),
);
