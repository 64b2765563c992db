import { StillframeError } from '../errors.js';

/**
 * Checks that clusters of an image can be written compressed, with QEMU's words where they cannot.
 *
 * @throws StillframeError ERR_STILLFRAME_UNSUPPORTED_FEATURE
 */
export function checkCompression(image: {
  readonly driver: string;
  readonly path: string;
  readonly hasDataFile?: boolean;
}): void {
  if (image.driver !== 'qcow2') {
    throw new StillframeError(
      'ERR_STILLFRAME_UNSUPPORTED_FEATURE',
      `Compression not supported for this file format: '${image.path}' is ${image.driver}; use format 'qcow2' or do not compress`,
    );
  }
  if (image.hasDataFile) {
    throw new StillframeError(
      'ERR_STILLFRAME_UNSUPPORTED_FEATURE',
      `cannot write compressed clusters into '${image.path}': Operation not supported with an external data file; do not compress`,
      { errno: 'ENOTSUP' },
    );
  }
}
