import { StillframeError } from '../../errors.js';
import type { Sockets } from '../../os/sockets.js';
import type { SocketStream } from './stream.js';
import type { NbdTarget } from './uri.js';

export function startTls(
  path: string,
  _target: NbdTarget,
  _plain: SocketStream,
  _sockets: Sockets,
): SocketStream {
  throw new StillframeError('ERR_STILLFRAME_UNSUPPORTED_FEATURE', `'${path}': TLS is not supported yet`);
}
