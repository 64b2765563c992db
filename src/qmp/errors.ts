import { type StillframeError, toStillframeError } from '../errors.js';

/** Classes of errors (QAPI `QapiErrorClass`). */
export type ErrorClass = 'GenericError' | 'CommandNotFound' | 'DeviceNotActive' | 'DeviceNotFound';

/** A command fails with this. */
export class QmpError extends Error {
  readonly class: ErrorClass;

  constructor(message: string, errorClass: ErrorClass = 'GenericError') {
    super(message);
    this.class = errorClass;
  }
}

/** What the C library says of errors. */
const STRERROR: Readonly<Record<string, string>> = {
  EACCES: 'Permission denied',
  EAGAIN: 'Resource temporarily unavailable',
  EBUSY: 'Device or resource busy',
  ECANCELED: 'Operation canceled',
  ECONNREFUSED: 'Connection refused',
  ECONNRESET: 'Connection reset by peer',
  EDQUOT: 'Disk quota exceeded',
  EEXIST: 'File exists',
  EFBIG: 'File too large',
  EINVAL: 'Invalid argument',
  EIO: 'Input/output error',
  EISDIR: 'Is a directory',
  ENAMETOOLONG: 'File name too long',
  ENOENT: 'No such file or directory',
  ENOMEM: 'Cannot allocate memory',
  ENOSPC: 'No space left on device',
  ENOTDIR: 'Not a directory',
  ENOTSUP: 'Operation not supported',
  EOPNOTSUPP: 'Operation not supported',
  EPERM: 'Operation not permitted',
  EPIPE: 'Broken pipe',
  EROFS: 'Read-only file system',
  ESHUTDOWN: 'Cannot send after transport endpoint shutdown',
  ETIMEDOUT: 'Connection timed out',
};

/** The C library's words for the error behind `error`, where there is one. */
export function strerror(error: StillframeError): string | undefined {
  return error.errno === undefined ? undefined : STRERROR[error.errno];
}

/** What QEMU says of the failure of a job: the system's words, where it was the system. */
export function jobErrorText(error: unknown): string {
  if (error instanceof QmpError) return error.message;
  const known = toStillframeError(error);
  // A connection that was lost is an I/O error to whoever has only the words of the system.
  if (known.code === 'ERR_STILLFRAME_NBD_CONNECTION') return STRERROR['EIO'] ?? known.message;
  return strerror(known) ?? known.message;
}

/** Texts of ours that say more than QEMU's, which clients may know by heart. */
const SHORTER: readonly RegExp[] = [
  /^Failed to get (?:shared )?"[a-z ]+" lock(?= on )/,
  /^Granularity must be power of 2 and at least 512(?=, )/,
  /^Source and target image have different sizes(?=: )/,
  /^Source and target cannot be the same(?=[:;])/,
  /^Bitmap '.*' is inconsistent and cannot be used(?=: )/s,
  /^Bitmaps are of different sizes .* can't be merged/s,
  /^Backing file not supported for file format '[^']*'(?=: )/,
  /^Driver '[^']*' of node '.*' does not support backing files(?=: )/s,
];

/** Those that QEMU says in other words. */
const OTHERWISE: readonly (readonly [ours: RegExp, theirs: string])[] = [
  [/^'.*' is not a qcow2 image: /s, 'Image is not in qcow2 format'],
  [/^Compression not supported for this file format: /, 'Compression is not supported for this drive '],
  [/^cannot resize '.*': Can't resize a v2 image /s, "Can't resize a v2 image which has snapshots"],
  [/^cannot resize '.*': \d+ bytes are too many /s, 'Failed to grow the L1 table: File too large'],
  [/^cannot truncate .*: EFBIG: /s, 'Could not resize file: File too large'],
];

/** What a client is told of an error of ours. */
export function qmpText(error: unknown): string {
  if (error instanceof QmpError) return error.message;
  const { message } = toStillframeError(error);
  for (const shorter of SHORTER) {
    const [text] = shorter.exec(message) ?? [];
    if (text !== undefined) return text;
  }
  return OTHERWISE.find(([ours]) => ours.test(message))?.[1] ?? message;
}

/** An error of connecting to an NBD server, in QEMU's words. @param place of the server, as the command has it */
export function connectErrorText(error: unknown, place: string): string {
  const { code, message } = toStillframeError(error);
  if (code === 'ERR_STILLFRAME_READ_ONLY') return 'Could not open image: Permission denied';
  if (code === 'ERR_STILLFRAME_BITMAP_NOT_FOUND') return 'Could not open image: Invalid argument';
  if (message.includes('the server has no such export')) return 'Requested export not available';
  if (message.includes('the server wants TLS')) return 'TLS negotiation required before option 7 (go)';
  if (message.includes('the server refuses TLS (error 2)')) return 'Denied by server for option 5 (starttls)';
  if (message.includes(': ENOTFOUND: ')) return unresolvedText(place);
  const [, errno = ''] = /cannot connect to .*?: (E[A-Z]+)/s.exec(message) ?? [];
  if (errno === 'ENAMETOOLONG') return `UNIX socket path '${place}' is too long`;
  const words = STRERROR[errno];
  return words === undefined ? message : `Failed to connect to '${place}': ${words}`;
}

/** @param place host and port */
export function unresolvedText(place: string): string {
  return `address resolution failed for ${place}: Name or service not known`;
}

/** An error of opening something, in QEMU's words where there are some. */
export function openErrorText(error: unknown, filename: string): string {
  const known = toStillframeError(error);
  const lock = /^Failed to get (?:shared )?"[a-z ]+" lock/.exec(known.message);
  if (lock !== null) return lock[0];
  const words = strerror(known);
  return words === undefined ? known.message : `Could not open '${filename}': ${words}`;
}
