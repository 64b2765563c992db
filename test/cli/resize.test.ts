import { copyFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { beforeAll, describe, expect, it } from 'vitest';
import { temporaryFolder } from '../block/qcow2-support.js';
import { lastObject, stillframe } from '../support/cli.js';
import { hasPeer, run } from '../support/peers.js';

const folder = temporaryFolder();
const at = (name: string): string => join(folder, name);
const sizeOf = (name: string): unknown =>
  JSON.parse(run('qemu-img', ['info', '--output=json', at(name)]))['virtual-size'];

describe.skipIf(!hasPeer('qemu-img'))('stillframe resize', () => {
  beforeAll(() => {
    run('qemu-img', ['create', '-q', '-f', 'qcow2', at('start.qcow2'), '4M']);
    writeFileSync(at('start.raw'), Buffer.alloc(4 << 20, 1));
  });

  it.each([
    [['IMAGE', '8M'], 8 << 20],
    [['IMAGE', '+1M'], 5 << 20],
    [['--shrink', 'IMAGE', '--', '-1M'], 3 << 20],
    [['--shrink', 'IMAGE', '-1M'], 3 << 20],
    [['--shrink', '-f', 'qcow2', 'IMAGE', '512k'], 512 << 10],
    [['--preallocation', 'metadata', 'IMAGE', '8M'], 8 << 20],
    [['--preallocation=full', 'IMAGE', '+512'], (4 << 20) + 512],
  ] as const)('%j', (words, size) => {
    copyFileSync(at('start.qcow2'), at('image'));
    const done = stillframe(['resize', ...words.map((word) => (word === 'IMAGE' ? at('image') : word))]);
    expect(done).toEqual({ status: 0, stdout: 'Image resized.\n', stderr: '' });
    expect(sizeOf('image')).toBe(size);
    run('qemu-img', ['check', '-q', at('image')]);
  });

  it('says the new size as JSON, and nothing with --quiet', () => {
    copyFileSync(at('start.raw'), at('image'));
    const json = stillframe(['resize', '-f', 'raw', '--output', 'json', at('image'), '+1k']);
    expect(lastObject(json.stdout)).toMatchObject({
      'virtual-size': (4 << 20) + 1024,
      filename: at('image'),
    });
    expect(stillframe(['resize', '-q', '-f', 'raw', at('image'), '8M'])).toEqual({
      status: 0,
      stdout: '',
      stderr: '',
    });
  });

  it.each([
    [['IMAGE', '1M'], 'Use the --shrink option to perform a shrink operation'],
    [['--shrink', 'IMAGE', '--', '-4M'], 'New image size must be positive'],
    [['--shrink', '--preallocation=off', 'IMAGE', '--', '-5M'], 'New image size must be positive'],
    [
      ['--shrink', '--preallocation=full', 'IMAGE', '1M'],
      'Preallocation can only be used for growing images',
    ],
    [['IMAGE', '1000001'], 'shrink'],
    [['IMAGE', '5000001'], 'The new size must be a multiple of 512'],
    [['IMAGE', 'huge'], 'SIZE'],
    [['IMAGE', ''], 'SIZE'],
    [['IMAGE', '+-1M'], 'SIZE'],
    [['IMAGE'], 'SIZE'],
    [['--preallocation=some', 'IMAGE', '8M'], 'preallocation'],
  ] as const)('refuses %j', (words, message) => {
    copyFileSync(at('start.qcow2'), at('image'));
    const done = stillframe(['resize', ...words.map((word) => (word === 'IMAGE' ? at('image') : word))]);
    expect(done).toMatchObject({ status: 1, stdout: '', stderr: expect.stringContaining(message) });
    expect(sizeOf('image')).toBe(4 << 20);
  });
});
