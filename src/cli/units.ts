const UNITS = ['B', 'KiB', 'MiB', 'GiB', 'TiB', 'PiB', 'EiB'] as const;

/** Bytes for people, three digits of them, as qemu-img prints sizes: `1.5 GiB`. */
export function formatBytes(bytes: number): string {
  let unit = 0;
  let value = bytes;
  // At 1000 already, since four digits would follow.
  while (value >= 1000 && unit < UNITS.length - 1) {
    value /= 1024;
    unit++;
  }
  return `${roundedToEven(value)} ${UNITS[unit]}`;
}

/** Three digits of a number below 1000; of two that are as near the even one, as C's `%.3g` has it. */
function roundedToEven(value: number): number {
  const scale = value >= 100 ? 1 : value >= 10 ? 10 : 100;
  const scaled = value * scale;
  const below = Math.floor(scaled);
  if (scaled - below === 0.5) return (below + (below % 2)) / scale;
  return Number(value.toPrecision(3));
}

/** Text from an image as it may go to a terminal: what would move the cursor or change colours is shown as `?`. */
export function printable(text: string): string {
  return text.replace(/\p{Cc}/gu, '?');
}
