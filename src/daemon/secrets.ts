import { createDecipheriv } from 'node:crypto';
import { readFileSync } from 'node:fs';
import { toStillframeError } from '../errors.js';
import { QmpError, strerror } from '../qmp/errors.js';
import type { JsonObject } from '../qmp/types.js';

const KEY_BYTES = 32;
const BLOCK_BYTES = 16;

/**
 * What a `secret` object holds: text or base64, as it is or encrypted by another secret (AES-256-CBC).
 *
 * @param find gives the content of a secret. @throws QmpError where there is none
 * @throws QmpError in QEMU's words
 */
export function contentOf(options: JsonObject, find: (id: string) => Buffer): Buffer {
  const { keyid, format = 'raw', iv } = options;
  const given = givenOf(options);
  if (typeof keyid !== 'string') return format === 'base64' ? fromBase64(given) : given;
  const key = find(keyid);
  if (key.length !== KEY_BYTES) throw new QmpError(`Key should be ${KEY_BYTES} bytes in length`);
  if (typeof iv !== 'string') throw new QmpError('IV is required to decrypt secret');
  const start = fromBase64(Buffer.from(iv));
  if (start.length !== BLOCK_BYTES) {
    throw new QmpError(`IV should be ${BLOCK_BYTES} bytes in length not ${start.length}`);
  }
  return decrypt(key, start, format === 'base64' ? fromBase64(given) : given);
}

function givenOf({ data, file }: JsonObject): Buffer {
  if (data !== undefined && file !== undefined) {
    throw new QmpError("'file' and 'data' are mutually exclusive");
  }
  if (data !== undefined) return Buffer.from(String(data));
  if (file === undefined) throw new QmpError("Either 'file' or 'data' must be provided");
  const path = String(file);
  try {
    return readFileSync(path);
  } catch (error) {
    const why = strerror(toStillframeError(error)) ?? String(error);
    throw new QmpError(`Unable to read ${path}: Failed to open file “${path}”: ${why}`);
  }
}

function fromBase64(text: Buffer): Buffer {
  const written = text.toString('latin1');
  if (!/^[A-Za-z0-9+/=\n]*$/.test(written)) throw new QmpError('Base64 data contains invalid characters');
  const digits = written.replaceAll('\n', '');
  // What is no whole group of them is dropped.
  return Buffer.from(digits.slice(0, digits.length - (digits.length % 4)), 'base64');
}

function decrypt(key: Buffer, iv: Buffer, encrypted: Buffer): Buffer {
  if (encrypted.length === 0 || encrypted.length % BLOCK_BYTES !== 0) {
    throw new QmpError(`Length ${encrypted.length} must be a multiple of block size ${BLOCK_BYTES}`);
  }
  const cipher = createDecipheriv('aes-256-cbc', key, iv).setAutoPadding(false);
  const plain = Buffer.concat([cipher.update(encrypted), cipher.final()]);
  const padding = plain.at(-1) ?? 0;
  if (padding === 0 || padding > BLOCK_BYTES) {
    throw new QmpError(`Incorrect number of padding bytes (${padding}) found on decrypted data`);
  }
  return plain.subarray(0, plain.length - padding);
}
