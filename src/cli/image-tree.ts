import { isNbdName } from '../block/nbd/uri.js';
import { checkNbdNames, nbdName } from '../daemon/nbd-names.js';
import { Objects } from '../daemon/objects.js';
import {
  type Engine,
  type ImageFormat,
  type ImageLayers,
  type NamedImage,
  StillframeError,
} from '../index.js';
import { BLOCKDEV, OBJECT } from '../qmp/blockdev-schema.js';
import { QmpError } from '../qmp/errors.js';
import { checked, parseJson, parseKeyval, parseOption } from '../qmp/keyval.js';
import { coerce, isObject, type JsonObject, numberIn } from '../qmp/types.js';
import { FORMATS, usageError } from './command.js';

/** An image by QEMU's options of its node. */
export interface TreeImage extends NamedImage {
  readonly readOnly: boolean;
  readonly forceShare: boolean;
}

/** Objects that names of images may refer to. */
const OBJECTS = ['secret', 'tls-creds-psk', 'tls-creds-x509'];
/** Members that are nodes themselves. */
const CHILDREN = ['file', 'backing', 'data-file'] as const;
/** The driver of an image whose format is looked for: what it takes is a file alone. */
const PROBING = 'vdi';
/** Most objects within each other. */
const MOST_DEPTH = 32;

/**
 * Reads the image that `--image-opts` or a `json:` name says, as far as it is one of the formats on a file or an NBD
 * export: there are no filters.
 *
 * @param text `key=value,…`, or `json:{…}` where keys may have dots, too
 * @param objects values of `--object`
 * @throws StillframeError ERR_STILLFRAME_INVALID_ARGUMENT
 */
export function readTree(engine: Engine, text: string, objects: readonly string[]): TreeImage {
  try {
    const known = new Objects(engine);
    for (const object of objects) {
      const options = parseOption(object, OBJECT, 'qom-type');
      const type = String(options['qom-type']);
      if (!OBJECTS.includes(type)) throw usageError(`an object is one of ${OBJECTS.join(', ')}, not ${type}`);
      known.add(options);
    }
    const isJson = text.startsWith('json:');
    const options = isJson ? withoutDots(parseJson(text.slice('json:'.length))) : parseKeyval(text);
    return new TreeReader(known).image(options);
  } catch (error) {
    if (!(error instanceof QmpError || error instanceof StillframeError)) throw error;
    throw usageError(`'${text}': ${error.message}`);
  }
}

class TreeReader {
  readonly #objects: Objects;

  constructor(objects: Objects) {
    this.#objects = objects;
  }

  image(given: JsonObject): TreeImage {
    const isProbed = given['driver'] === undefined;
    if (isProbed && given['file'] === undefined) throw usageError('Must specify either driver or file');
    const options = checkedNode(isProbed ? { ...given, driver: PROBING } : given);
    const driver = String(options['driver']);
    const common = {
      readOnly: options['read-only'] === true,
      forceShare: options['force-share'] === true || options['locking'] === 'off',
    };
    const format = isProbed ? undefined : FORMATS.find((known) => known === driver);
    if (!isProbed && format === undefined) {
      const { path, passphrase } = this.#storage(given);
      return { ...common, path, format: 'raw', layers: layersOf({ passphrase }) };
    }
    const { path, passphrase, isUnlocked } = this.#storage(given['file']);
    return {
      ...common,
      path,
      format,
      forceShare: common.forceShare || isUnlocked,
      layers: layersOf({ passphrase, ...this.#layers(given, options, format) }),
    };
  }

  #layers(given: JsonObject, options: JsonObject, format: ImageFormat | undefined): ImageLayers {
    const [offset, size] = [numberIn(options, 'offset'), numberIn(options, 'size')];
    const { backing, 'data-file': dataFile } = given;
    if (format === 'raw') {
      return { part: offset === undefined && size === undefined ? undefined : { offset, size } };
    }
    if (format !== 'qcow2' && backing !== undefined) {
      throw usageError('only qcow2 images are given another backing file');
    }
    return {
      backing: backing === undefined ? undefined : this.#backing(backing),
      dataFile: dataFile === undefined ? undefined : this.#storage(dataFile).path,
    };
  }

  #backing(given: unknown): NamedImage | null {
    if (given === null || given === '') return null;
    if (!isObject(given)) throw noNode(given);
    const { path, format, layers } = this.image(given);
    return { path, format, layers };
  }

  /** What an image lies on. */
  #storage(given: unknown): {
    readonly path: string;
    readonly passphrase?: string | undefined;
    readonly isUnlocked: boolean;
  } {
    if (!isObject(given)) throw noNode(given);
    const { driver, filename } = given;
    // A name alone says by itself what it names.
    const isExport = driver === undefined && typeof filename === 'string' && isNbdName(filename);
    const options = checkedNode(driver === undefined ? { ...given, driver: 'file' } : given);
    const isUnlocked = options['locking'] === 'off' || options['force-share'] === true;
    switch (options['driver']) {
      case 'file':
      case 'host_device': {
        const name = String(options['filename']).replace(/^file:/, '');
        return { path: isNbdName(name) && !isExport ? `./${name}` : name, isUnlocked };
      }
      case 'nbd':
        checkNbdNames(options);
        return {
          path: nbdName(options, this.#objects),
          passphrase: this.#objects.passphraseOf(options['tls-creds']),
          isUnlocked,
        };
      default:
        throw usageError(
          `nodes of driver '${String(options['driver'])}' cannot be named here: images are one of ${FORMATS.join(', ')} on file or nbd`,
        );
    }
  }
}

function layersOf(layers: ImageLayers): ImageLayers | undefined {
  return Object.values(layers).every((layer) => layer === undefined) ? undefined : layers;
}

function noNode(name: unknown): StillframeError {
  return usageError(`there is no node '${String(name)}' here: say what it is, like file.filename=…`);
}

/** The node's own members as its driver takes them; those that are nodes are for their own turn. */
function checkedNode(given: JsonObject): JsonObject {
  const nodes = CHILDREN.filter((role) => isObject(given[role])).map((role) => [role, 'a node']);
  return checked(coerce(BLOCKDEV, { ...given, ...Object.fromEntries(nodes) }), BLOCKDEV);
}

/** `{"a.b": 1}` is `{"a": {"b": 1}}`. */
function withoutDots(options: JsonObject, depth = 0): JsonObject {
  if (depth > MOST_DEPTH) throw usageError('its options are nested too deeply');
  let result: JsonObject = {};
  for (const [key, value] of Object.entries(options)) {
    const names = key.split('.');
    if (names.includes('__proto__') || names.length > MOST_DEPTH)
      throw usageError(`Invalid parameter '${key}'`);
    const inner = isObject(value) ? withoutDots(value, depth + 1) : value;
    const nested = names.reduceRight<unknown>((below, name) => ({ [name]: below }), inner);
    if (isObject(nested)) result = merged(result, nested, key);
  }
  return result;
}

function merged(some: JsonObject, others: JsonObject, key: string): JsonObject {
  const result: Record<string, unknown> = { ...some };
  for (const [name, value] of Object.entries(others)) {
    const known = result[name];
    if (known !== undefined && !(isObject(known) && isObject(value))) {
      throw usageError(`Parameter '${key}' is given twice, or with and without members`);
    }
    result[name] = isObject(known) && isObject(value) ? merged(known, value, key) : value;
  }
  return result;
}
