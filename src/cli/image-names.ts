import type { Engine, ImageFormat, ImageLayers } from '../index.js';
import { type Arguments, FORMATS, type Option, usageError } from './command.js';

/** Options of commands that take names of images. */
export const IMAGE_NAMES: readonly Option[] = [
  {
    long: 'image-opts',
    help: "images are named by QEMU's options of a node, like driver=qcow2,file.filename=FILE; json:{…} always may be",
  },
  {
    long: 'object',
    value: 'OBJECT',
    multiple: true,
    help: 'what such a name refers to: a secret, or credentials for TLS, as QEMU has them',
  },
];

/** An image that was named on the command line. */
export interface Named {
  readonly path: string;
  readonly format: ImageFormat | undefined;
  readonly layers: ImageLayers | undefined;
  readonly readOnly: boolean;
  readonly forceShare: boolean;
}

/** The options by which a command says how an image is named. */
interface Manner {
  readonly format: 'format' | 'second-format' | 'target-format';
  readonly imageOptions: 'image-opts' | 'target-image-opts';
  /** Undefined: it is only for other images. */
  readonly forceShare: 'force-share' | undefined;
}

const MANNER: Manner = { format: 'format', imageOptions: 'image-opts', forceShare: 'force-share' };

/**
 * The image of a name as it was typed: a path, an export, a `json:` name, or with `--image-opts` options.
 *
 * @throws StillframeError ERR_STILLFRAME_INVALID_ARGUMENT
 */
export async function namedImage(
  engine: Engine,
  args: Arguments,
  text: string,
  manner: Partial<Manner> = {},
): Promise<Named> {
  const { format: formatOption, imageOptions, forceShare: shareOption } = { ...MANNER, ...manner };
  const format = args.choice(formatOption, FORMATS);
  const isOptions = args.flag(imageOptions);
  const forceShare = shareOption !== undefined && args.flag(shareOption);
  if (isOptions && format !== undefined) {
    throw usageError(`--${imageOptions} and --${formatOption} are mutually exclusive`);
  }
  if (!isOptions && !text.startsWith('json:')) {
    return { path: text, format, layers: undefined, readOnly: false, forceShare };
  }
  // Only those who name images like that wait for what reads such names.
  const { readTree } = await import('./image-tree.js');
  const tree = readTree(engine, text, args.texts('object') ?? []);
  return {
    path: tree.path,
    format: format ?? tree.format,
    layers: tree.layers,
    readOnly: tree.readOnly,
    forceShare: forceShare || tree.forceShare,
  };
}

/** What of a named image is for the engine to open it. */
export function howToOpen({ format, layers, forceShare }: Named, args: Arguments) {
  return { format, layers, forceShare, allowBacking: args.texts('allow-backing') };
}

/**
 * The image of a name that is to be written to, on nothing but what its name and its header say.
 *
 * @throws StillframeError ERR_STILLFRAME_INVALID_ARGUMENT
 */
export async function editedImage(
  engine: Engine,
  args: Arguments,
  text: string,
  manner: Partial<Manner> = {},
): Promise<Pick<Named, 'path' | 'format'>> {
  const { path, format, layers, readOnly, forceShare } = await namedImage(engine, args, text, manner);
  const no = (what: string) => usageError(`Could not open '${text}': ${what}`);
  if (readOnly) throw no('it is to be written to, and its options say read-only');
  if (forceShare) throw no('force-share=on can only be used with read-only images');
  if (layers !== undefined) {
    throw no(
      "an image that is written to is named by its format and its file alone, without 'backing' and the like",
    );
  }
  return { path, format };
}

/** The name of a file that is to be made. @throws StillframeError ERR_STILLFRAME_INVALID_ARGUMENT */
export function newFile(text: string): string {
  if (!text.startsWith('json:')) return text;
  throw usageError(`'${text}' names an image that is there; a new one is named by its path`);
}
