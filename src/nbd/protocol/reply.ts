import {
  CHUNK,
  CHUNK_BYTES,
  CHUNK_DONE,
  EXTENDED_BYTES,
  EXTENDED_REPLY_MAGIC,
  SIMPLE_REPLY_BYTES,
  SIMPLE_REPLY_MAGIC,
  STRUCTURED_REPLY_MAGIC,
  type WireError,
} from './numbers.js';
import type { Request, TransmissionRules } from './request.js';

type Headers = TransmissionRules['headers'];
/** What answers are written for. */
type Asked = Pick<Request, 'cookieHigh' | 'cookieLow' | 'offset'>;

/** Longest text of an error, in bytes. */
const MAX_TEXT_BYTES = 512;
/** Most bytes that the answer to a request takes that says no more than whether it went well. */
export const MAX_PLAIN_BYTES = EXTENDED_BYTES + 6 + MAX_TEXT_BYTES;

/** Most extents in one answer: a megabyte of them, as QEMU does it. */
export const MAX_EXTENTS = 65536;

/** Bytes of the header of a chunk. */
export function chunkBytes(headers: Headers): number {
  return headers === 'extended' ? EXTENDED_BYTES : CHUNK_BYTES;
}

/** Bytes before the data of a read's answer. */
export function dataHeaderBytes(headers: Headers): number {
  return headers === 'simple' ? SIMPLE_REPLY_BYTES : chunkBytes(headers) + 8;
}

/** Bytes of an answer that says that a part reads as zeroes. */
export function holeBytes(headers: Headers): number {
  return chunkBytes(headers) + 12;
}

/** Bytes of an answer with extents. */
export function statusBytes(headers: Headers, extents: number): number {
  return chunkBytes(headers) + (headers === 'extended' ? 8 + 16 * extents : 4 + 8 * extents);
}

/** @returns the bytes of the header */
function simple(view: DataView, at: number, { cookieHigh, cookieLow }: Asked, error: number): number {
  view.setUint32(at, SIMPLE_REPLY_MAGIC);
  view.setUint32(at + 4, error);
  view.setUint32(at + 8, cookieHigh);
  view.setUint32(at + 12, cookieLow);
  return SIMPLE_REPLY_BYTES;
}

/** @returns the bytes of the header */
function chunk(
  view: DataView,
  at: number,
  headers: Headers,
  { cookieHigh, cookieLow, offset }: Asked,
  type: number,
  done: boolean,
  length: number,
): number {
  const extended = headers === 'extended';
  view.setUint32(at, extended ? EXTENDED_REPLY_MAGIC : STRUCTURED_REPLY_MAGIC);
  view.setUint16(at + 4, done ? CHUNK_DONE : 0);
  view.setUint16(at + 6, type);
  view.setUint32(at + 8, cookieHigh);
  view.setUint32(at + 12, cookieLow);
  if (!extended) {
    view.setUint32(at + 16, length);
    return CHUNK_BYTES;
  }
  setUint64(view, at + 16, offset);
  setUint64(view, at + 24, length);
  return EXTENDED_BYTES;
}

function setUint64(view: DataView, at: number, value: number): void {
  view.setUint32(at, Math.floor(value / 2 ** 32));
  view.setUint32(at + 4, value % 2 ** 32);
}

/**
 * Writes the answer that a request went well and there is nothing more to say.
 *
 * @returns its bytes
 */
export function encodeDone(view: DataView, at: number, headers: Headers, asked: Asked): number {
  // With structured replies only reads need them; a plain answer is shorter.
  if (headers !== 'extended') return simple(view, at, asked, 0);
  return chunk(view, at, headers, asked, CHUNK.none, true, 0);
}

/**
 * Writes the end of an answer all parts of which were sent.
 *
 * @returns its bytes
 */
export function encodeEnd(view: DataView, at: number, headers: Headers, asked: Asked): number {
  return chunk(view, at, headers, asked, CHUNK.none, true, 0);
}

/**
 * Writes the answer that a request failed.
 *
 * @param text what people read about it; there is no room for it in simple replies
 * @returns its bytes, at most {@link MAX_PLAIN_BYTES}
 */
export function encodeError(
  view: DataView,
  at: number,
  headers: Headers,
  asked: Asked,
  error: WireError,
  text: string,
): number {
  if (headers === 'simple') return simple(view, at, asked, error);
  const bytes = cut(new TextEncoder().encode(text));
  const head = chunk(view, at, headers, asked, CHUNK.error, true, 6 + bytes.length);
  view.setUint32(at + head, error);
  view.setUint16(at + head + 4, bytes.length);
  for (const [index, byte] of bytes.entries()) view.setUint8(at + head + 6 + index, byte);
  return head + 6 + bytes.length;
}

/** Not within a character. */
function cut(text: Uint8Array): Uint8Array {
  if (text.length <= MAX_TEXT_BYTES) return text;
  let end = MAX_TEXT_BYTES;
  while (end > 0 && ((text[end] ?? 0) & 0xc0) === 0x80) end--;
  return text.subarray(0, end);
}

/**
 * Writes what comes before the data of a read, or of a part of it.
 *
 * @param done nothing else follows for the request
 * @returns its bytes: {@link dataHeaderBytes}
 */
export function encodeData(
  view: DataView,
  at: number,
  headers: Headers,
  asked: Asked,
  offset: number,
  length: number,
  done: boolean,
): number {
  if (headers === 'simple') return simple(view, at, asked, 0);
  const head = chunk(view, at, headers, asked, CHUNK.offsetData, done, 8 + length);
  setUint64(view, at + head, offset);
  return head + 8;
}

/**
 * Writes that a part of a read is zeroes.
 *
 * @returns its bytes: {@link holeBytes}
 */
export function encodeHole(
  view: DataView,
  at: number,
  headers: Headers,
  asked: Asked,
  offset: number,
  length: number,
  done: boolean,
): number {
  const head = chunk(view, at, headers, asked, CHUNK.offsetHole, done, 12);
  setUint64(view, at + head, offset);
  view.setUint32(at + head + 8, length);
  return head + 12;
}

/**
 * Writes the extents of one context; those themselves are written with {@link encodeExtent} behind it.
 *
 * @returns the bytes before the first extent
 */
export function encodeStatus(
  view: DataView,
  at: number,
  headers: Headers,
  asked: Asked,
  context: number,
  extents: number,
  done: boolean,
): number {
  const extended = headers === 'extended';
  const length = statusBytes(headers, extents) - chunkBytes(headers);
  const type = extended ? CHUNK.blockStatusExtended : CHUNK.blockStatus;
  const head = chunk(view, at, headers, asked, type, done, length);
  view.setUint32(at + head, context);
  if (!extended) return head + 4;
  view.setUint32(at + head + 4, extents);
  return head + 8;
}

/** @returns the bytes of the extent */
export function encodeExtent(
  view: DataView,
  at: number,
  headers: Headers,
  length: number,
  flags: number,
): number {
  if (headers === 'extended') {
    setUint64(view, at, length);
    setUint64(view, at + 8, flags);
    return 16;
  }
  view.setUint32(at, length);
  view.setUint32(at + 4, flags);
  return 8;
}
