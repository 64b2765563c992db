import {
  COMMAND,
  COMMAND_FLAG,
  EXPORT,
  EXTENDED_BYTES,
  EXTENDED_REQUEST_MAGIC,
  REQUEST_BYTES,
  REQUEST_MAGIC,
  WIRE_ERROR,
  type WireError,
} from './numbers.js';

/** Largest data of one request that is carried out, in bytes; more than what is advertised. */
export const MAX_PAYLOAD_BYTES = 64 * 1024 * 1024;
/** Largest data of a refused request that is read and thrown away; a client that sends more is put out. */
export const MAX_DRAINED_BYTES = 128 * 1024 * 1024;

/** What the agreement says that requests are judged by. */
export interface TransmissionRules {
  /** Bytes of the export. */
  readonly length: number;
  readonly headers: 'simple' | 'structured' | 'extended';
  /** Transmission flags as the client was told them. */
  readonly flags: number;
  /** How many metadata contexts the client has chosen. */
  readonly contexts: number;
}

/** Why a request is refused. */
export interface RequestRefusal {
  readonly error: WireError;
  readonly text: string;
}

/** Bytes of a request's header. */
export function requestBytes(headers: TransmissionRules['headers']): number {
  return headers === 'extended' ? EXTENDED_BYTES : REQUEST_BYTES;
}

/** One request as it came. One object is used again and again: requests are many. */
export class Request {
  flags = 0;
  command = 0;
  /** The cookie as two halves: it means nothing to us. */
  cookieHigh = 0;
  cookieLow = 0;
  /** Bytes. A number beyond 2^53 is as wrong as any beyond the end of the drive. */
  offset = 0;
  length = 0;

  /** @returns false where the bytes are no request: nothing that follows can be understood then */
  decode(view: DataView, at: number, headers: TransmissionRules['headers']): boolean {
    const extended = headers === 'extended';
    if (view.getUint32(at) !== (extended ? EXTENDED_REQUEST_MAGIC : REQUEST_MAGIC)) return false;
    this.flags = view.getUint16(at + 4);
    this.command = view.getUint16(at + 6);
    this.cookieHigh = view.getUint32(at + 8);
    this.cookieLow = view.getUint32(at + 12);
    this.offset = view.getUint32(at + 16) * 2 ** 32 + view.getUint32(at + 20);
    this.length = extended
      ? view.getUint32(at + 24) * 2 ** 32 + view.getUint32(at + 28)
      : view.getUint32(at + 24);
    return true;
  }

  /** Bytes of data that follow the header. */
  payloadBytes(headers: TransmissionRules['headers']): number {
    const follows =
      headers === 'extended'
        ? (this.flags & COMMAND_FLAG.payloadLength) !== 0
        : this.command === COMMAND.write;
    return follows ? this.length : 0;
  }
}

const KNOWN_FLAGS =
  COMMAND_FLAG.fua |
  COMMAND_FLAG.noHole |
  COMMAND_FLAG.df |
  COMMAND_FLAG.reqOne |
  COMMAND_FLAG.fastZero |
  COMMAND_FLAG.payloadLength;

function refuse(error: keyof typeof WIRE_ERROR, text: string): RequestRefusal {
  return { error: WIRE_ERROR[error], text };
}

/** Flags that a command may have; FUA is taken on every one where it is offered. */
function allowedFlags(command: number, { headers, flags }: TransmissionRules): number {
  const fua = (flags & EXPORT.fua) !== 0 ? COMMAND_FLAG.fua : 0;
  const payload = headers === 'extended' ? COMMAND_FLAG.payloadLength : 0;
  switch (command) {
    case COMMAND.read:
      return fua | ((flags & EXPORT.df) !== 0 ? COMMAND_FLAG.df : 0);
    case COMMAND.write:
      return fua | payload;
    case COMMAND.writeZeroes:
      return fua | COMMAND_FLAG.noHole | ((flags & EXPORT.fastZero) !== 0 ? COMMAND_FLAG.fastZero : 0);
    case COMMAND.blockStatus:
      return fua | COMMAND_FLAG.reqOne | ((flags & EXPORT.blockStatusPayload) !== 0 ? payload : 0);
    default:
      return fua;
  }
}

/**
 * Judges a request before anything is done for it. Its data, if there is any, has to be read in any case.
 *
 * @param request not a disconnect
 * @returns undefined where it can be carried out
 */
export function judge(request: Request, rules: TransmissionRules): RequestRefusal | undefined {
  const { command, flags, offset, length } = request;
  if ((flags & ~KNOWN_FLAGS) !== 0 || (flags & ~allowedFlags(command, rules)) !== 0) {
    return refuse('EINVAL', `flags 0x${flags.toString(16)} that command ${command} does not have here`);
  }
  const end = offset + length;
  const beyond = !Number.isSafeInteger(end) || end > rules.length;
  const text = `the drive has ${rules.length} bytes`;
  switch (command) {
    case COMMAND.read:
      if (beyond) return refuse('EINVAL', text);
      if (length > MAX_PAYLOAD_BYTES) {
        return refuse('EOVERFLOW', `a read of more than ${MAX_PAYLOAD_BYTES} bytes`);
      }
      return undefined;
    case COMMAND.write:
      if (rules.headers === 'extended' && (flags & COMMAND_FLAG.payloadLength) === 0) {
        return refuse('EINVAL', 'a write without data');
      }
      if ((rules.flags & EXPORT.readOnly) !== 0) return refuse('EPERM', 'the export is read-only');
      if (length > MAX_PAYLOAD_BYTES) {
        return refuse('EINVAL', `a write of more than ${MAX_PAYLOAD_BYTES} bytes`);
      }
      return beyond ? refuse('ENOSPC', text) : undefined;
    case COMMAND.flush:
      return undefined;
    case COMMAND.trim:
      if ((rules.flags & EXPORT.readOnly) !== 0) return refuse('EPERM', 'the export is read-only');
      return beyond ? refuse('EINVAL', text) : undefined;
    case COMMAND.writeZeroes:
      if ((rules.flags & EXPORT.readOnly) !== 0) return refuse('EPERM', 'the export is read-only');
      return beyond ? refuse('ENOSPC', text) : undefined;
    case COMMAND.cache:
      return beyond ? refuse('EINVAL', text) : undefined;
    case COMMAND.blockStatus:
      if (rules.headers === 'simple' || rules.contexts === 0) {
        return refuse('EINVAL', 'no metadata context was chosen');
      }
      // With data the length is that of the data; what it asks for is judged when it is there.
      if ((flags & COMMAND_FLAG.payloadLength) !== 0) return undefined;
      if (length === 0) return refuse('EINVAL', 'the status of no bytes');
      return beyond ? refuse('EINVAL', text) : undefined;
    default:
      return refuse('EINVAL', `there is no command ${command}`);
  }
}
