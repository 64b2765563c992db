/**
 * Every error a caller can act on is a {@link StillframeError} with a stable `code`. Codes never change
 * meaning; messages may. A wrong argument of the embedding program is a plain `TypeError` or `RangeError`.
 */
export type ErrorCode =
  | 'ERR_STILLFRAME_ARENA_EXHAUSTED'
  | 'ERR_STILLFRAME_BACKING_CYCLE'
  | 'ERR_STILLFRAME_BACKING_DEPTH'
  | 'ERR_STILLFRAME_BACKING_FORBIDDEN'
  | 'ERR_STILLFRAME_BACKING_MISSING'
  | 'ERR_STILLFRAME_BACKING_UNSUPPORTED'
  | 'ERR_STILLFRAME_BITMAP_BUSY'
  | 'ERR_STILLFRAME_BITMAP_EXISTS'
  | 'ERR_STILLFRAME_BITMAP_INCONSISTENT'
  | 'ERR_STILLFRAME_BITMAP_NOT_FOUND'
  | 'ERR_STILLFRAME_BROKEN_FRAME'
  | 'ERR_STILLFRAME_CBW_TIMEOUT'
  | 'ERR_STILLFRAME_CHECK_UNSUPPORTED'
  | 'ERR_STILLFRAME_CLOSED'
  | 'ERR_STILLFRAME_CORRUPT_IMAGE'
  | 'ERR_STILLFRAME_FORMAT'
  | 'ERR_STILLFRAME_GUEST_AGENT'
  | 'ERR_STILLFRAME_INTERNAL'
  | 'ERR_STILLFRAME_INVALID_ARGUMENT'
  | 'ERR_STILLFRAME_IO'
  | 'ERR_STILLFRAME_JOB_CANCELLED'
  | 'ERR_STILLFRAME_JOB_VERB'
  | 'ERR_STILLFRAME_LOCKED'
  | 'ERR_STILLFRAME_NBD_CONNECTION'
  | 'ERR_STILLFRAME_NBD_PROTOCOL'
  | 'ERR_STILLFRAME_NBD_REFUSED'
  | 'ERR_STILLFRAME_NOT_FOUND'
  | 'ERR_STILLFRAME_NO_SPACE'
  | 'ERR_STILLFRAME_OUT_OF_RANGE'
  | 'ERR_STILLFRAME_PERMISSION'
  | 'ERR_STILLFRAME_QMP'
  | 'ERR_STILLFRAME_QMP_CONNECTION'
  | 'ERR_STILLFRAME_READ_ONLY'
  | 'ERR_STILLFRAME_SAME_NODE'
  | 'ERR_STILLFRAME_SIZE_MISMATCH'
  | 'ERR_STILLFRAME_TARGET_EXISTS'
  | 'ERR_STILLFRAME_UNSUPPORTED_FEATURE';

/** What survives a trip between threads: structured clone keeps neither the class nor `code` of an error. */
export interface PlainError {
  readonly code: ErrorCode;
  readonly message: string;
  /** The operating system's error name where one is behind it, for example `ENOSPC`. */
  readonly errno?: string | undefined;
  readonly stack?: string | undefined;
  readonly action?: number | undefined;
}

const brand = Symbol.for('stillframe.error');

export class StillframeError extends Error {
  readonly code: ErrorCode;
  readonly errno: string | undefined;
  /** Class of the error where a QMP server or a guest agent has said it, for example `DeviceNotFound`. */
  readonly qmpClass: string | undefined;
  /** Of a transaction: index of the action that failed. */
  action: number | undefined;

  constructor(
    code: ErrorCode,
    message: string,
    options?: { cause?: unknown; errno?: string | undefined; qmpClass?: string | undefined },
  ) {
    super(message, options?.cause === undefined ? undefined : { cause: options.cause });
    this.name = 'StillframeError';
    this.code = code;
    this.errno = options?.errno;
    this.qmpClass = options?.qmpClass;
    Object.defineProperty(this, brand, { value: true });
  }

  /** True across copies of the package in one process. */
  static override [Symbol.hasInstance](value: unknown): boolean {
    return typeof value === 'object' && value !== null && brand in value;
  }

  toPlain(): PlainError {
    const { code, message, errno, stack, action } = this;
    return { code, message, errno, stack, ...(action === undefined ? {} : { action }) };
  }

  static fromPlain(plain: PlainError): StillframeError {
    const error = new StillframeError(plain.code, plain.message, { errno: plain.errno });
    if (plain.stack !== undefined) error.stack = plain.stack;
    error.action = plain.action;
    return error;
  }
}

function errnoOf(error: unknown): string | undefined {
  if (typeof error !== 'object' || error === null) return undefined;
  if ('errno' in error && typeof error.errno === 'string') return error.errno;
  return 'code' in error && typeof error.code === 'string' && /^E[A-Z0-9]+$/.test(error.code)
    ? error.code
    : undefined;
}

const codeOfErrno: Readonly<Record<string, ErrorCode>> = {
  ENOENT: 'ERR_STILLFRAME_NOT_FOUND',
  EACCES: 'ERR_STILLFRAME_PERMISSION',
  EPERM: 'ERR_STILLFRAME_PERMISSION',
  EROFS: 'ERR_STILLFRAME_READ_ONLY',
  ENOSPC: 'ERR_STILLFRAME_NO_SPACE',
  EDQUOT: 'ERR_STILLFRAME_NO_SPACE',
  EEXIST: 'ERR_STILLFRAME_TARGET_EXISTS',
};

const adviceOfErrno: Readonly<Record<string, string>> = {
  ENOENT: 'check the path',
  EACCES: 'check the permissions of the file and its folder',
  EPERM: 'check the permissions of the file and its folder',
  EROFS: 'the file system is mounted read-only; choose another place',
  ENOSPC: 'free some space on that file system or choose another one, then run it again',
  EDQUOT: 'free some of the quota or choose another file system, then run it again',
};

/**
 * Wraps an operating system error (`error.code` is an errno name) into a {@link StillframeError} that says
 * what was being done. A StillframeError is returned as it is.
 *
 * @param what the attempt, for example `cannot read 65536 bytes at 0 of '/a.raw'`
 */
export function systemError(what: string, error: unknown): StillframeError {
  if (error instanceof StillframeError) return error;
  const errno = errnoOf(error);
  const code = (errno && codeOfErrno[errno]) || 'ERR_STILLFRAME_IO';
  const reason = error instanceof Error ? error.message.replace(/^([A-Z0-9]+): /, '') : String(error);
  const advice = errno && adviceOfErrno[errno];
  const detail = errno === undefined ? reason : `${errno}: ${reason.split(',')[0]}`;
  return new StillframeError(code, `${what}: ${detail}${advice ? ` (${advice})` : ''}`, {
    cause: error,
    errno,
  });
}

/** Any thrown value as a StillframeError; what is not one already is a defect and says so. */
export function toStillframeError(error: unknown): StillframeError {
  if (error instanceof StillframeError) return error;
  if (errnoOf(error) !== undefined) return systemError('system call failed', error);
  const wrapped = new StillframeError(
    'ERR_STILLFRAME_INTERNAL',
    `internal error: ${error instanceof Error ? error.message : String(error)}`,
    { cause: error },
  );
  if (error instanceof Error && error.stack !== undefined) wrapped.stack = error.stack;
  return wrapped;
}

/** A request to something that was closed meanwhile. */
export function closedError(what: string): StillframeError {
  return new StillframeError('ERR_STILLFRAME_CLOSED', `${what} is closed`);
}
