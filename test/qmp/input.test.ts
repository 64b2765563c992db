import { describe, expect, it } from 'vitest';
import { type Input, InputReader } from '#src/qmp/input.js';
import { Random } from '../support/data.js';

const read = (...chunks: string[]): Input[] => {
  const reader = new InputReader();
  return chunks.flatMap((chunk) => [...reader.push(chunk)]);
};

describe('the input of a monitor', () => {
  it('is taken apart into values, whatever its pieces are', () => {
    const text = '{"a": [1, {"b": "}]\\"{"}]}\n{"c":null}["x"]"y" 5 true\n{\'d\': \'it\\\'s "so"\'}\n';
    const values = [{ a: [1, { b: '}]"{' }] }, { c: null }, ['x'], 'y', 5, true, { d: 'it\'s "so"' }];
    const expected = values.map((value) => ({ value }));
    expect(read(text)).toEqual(expected);
    expect(read(...text)).toEqual(expected);
  });

  it('waits for what is not complete', () => {
    expect(read('{"a": ')).toEqual([]);
    expect(read('{"a": ', '1', '}')).toEqual([{ value: { a: 1 } }]);
    expect(read('12')).toEqual([]);
    expect(read('12', ' ')).toEqual([{ value: 12 }]);
  });

  it('goes on behind what is wrong', () => {
    expect(read('{bad}{"a":1}')).toEqual([
      { error: "JSON parse error, invalid keyword 'bad'" },
      { value: { a: 1 } },
    ]);
    expect(read('}', '{"a":1}')).toEqual([
      { error: 'JSON parse error, expecting value' },
      { value: { a: 1 } },
    ]);
    expect(read('[1}', '{"a":1}').at(-1)).toEqual({ value: { a: 1 } });
    // A control character puts both sides in step again.
    expect(read('{"a": {\u0001', '{"a":1}').at(-1)).toEqual({ value: { a: 1 } });
  });

  it('keeps no more than it must', () => {
    const reader = new InputReader();
    const long = `{"a": "${'x'.repeat(70_000)}`;
    const found: Input[] = [...reader.push(long)];
    for (let index = 0; index < 20; index++) found.push(...reader.push('y'.repeat(70_000)));
    expect(found).toContainEqual({ error: 'JSON token size limit exceeded' });
    expect([...reader.push('{"b":1}')].at(-1)).toEqual({ value: { b: 1 } });
    expect(read('['.repeat(2000), '\n{"b":1}').some((input) => 'error' in input)).toBe(true);
  });

  it('goes on behind a string without an end, and behind what lies too deep', () => {
    expect(read('{"a":"b\n{"c":1}').at(-1)).toEqual({ value: { c: 1 } });
    const deep = `${'['.repeat(1025)}${']'.repeat(1025)}`;
    const found = read(`${deep}{"c":1}`);
    expect(found[0]).toEqual({ error: 'JSON nesting depth limit exceeded' });
    expect(found.at(-1)).toEqual({ value: { c: 1 } });
    expect(read('['.repeat(1024) + ']'.repeat(1024))).toHaveLength(1);
  });

  it('never throws', () => {
    const random = new Random(7);
    const pieces = [
      '{',
      '}',
      '[',
      ']',
      '"',
      "'",
      '\\',
      ':',
      ',',
      'a',
      '1',
      'null',
      ' ',
      '\n',
      '\u0002',
      '\ud800',
    ];
    for (let round = 0; round < 3000; round++) {
      const reader = new InputReader();
      for (let index = 0; index < 12; index++) {
        for (const input of reader.push(pieces[random.between(0, pieces.length - 1)] ?? ''))
          expect(input).toBeTypeOf('object');
      }
    }
  });
});
