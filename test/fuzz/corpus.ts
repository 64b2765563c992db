import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { brotliDecompressSync } from 'node:zlib';

/** The images the fuzzer starts from, see make-corpus.ts. The compiled program lies four folders below the root. */
export const CORPUS = fileURLToPath(
  new URL(import.meta.url.includes('/dist/') ? '../../../../test/fuzz/corpus' : './corpus', import.meta.url),
);

/** Files that lie beside every image, for it to use as backing and data files. */
export const COMMON = [
  'base.raw',
  'data.raw',
  'base.qcow2',
  'middle.qcow2',
  'base.vmdk',
  'part.vmdk',
  'part-cowd.vmdk',
] as const;

/** A file with its holes: what is not in an extent is zero. */
export interface SparseFile {
  readonly name: string;
  readonly length: number;
  readonly extents: readonly { readonly at: number; readonly bytes: Buffer }[];
  /** All of it. */
  readonly bytes: Buffer;
}

const STEP = 512;

function sparse(name: string, bytes: Buffer): SparseFile {
  const extents: { at: number; bytes: Buffer }[] = [];
  const zero = Buffer.alloc(STEP);
  const isZero = (at: number): boolean => {
    const part = bytes.subarray(at, at + STEP);
    return part.equals(zero.subarray(0, part.length));
  };
  for (let at = 0; at < bytes.length; ) {
    if (isZero(at)) {
      at += STEP;
      continue;
    }
    const start = at;
    while (at < bytes.length && !isZero(at)) at += STEP;
    extents.push({ at: start, bytes: bytes.subarray(start, at) });
  }
  return { name, length: bytes.length, extents, bytes };
}

/** The images of a format, or the files `common` to all, by name. */
export function loadCorpus(format: string): SparseFile[] {
  const kept: Record<string, string> = JSON.parse(readFileSync(join(CORPUS, `${format}.json`), 'utf8'));
  return Object.entries(kept).map(([name, text]) =>
    sparse(name, brotliDecompressSync(Buffer.from(text, 'base64'))),
  );
}
