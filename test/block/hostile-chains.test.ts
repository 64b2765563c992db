import { spawnSync } from 'node:child_process';
import { linkSync, mkdirSync, mkdtempSync, realpathSync, rmSync, symlinkSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeEach, describe, expect, it } from 'vitest';
import { filesOf } from '#src/block/files.js';
import { closeNode, openImage } from '#src/block/graph.js';
import { imageInfo } from '#src/block/info.js';
import { EXTENSION, Qcow2Bytes } from '../support/qcow2-bytes.js';
import { Workbench } from './qcow2-support.js';

const FORBIDDEN = 'ERR_STILLFRAME_BACKING_FORBIDDEN';
const MISSING = 'ERR_STILLFRAME_BACKING_MISSING';
const bench = new Workbench();
const root = realpathSync(mkdtempSync(join(tmpdir(), 'stillframe-chains-')));
afterAll(() => rmSync(root, { recursive: true, force: true }));
/** The folder of the image; whatever is beside it must not be opened. */
const folder = join(root, 'images');
const at = (name: string): string => join(folder, name);

function overlay(path: string, backing: string | Uint8Array, format: string | undefined = 'raw'): void {
  bench.create(path, { length: 1 << 20, clusterBits: 16 });
  const extensions = format === undefined ? [] : [[EXTENSION.backingFormat, Buffer.from(format)] as const];
  Qcow2Bytes.read(path).setHead(extensions, Buffer.from(backing)).save(path);
}

/** Opens and closes an image; returns the files it is made of. */
function open(path: string, backing?: readonly string[] | false): string[] {
  const descriptor = openImage(bench.runtime, path, { readOnly: true, backing });
  try {
    imageInfo(bench.runtime, descriptor, path);
    return filesOf(descriptor).map((file) => file.path);
  } finally {
    closeNode(bench.runtime, descriptor);
  }
}

function expectRefused(
  code: string,
  words: RegExp,
  path = at('image.qcow2'),
  backing?: readonly string[],
): void {
  const used = bench.runtime.arena.usedBytes;
  const files = openFiles();
  expect(() => open(path, backing)).toThrow(
    expect.objectContaining({ code, message: expect.stringMatching(words) }),
  );
  expect(bench.runtime.arena.usedBytes).toBe(used);
  expect(openFiles()).toBe(files);
  // Who only describes the image opens nothing else.
  expect(open(path, false)).toEqual([path]);
}

function openFiles(): string {
  return spawnSync('ls', ['-l', `/proc/${process.pid}/fd`], { encoding: 'utf8' })
    .stdout.split('\n')
    .filter((line) => line.includes(root))
    .join();
}

beforeEach(() => {
  rmSync(root, { recursive: true, force: true });
  mkdirSync(join(folder, 'inner'), { recursive: true });
  mkdirSync(join(root, 'images-too'));
  for (const name of ['base.raw', 'inner/base.raw', '../secret.raw', '../images-too/secret.raw']) {
    writeFileSync(at(name), Buffer.alloc(65536, 1));
  }
});

describe('the name of a backing file', () => {
  it.each([
    ['base.raw', 'base.raw'],
    ['./inner/../base.raw', 'base.raw'],
    ['inner/base.raw', 'inner/base.raw'],
    ['inner//base.raw', 'inner/base.raw'],
  ])('inside of the folder is followed: %s', (name, path) => {
    overlay(at('image.qcow2'), name);
    expect(open(at('image.qcow2'))).toEqual([at('image.qcow2'), at(path)]);
  });

  it.each([
    ['../secret.raw'],
    ['inner/../../secret.raw'],
    ['../images-too/secret.raw'],
    [join(root, 'secret.raw')],
    ['/etc/passwd'],
    ['/dev/zero'],
    ['/proc/self/environ'],
    ['/proc/self/fd/0'],
  ])('outside of the folder is not: %s', (name) => {
    overlay(at('image.qcow2'), name);
    expectRefused(FORBIDDEN, /image\.qcow2' names the backing file '.*' outside of the allowed folders/);
  });

  it.each([
    ['json:{"driver":"file","filename":"/etc/passwd"}'],
    ['json:{'],
    ['nbd://127.0.0.1:10809/x'],
    ['nbd+unix:///?socket=/tmp/x'],
    ['http://localhost/x'],
    ['ssh://localhost/x'],
    ['rbd:pool/image'],
    ['fat:rw:/etc'],
    ['file:base.raw'],
    ['host_device:/dev/sda'],
    [':'],
    ['a b:c'],
    ['\u0001json:{}'],
  ])('that is a protocol or json: name is never opened: %s', (name) => {
    overlay(at('image.qcow2'), name);
    expectRefused(FORBIDDEN, /protocol and json: names in image headers are never opened/);
  });

  it.each([
    ['is nowhere', 'gone.raw'],
    ['goes through a file', 'base.raw/x'],
    ['is longer than names can be', 'x'.repeat(1000)],
    ['has control characters', '\u001b[2J\r\n'],
    ['ends in a dot too many', 'base.raw.'],
  ])('that %s is said to be missing', (_, name) => {
    overlay(at('image.qcow2'), name);
    expectRefused(MISSING, /backing file '.*' of '.*image\.qcow2' cannot be reached/s);
  });

  it('that is not valid UTF-8 does not lead to a file of a similar name', () => {
    writeFileSync(at('b\ufffdse.raw'), Buffer.alloc(65536));
    overlay(at('image.qcow2'), Buffer.from('b\xe4se.raw', 'latin1'));
    expectRefused(MISSING, /image\.qcow2' names a backing file .* not valid UTF-8/);
  });

  it('with a zero byte is damage', () => {
    overlay(at('image.qcow2'), 'base.raw\0.qcow2');
    expect(() => open(at('image.qcow2'), false)).toThrow(
      expect.objectContaining({
        code: 'ERR_STILLFRAME_CORRUPT_IMAGE',
        message: expect.stringMatching(/zero byte/),
      }),
    );
  });

  it('that is empty is none', () => {
    overlay(at('image.qcow2'), '');
    expect(open(at('image.qcow2'))).toEqual([at('image.qcow2')]);
  });

  it.each(['vmdk2', 'nbd', 'json:{}', 'raw\0', 'RAW', '\u001b[2J'])(
    'with the format %j is refused',
    (format) => {
      overlay(at('image.qcow2'), 'base.raw', format);
      expectRefused('ERR_STILLFRAME_UNSUPPORTED_FEATURE', /image\.qcow2'.*format/);
    },
  );
});

describe('what a backing file is', () => {
  it('a directory, a FIFO or a device: refused, and nobody waits for its other end', () => {
    spawnSync('mkfifo', [at('fifo')]);
    for (const name of ['inner', 'fifo', '.']) {
      overlay(at('image.qcow2'), name);
      expectRefused('ERR_STILLFRAME_FORMAT', /neither a regular file nor a block device/);
    }
    overlay(at('image.qcow2'), '/dev/zero');
    expectRefused('ERR_STILLFRAME_FORMAT', /'\/dev\/zero' is neither/, at('image.qcow2'), ['/dev']);
  });

  it('a link that leads out of the folder: refused; inside of it: followed', () => {
    overlay(at('image.qcow2'), 'link.raw');
    symlinkSync('../secret.raw', at('link.raw'));
    expectRefused(FORBIDDEN, /outside of the allowed folders/);
    rmSync(at('link.raw'));
    symlinkSync('inner/base.raw', at('link.raw'));
    expect(open(at('image.qcow2'))).toEqual([at('image.qcow2'), at('link.raw')]);
    overlay(at('image.qcow2'), 'way/secret.raw');
    symlinkSync('..', at('way'));
    expectRefused(FORBIDDEN, /outside of the allowed folders/);
  });

  it('a link to itself, or a ring of links: refused', () => {
    symlinkSync('self.raw', at('self.raw'));
    symlinkSync('two.raw', at('one.raw'));
    symlinkSync('one.raw', at('two.raw'));
    for (const name of ['self.raw', 'one.raw']) {
      overlay(at('image.qcow2'), name);
      expectRefused(MISSING, /cannot be reached/);
    }
  });
});

describe('a chain', () => {
  it('that comes back to the image, by whatever name: refused', () => {
    for (const name of ['image.qcow2', './inner/../image.qcow2', 'link.qcow2', 'hard.qcow2']) {
      overlay(at('image.qcow2'), name, 'qcow2');
      rmSync(at('link.qcow2'), { force: true });
      rmSync(at('hard.qcow2'), { force: true });
      symlinkSync('image.qcow2', at('link.qcow2'));
      linkSync(at('image.qcow2'), at('hard.qcow2'));
      expectRefused('ERR_STILLFRAME_BACKING_CYCLE', /is its own backing file/);
    }
  });

  it('that comes back to one of its middle: refused', () => {
    overlay(at('image.qcow2'), 'one.qcow2', 'qcow2');
    overlay(at('one.qcow2'), 'two.qcow2', 'qcow2');
    overlay(at('two.qcow2'), 'one.qcow2', 'qcow2');
    expectRefused(
      'ERR_STILLFRAME_BACKING_CYCLE',
      /one\.qcow2' is its own backing file through '.*two\.qcow2'/,
    );
  });

  it('whose deeper images lead out of the folder of the top image: refused', () => {
    overlay(at('inner/middle.qcow2'), '../../secret.raw');
    overlay(at('image.qcow2'), 'inner/middle.qcow2', 'qcow2');
    expectRefused(FORBIDDEN, /middle\.qcow2' names the backing file '.*secret\.raw'/);
    // The folder of a deeper image is allowed to nobody by that alone.
    overlay(join(root, 'images-too/middle.qcow2'), 'secret.raw');
    overlay(at('image.qcow2'), '../images-too/middle.qcow2', 'qcow2');
    expectRefused(FORBIDDEN, /image\.qcow2' names the backing file '.*middle\.qcow2'/);
    expect(open(at('image.qcow2'), [join(root, 'images-too')])).toHaveLength(3);
  });

  it('whose middle is damaged: the error names the file that is, and all are closed', () => {
    overlay(at('image.qcow2'), 'middle.qcow2', 'qcow2');
    overlay(at('middle.qcow2'), 'base.raw');
    Qcow2Bytes.read(at('middle.qcow2')).put32(20, 5).save(at('middle.qcow2'));
    expectRefused('ERR_STILLFRAME_CORRUPT_IMAGE', /middle\.qcow2'.*cluster_bits.*offset 20/);
  });

  it('of images with the largest tables there are: one error when the memory is used up', () => {
    bench.create(at('c0.qcow2'), { length: 1 << 20, clusterBits: 16 });
    const names = Array.from({ length: 12 }, (_, index) => at(`c${index}.qcow2`));
    for (const [index, path] of names.entries()) {
      if (index > 0) overlay(path, `c${index - 1}.qcow2`, 'qcow2');
      const image = Qcow2Bytes.read(path);
      image.put32(36, 4 << 20).put64(40, 1 << 20);
      image.bytes = Buffer.concat([image.bytes, Buffer.alloc((1 << 20) - image.bytes.length)]);
      image.save(path);
      spawnSync('truncate', ['-s', '40M', path]);
    }
    expectRefused('ERR_STILLFRAME_ARENA_EXHAUSTED', /c\d\.qcow2/, names.at(-1));
  });
});

describe('the image itself', () => {
  it('behind a ring of links, behind a file, or of a name too long: one error that names it', () => {
    symlinkSync('self.qcow2', at('self.qcow2'));
    for (const path of [at('self.qcow2'), at('base.raw/x'), at('x'.repeat(300))]) {
      expect(() => open(path)).toThrow(
        expect.objectContaining({
          code: expect.stringMatching(/^ERR_STILLFRAME_(NOT_FOUND|IO)$/),
          message: expect.stringContaining(path),
        }),
      );
    }
  });
});

describe('the name of an external data file', () => {
  function withDataFile(name: string): void {
    bench.create(at('image.qcow2'), { length: 1 << 20, clusterBits: 16, dataFile: 'base.raw' });
    Qcow2Bytes.read(at('image.qcow2'))
      .setHead([[EXTENSION.dataFile, Buffer.from(name)]])
      .save(at('image.qcow2'));
  }

  it('inside of the folder is followed', () => {
    withDataFile('inner/../base.raw');
    expect(open(at('image.qcow2'))).toEqual([at('image.qcow2'), at('base.raw')]);
  });

  it.each(['../secret.raw', join(root, 'secret.raw'), '/etc/passwd', '/dev/zero'])(
    'outside of the folder is not: %s',
    (name) => {
      withDataFile(name);
      expectRefused(
        FORBIDDEN,
        /image\.qcow2' names the external data file '.*' outside of the allowed folders/,
      );
    },
  );

  it.each([
    'json:{"driver":"file","filename":"/etc/passwd"}',
    'json:{',
    'nbd://127.0.0.1:10809/x',
    'file:base.raw',
    'host_device:/dev/sda',
  ])('that is a protocol or json: name is never opened: %s', (name) => {
    withDataFile(name);
    expectRefused(FORBIDDEN, /protocol and json: names in image headers are never opened/);
  });

  it('that leads to the image, to nothing, to a folder or to a FIFO is refused', () => {
    spawnSync('mkfifo', [at('fifo')]);
    for (const [name, code] of [
      ['image.qcow2', 'ERR_STILLFRAME_BACKING_CYCLE'],
      ['gone.raw', MISSING],
      ['inner', 'ERR_STILLFRAME_FORMAT'],
      ['fifo', 'ERR_STILLFRAME_FORMAT'],
    ] as const) {
      withDataFile(name);
      expect(() => open(at('image.qcow2'))).toThrow(expect.objectContaining({ code }));
    }
  });
});
