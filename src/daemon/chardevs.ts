import { QmpError } from '../qmp/errors.js';
import { isObject, type JsonObject } from '../qmp/types.js';

const DEFAULT_RING_BYTES = 65536;
const MAX_RING_BYTES = 16 * 1024 * 1024;

/** A character device of the daemon. */
interface Chardev {
  readonly label: string;
  readonly type: string;
  /** What it is connected with, as QEMU names it. */
  readonly filename: string;
  /** A monitor is on it. */
  used: boolean;
  readonly ring?: Ring | undefined;
}

/** Keeps the last bytes that were written to it. */
class Ring {
  readonly #size: number;
  #content: Buffer = Buffer.alloc(0);

  constructor(size: number) {
    this.#size = size;
  }

  write(data: Buffer): void {
    const all = Buffer.concat([this.#content, data.subarray(-this.#size)]);
    this.#content = all.subarray(Math.max(0, all.length - this.#size));
  }

  /** Takes the oldest bytes out. */
  read(most: number): Buffer {
    const taken = this.#content.subarray(0, most);
    this.#content = this.#content.subarray(taken.length);
    return taken;
  }
}

/** Character devices: those of monitors, which the command line makes, and those that keep or drop what is written to them. */
export class Chardevs {
  readonly #devices = new Map<string, Chardev>();

  /** One that the command line names. */
  register(label: string, type: string, filename: string): void {
    this.#devices.set(label, { label, type, filename, used: false });
  }

  /** A monitor is on it from now on. */
  use(label: string): void {
    const device = this.#devices.get(label);
    if (device !== undefined) device.used = true;
  }

  /** `query-chardev` */
  query(): object[] {
    return [...this.#devices.values()].map(({ label, filename, used }) => ({
      'frontend-open': used,
      filename,
      label,
    }));
  }

  /** Label and type of each, for `qom-list`. */
  types(): { readonly name: string; readonly type: string }[] {
    return [...this.#devices.values()].map(({ label, type }) => ({
      name: label,
      type: `child<chardev-${type}>`,
    }));
  }

  /** @param backend as the schema has it */
  add(label: string, backend: JsonObject): void {
    if (this.#devices.has(label)) throw new QmpError(`Chardev with id '${label}' already exists`);
    this.#devices.set(label, make(label, backend));
  }

  change(label: string, backend: JsonObject): void {
    const device = this.#devices.get(label);
    if (device === undefined) throw new QmpError(`Chardev '${label}' does not exist`);
    if (device.used) throw new QmpError('Chardev user does not support chardev hotswap');
    this.#devices.set(label, make(label, backend));
  }

  remove(label: string): void {
    const device = this.#devices.get(label);
    if (device === undefined) throw new QmpError(`Chardev '${label}' not found`);
    if (device.used) throw new QmpError(`Chardev '${label}' is busy`);
    this.#devices.delete(label);
  }

  sendBreak(label: string): void {
    if (!this.#devices.has(label)) throw new QmpError(`Chardev '${label}' not found`);
  }

  writeRing(label: string, data: string, format: 'utf8' | 'base64'): void {
    if (format === 'base64' && !/^[A-Za-z0-9+/\s]*={0,2}\s*$/.test(data)) {
      throw new QmpError('Base64 data contains invalid characters');
    }
    this.#ring(label).write(Buffer.from(data, format));
  }

  readRing(label: string, size: number, format: 'utf8' | 'base64'): string {
    const ring = this.#ring(label);
    if (size <= 0) throw new QmpError('size must be greater than zero');
    return ring.read(size).toString(format);
  }

  #ring(label: string): Ring {
    const device = this.#devices.get(label);
    if (device === undefined) throw new QmpError(`Device '${label}' not found`);
    if (device.ring === undefined) throw new QmpError(`${label} is not a ringbuf device`);
    return device.ring;
  }
}

function make(label: string, { type, data }: JsonObject): Chardev {
  const kind = String(type);
  if (kind === 'null') return { label, type: kind, filename: kind, used: false };
  const size = Number((isObject(data) ? data['size'] : undefined) ?? DEFAULT_RING_BYTES);
  const wrong =
    size <= 0 || !Number.isInteger(Math.log2(size))
      ? 'size of ringbuf chardev must be power of two'
      : size > MAX_RING_BYTES
        ? `a ringbuf of more than ${MAX_RING_BYTES} bytes is not supported`
        : undefined;
  if (wrong !== undefined) throw new QmpError(`Failed to add chardev '${label}': ${wrong}`);
  return { label, type: kind, filename: kind, used: false, ring: new Ring(size) };
}
