/** How `qemu-io` reads and writes numbers. */

const UNITS = ['bytes', 'KiB', 'MiB', 'GiB', 'TiB', 'PiB', 'EiB'];
const SUFFIXES = 'BKMGTPE';
/** A size is less than this. */
const SIZE_END = 2n ** 63n;

/** Bytes, or why there is no such size: `1k`, `1.5M`, `0x200`. */
export function parseSize(text: string): number | string {
  const [, whole, fraction, suffix = ''] = /^(0x[0-9a-f]+|\d+)(\.\d+)?([bkmgtpe]?)$/i.exec(text) ?? [];
  const malformed = `Parsing error: non-numeric argument, or extraneous/unrecognized suffix -- ${text}`;
  if (whole === undefined) return malformed;
  const power = suffix === '' ? 0 : SUFFIXES.indexOf(suffix.toUpperCase());
  if (fraction !== undefined && (power === 0 || /^0x/i.test(whole))) return malformed;
  const unit = 1024n ** BigInt(power);
  const bytes = BigInt(whole) * unit + BigInt(Math.floor(Number(fraction ?? 0) * Number(unit)));
  if (bytes >= SIZE_END) return `Parsing error: argument too large -- ${text}`;
  return Number(bytes);
}

/** A byte from 0 to 255: decimal, octal from `0` on, hexadecimal from `0x` on. */
export function parsePattern(text: string): number | undefined {
  if (!/^(?:0x[0-9a-f]+|\d+)$/i.test(text)) return undefined;
  const octal = /^0[0-7]+$/.test(text);
  const value = octal ? Number.parseInt(text, 8) : Number(text);
  return value <= 255 ? value : undefined;
}

/** `512 bytes`, `1.500 KiB` */
export function humanSize(bytes: number): string {
  let power = 0;
  while (power + 1 < UNITS.length && bytes >= 1024 ** (power + 1)) power++;
  const value = bytes / 1024 ** power;
  const text = Number.isInteger(value) ? String(value) : fixed(value, power === 0 ? 6 : 3);
  return `${text.replace(/\.000$/, '')} ${UNITS[power]}`;
}

/** As `printf` rounds: what lies in the middle goes to the even neighbour. */
function fixed(value: number, digits: number): string {
  const scaled = value * 10 ** digits;
  const below = Math.floor(scaled);
  const tie = scaled - below === 0.5;
  return tie && below % 2 === 0 ? (below / 10 ** digits).toFixed(digits) : value.toFixed(digits);
}

function duration(seconds: number, fixed: boolean): string {
  const hundredths = Math.floor(seconds * 100);
  const two = (value: number): string => String(Math.floor(value)).padStart(2, '0');
  const rest = `${two((hundredths / 100) % 60)}.${two(hundredths % 100)}`;
  if (!fixed && seconds < 60) return `${rest} sec`;
  return `${Math.floor(hundredths / 360_000)}:${two((hundredths / 6000) % 60)}:${rest}`;
}

/** What is said of a request that was carried out. @param terse for machines to read */
export function report(
  done: string,
  offset: number,
  bytes: number,
  milliseconds: number,
  terse: boolean,
): string {
  const seconds = Math.max(1e-6, milliseconds / 1000);
  const [rate, perSecond] = [bytes / seconds, 1 / seconds];
  if (terse) return `${bytes},1,${duration(seconds, true)},${rate.toFixed(3)},${perSecond.toFixed(3)}\n`;
  return (
    `${done} ${bytes}/${bytes} bytes at offset ${offset}\n` +
    `${humanSize(bytes)}, 1 ops; ${duration(seconds, false)} (${humanSize(rate)}/sec and ${perSecond.toFixed(4)} ops/sec)\n`
  );
}

/** Lines of 16 bytes each, in hexadecimal and as letters and digits. */
export function dump(data: Uint8Array, offset: number): string {
  const lines: string[] = [];
  for (let at = 0; at < data.length; at += 16) {
    const row = [...data.subarray(at, at + 16)];
    const hex = row.map((byte) => `${byte.toString(16).padStart(2, '0')} `).join('');
    const shown = row.map((byte) => {
      const letter = String.fromCharCode(byte);
      return /[A-Za-z0-9]/.test(letter) ? letter : '.';
    });
    lines.push(`${(offset + at).toString(16).padStart(8, '0')}:  ${hex} ${shown.join('')}\n`);
  }
  return lines.join('');
}
