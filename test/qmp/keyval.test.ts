import { describe, expect, it } from 'vitest';
import { BLOCKDEV } from '#src/qmp/blockdev-schema.js';
import { parseKeyval, parseOption } from '#src/qmp/keyval.js';

describe('keys and values', () => {
  it.each([
    ['a=1,b=2', { a: '1', b: '2' }],
    ['raw,node-name=n', { driver: 'raw', 'node-name': 'n' }],
    ['a.b.c=1,a.b.d=2,a.e=3', { a: { b: { c: '1', d: '2' }, e: '3' } }],
    ['a=x,,y,b=,,', { a: 'x,y', b: ',' }],
    ['l.0=a,l.1=b', { l: ['a', 'b'] }],
    ['l.1.x=b,l.0.x=a', { l: [{ x: 'a' }, { x: 'b' }] }],
    ['a=b=c', { a: 'b=c' }],
    ['a=', { a: '' }],
    ['', {}],
  ])('%j', (text, expected) => {
    expect(parseKeyval(text, 'driver')).toEqual(expected);
  });

  it.each([
    ['a=1,b', "Expected '=' after parameter 'b'"],
    ['a.b=1,a=2', 'used inconsistently'],
    ['a=1,a.b=2', 'used inconsistently'],
    ['l.0=a,l.2=b', "Parameter '1' missing"],
    ['a..b=1', 'Invalid parameter'],
    ['=1', "Expected '='"],
    ['__proto__=1', 'Invalid parameter'],
    ['a.__proto__.b=1', 'Invalid parameter'],
    [`${'a.'.repeat(100)}b=1`, 'too many parts'],
    ['x'.repeat(2 ** 20 + 1), 'too long'],
  ])('refuses %.40j', (text, message) => {
    expect(() => parseKeyval(text)).toThrow(message);
  });
});

describe('options of a node', () => {
  it.each([
    [
      'qcow2,node-name=n,read-only=on,file.driver=file,file.filename=/a',
      { driver: 'qcow2', 'node-name': 'n', 'read-only': true, file: { driver: 'file', filename: '/a' } },
    ],
    ['raw,file=below,offset=1M,size=64k', { driver: 'raw', file: 'below', offset: 1 << 20, size: 65536 }],
    ['null-co,size=0x10', { driver: 'null-co', size: 16 }],
    [
      'blkdebug,image=x,inject-error.0.event=none,inject-error.0.errno=28,inject-error.0.once=on',
      { driver: 'blkdebug', image: 'x', 'inject-error': [{ event: 'none', errno: 28, once: true }] },
    ],
    ['{"driver":"qcow2","file":"f","backing":null}', { driver: 'qcow2', file: 'f', backing: null }],
  ])('%j', (text, expected) => {
    expect(parseOption(text, BLOCKDEV, 'driver')).toEqual(expected);
  });

  it.each([
    ['qcow2', "Parameter 'file' is missing"],
    ['qcow2,file.driver=file', "Parameter 'file.filename' is missing"],
    ['qcow2,file=f,x=1', "Parameter 'x' is unexpected"],
    ['raw,file=f,offset=many', "Parameter 'offset' expects uint64"],
    ['{"driver":"raw","file":5}', "Invalid parameter type for 'file', expected: BlockdevRef"],
    ['{"driver":"raw","file":{"driver":"raw"}}', "Parameter 'file.file' is missing"],
    ['[]', "Parameter 'driver' does not accept value '[]'"],
    ['{"driver"', 'JSON parse error'],
  ])('refuses %j', (text, message) => {
    expect(() => parseOption(text, BLOCKDEV, 'driver')).toThrow(message);
  });

  it('are not nested for ever', () => {
    let nested: unknown = 'bottom';
    for (let depth = 0; depth < 2000; depth++) nested = { driver: 'raw', file: nested };
    expect(() => parseOption(JSON.stringify(nested), BLOCKDEV, 'driver')).toThrow('nested too deeply');
  });
});
