import { toStillframeError } from '../../errors.js';
import { WIRE_ERROR, type WireError } from '../protocol/numbers.js';

/** What a client is told of something that went wrong. */
export function wireError(error: unknown): { readonly error: WireError; readonly text: string } {
  const { code, message, errno } = toStillframeError(error);
  return { error: numberOf(code, errno), text: message };
}

/** Errors of the system that the protocol has a number for, or one that means the same. */
const NUMBERS: Readonly<Record<string, WireError>> = {
  EFBIG: WIRE_ERROR.ENOSPC,
  EINVAL: WIRE_ERROR.EINVAL,
  ENOMEM: WIRE_ERROR.ENOMEM,
  ENOTSUP: WIRE_ERROR.ENOTSUP,
  EPERM: WIRE_ERROR.EPERM,
};

function numberOf(code: string, errno: string | undefined): WireError {
  const number = NUMBERS[errno ?? ''];
  if (number !== undefined) return number;
  switch (code) {
    case 'ERR_STILLFRAME_READ_ONLY':
      return WIRE_ERROR.EPERM;
    case 'ERR_STILLFRAME_NO_SPACE':
      return WIRE_ERROR.ENOSPC;
    case 'ERR_STILLFRAME_ARENA_EXHAUSTED':
      return WIRE_ERROR.ENOMEM;
    case 'ERR_STILLFRAME_OUT_OF_RANGE':
    case 'ERR_STILLFRAME_INVALID_ARGUMENT':
    // There is no number for it on the wire.
    case 'ERR_STILLFRAME_PERMISSION':
      return WIRE_ERROR.EINVAL;
    default:
      return WIRE_ERROR.EIO;
  }
}
