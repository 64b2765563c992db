import { StillframeError } from '../errors.js';
import type { Runtime } from '../kernels/runtime.js';
import { attachNode, closeFiles, closeNode, type ImageFormat, openImage } from './graph.js';
import { type AmendQcow2Options, amendQcow2 } from './qcow2/index.js';

export interface AmendOptions extends AmendQcow2Options {
  /** Format of the image; looked for in its first bytes when absent. */
  readonly format?: ImageFormat | undefined;
  /** Folders from which headers may open backing files and data files; default: the image's own. */
  readonly allowBacking?: readonly string[] | undefined;
}

/**
 * Changes options of an image that nobody else uses. Its backing file is opened where the size changes only.
 * Semantics: `qemu-img amend`.
 *
 * @param onProgress called with changes done and changes in all
 * @throws StillframeError ERR_STILLFRAME_UNSUPPORTED_FEATURE (a format other than qcow2; features that version 2 does not
 *   have), …_INVALID_ARGUMENT and what opening and writing throw
 */
export function amendImage(
  runtime: Runtime,
  path: string,
  { format, allowBacking, ...options }: AmendOptions,
  onProgress: (done: number, total: number) => void,
): void {
  const image = openImage(runtime, path, {
    format,
    readOnly: false,
    backing: (options.length ?? 0) > 0 ? allowBacking : false,
    recordDirty: false,
  });
  if (image.driver !== 'qcow2') {
    closeNode(runtime, image);
    throw new StillframeError(
      'ERR_STILLFRAME_UNSUPPORTED_FEATURE',
      `'${path}' has the format ${image.driver}, which has no options that can be amended`,
    );
  }
  try {
    onProgress(0, 1);
    amendQcow2(runtime, image, image.backing && attachNode(runtime, image.backing), options);
    onProgress(1, 1);
  } finally {
    closeFiles(runtime, image);
  }
}
