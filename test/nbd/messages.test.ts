import { describe, expect, it } from 'vitest';
import { EXPORT } from '#src/nbd/protocol/numbers.js';
import {
  encodeData,
  encodeDone,
  encodeEnd,
  encodeError,
  encodeExtent,
  encodeHole,
  encodeStatus,
  MAX_PLAIN_BYTES,
} from '#src/nbd/protocol/reply.js';
import { judge, Request, type TransmissionRules } from '#src/nbd/protocol/request.js';

const view = new DataView(new ArrayBuffer(4096));
const asked = { cookieHigh: 0x01020304, cookieLow: 0xfffefdfc, offset: 2 ** 33 + 7 };
const COOKIE = '01020304fffefdfc';

const hex = (bytes: number): string => Buffer.from(view.buffer, 0, bytes).toString('hex');

describe('requests', () => {
  const parse = (text: string, headers: TransmissionRules['headers']): Request | undefined => {
    const bytes = Buffer.from(text.replaceAll(' ', ''), 'hex');
    const request = new Request();
    const from = new DataView(bytes.buffer, bytes.byteOffset, bytes.length);
    return request.decode(from, 0, headers) ? request : undefined;
  };

  it('reads both kinds of headers', () => {
    const fields = { flags: 1, command: 6, cookieHigh: 0x01020304, cookieLow: 0xfffefdfc };
    expect(parse(`25609513 0001 0006 ${COOKIE} 0000000200000007 80000000`, 'simple')).toMatchObject({
      ...fields,
      offset: 2 ** 33 + 7,
      length: 2 ** 31,
    });
    expect(parse(`21e41c71 0001 0006 ${COOKIE} 0000000200000007 0000000300000000`, 'extended')).toMatchObject(
      { ...fields, offset: 2 ** 33 + 7, length: 3 * 2 ** 32 },
    );
  });

  it('knows what is no request of the kind that was agreed on', () => {
    const simple = `25609513 0001 0006 ${COOKIE} 0000000200000007 80000000 00000000`;
    expect(parse(simple, 'extended')).toBeUndefined();
    expect(parse(simple.replace('25609513', '21e41c71'), 'structured')).toBeUndefined();
    expect(parse(simple.replace('25609513', '67446698'), 'simple')).toBeUndefined();
  });

  it('knows what data follows', () => {
    const request = new Request();
    Object.assign(request, { command: 1, length: 512, flags: 0 });
    expect(request.payloadBytes('simple')).toBe(512);
    expect(request.payloadBytes('extended')).toBe(0);
    Object.assign(request, { command: 0, flags: 32 });
    expect(request.payloadBytes('structured')).toBe(0);
    expect(request.payloadBytes('extended')).toBe(512);
  });
});

describe('judgement', () => {
  const all =
    EXPORT.flush | EXPORT.fua | EXPORT.trim | EXPORT.writeZeroes | EXPORT.fastZero | EXPORT.cache | EXPORT.df;
  const rules = (more: Partial<TransmissionRules> = {}): TransmissionRules => ({
    length: 1 << 20,
    headers: 'structured',
    flags: all,
    contexts: 1,
    ...more,
  });
  const simple = rules({ headers: 'simple', flags: all & ~EXPORT.df, contexts: 0 });
  const readOnly = rules({ flags: EXPORT.readOnly | EXPORT.df });
  const extended = rules({ headers: 'extended', flags: all | EXPORT.blockStatusPayload });

  it.each<[string, readonly [number, number, number, number], TransmissionRules, number]>([
    ['a read', [0, 0, 0, 512], rules(), 0],
    ['a read up to the end', [0, 4, 512, (1 << 20) - 512], rules(), 0],
    ['a read of nothing at the end', [0, 0, 1 << 20, 0], rules(), 0],
    ['a read beyond the end', [0, 0, 1 << 20, 1], rules(), 22],
    ['a read at 2^64 - 1', [0, 0, 2 ** 64 - 1, 2], rules(), 22],
    ['a read of more than 64 MiB', [0, 0, 0, 2 ** 26 + 1], rules({ length: 2 ** 40 }), 75],
    ['a read in one piece without structured replies', [0, 4, 0, 512], simple, 22],
    ['a read with FUA', [0, 1, 0, 512], rules(), 0],
    ['a read with FUA that is not offered', [0, 1, 0, 512], readOnly, 22],
    ['a read with NO_HOLE', [0, 2, 0, 512], rules(), 22],
    ['a read with an unknown flag', [0, 64, 0, 512], rules(), 22],
    ['a write', [1, 1, 0, 512], rules(), 0],
    ['a write beyond the end', [1, 0, 1 << 20, 1], rules(), 28],
    ['a write of more than 64 MiB', [1, 0, 0, 2 ** 26 + 1], rules({ length: 2 ** 40 }), 22],
    ['a write to a read-only export', [1, 0, 0, 512], readOnly, 1],
    ['a write with PAYLOAD_LEN in a compact header', [1, 32, 0, 512], rules(), 22],
    ['a write without data in an extended header', [1, 0, 0, 512], extended, 22],
    ['a write in an extended header', [1, 32, 0, 512], extended, 0],
    ['a read with data', [0, 32, 0, 512], extended, 22],
    ['a flush', [3, 0, 0, 0], rules(), 0],
    ['a flush of a place', [3, 1, 512, 512], rules(), 0],
    ['a trim', [4, 1, 0, 512], rules(), 0],
    ['a trim beyond the end', [4, 0, 0, (1 << 20) + 1], rules(), 22],
    ['a trim of a read-only export', [4, 0, 0, 512], readOnly, 1],
    ['a trim with NO_HOLE', [4, 2, 0, 512], rules(), 22],
    ['a cache', [5, 0, 0, 512], rules(), 0],
    ['a cache beyond the end', [5, 0, 1 << 20, 512], rules(), 22],
    ['zeroes', [6, 1 | 2 | 16, 0, 512], rules(), 0],
    ['fast zeroes that are not offered', [6, 16, 0, 512], rules({ flags: all & ~EXPORT.fastZero }), 22],
    ['zeroes beyond the end', [6, 0, 0, (1 << 20) + 1], rules(), 28],
    ['zeroes to a read-only export', [6, 0, 0, 512], readOnly, 1],
    ['the status', [7, 8, 0, 512], rules(), 0],
    ['the status of nothing', [7, 0, 0, 0], rules(), 22],
    ['the status beyond the end', [7, 0, 512, 1 << 20], rules(), 22],
    ['the status without contexts', [7, 0, 0, 512], rules({ contexts: 0 }), 22],
    ['the status in simple replies', [7, 0, 0, 512], simple, 22],
    ['the status with data in a compact header', [7, 32, 0, 512], rules(), 22],
    ['the status with data', [7, 32, 0, 12], extended, 0],
    ['a resize', [8, 0, 0, 512], rules(), 22],
    ['an unknown command', [777, 0, 0, 0], rules(), 22],
  ])('of %s', (_, [command, flags, offset, length], given, error) => {
    const request = Object.assign(new Request(), { command, flags, offset, length });
    expect(judge(request, given)?.error ?? 0).toBe(error);
  });
});

describe('replies', () => {
  it('says that it is done', () => {
    expect(hex(encodeDone(view, 0, 'simple', asked))).toBe(`6744669800000000${COOKIE}`);
    expect(hex(encodeDone(view, 0, 'structured', asked))).toBe(`6744669800000000${COOKIE}`);
    expect(hex(encodeDone(view, 0, 'extended', asked))).toBe(
      `6e8a278c00010000${COOKIE}00000002000000070000000000000000`,
    );
    expect(hex(encodeEnd(view, 0, 'structured', asked))).toBe(`668e33ef00010000${COOKIE}00000000`);
  });

  it('says what went wrong', () => {
    expect(hex(encodeError(view, 0, 'simple', asked, 28, 'no space'))).toBe(`674466980000001c${COOKIE}`);
    expect(hex(encodeError(view, 0, 'structured', asked, 5, 'äh'))).toBe(
      `668e33ef00018001${COOKIE}00000009000000050003c3a468`,
    );
    const bytes = encodeError(view, 0, 'extended', asked, 5, 'ä'.repeat(4000));
    expect(bytes).toBeLessThanOrEqual(MAX_PLAIN_BYTES);
    const text = Buffer.from(view.buffer, 38, view.getUint16(36)).toString();
    expect(text).toBe('ä'.repeat(256));
    expect(bytes).toBe(38 + 512);
  });

  it('says where data and zeroes are', () => {
    expect(hex(encodeData(view, 0, 'simple', asked, 0, 512, true))).toBe(`6744669800000000${COOKIE}`);
    expect(hex(encodeData(view, 0, 'structured', asked, 2 ** 33, 512, false))).toBe(
      `668e33ef00000001${COOKIE}000002080000000200000000`,
    );
    expect(hex(encodeHole(view, 0, 'structured', asked, 2 ** 33, 2 ** 31, true))).toBe(
      `668e33ef00010002${COOKIE}0000000c000000020000000080000000`,
    );
    expect(hex(encodeHole(view, 0, 'extended', asked, 1, 2, true))).toBe(
      `6e8a278c00010002${COOKIE}0000000200000007000000000000000c000000000000000100000002`,
    );
  });

  it('says what there is', () => {
    let bytes = encodeStatus(view, 0, 'structured', asked, 3, 2, true);
    bytes += encodeExtent(view, bytes, 'structured', 512, 3);
    bytes += encodeExtent(view, bytes, 'structured', 4096, 0);
    expect(hex(bytes)).toBe(
      `668e33ef00010005${COOKIE}00000014${'00000003'}0000020000000003${'0000100000000000'}`,
    );
    bytes = encodeStatus(view, 0, 'extended', asked, 3, 1, false);
    bytes += encodeExtent(view, bytes, 'extended', 2 ** 40, 1);
    expect(hex(bytes)).toBe(
      `6e8a278c00000006${COOKIE}00000002000000070000000000000018${'0000000300000001'}00000100000000000000000000000001`,
    );
  });
});
