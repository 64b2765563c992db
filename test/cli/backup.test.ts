import { spawnSync } from 'node:child_process';
import {
  chmodSync,
  existsSync,
  linkSync,
  mkdirSync,
  mkdtempSync,
  openSync,
  readdirSync,
  readFileSync,
  rmSync,
  statSync,
  symlinkSync,
  truncateSync,
  writeFileSync,
  writeSync,
} from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { CLI, lastObject, startStillframe, stillframe } from '../support/cli.js';
import { firstDifference, Random } from '../support/data.js';
import { hasPeer, run } from '../support/peers.js';
import { runInSmallFileSystem, SMALL_FILE_SYSTEM_NEEDED } from '../support/small-file-system.js';

let folder: string;
beforeEach(() => {
  folder = mkdtempSync(join(tmpdir(), 'stillframe-backup-'));
});
afterEach(() => rmSync(folder, { recursive: true, force: true }));
const at = (name: string): string => join(folder, name);
const random = new Random(2024);

function createImage(...args: string[]): void {
  const { status, stderr } = stillframe(['create', '-q', ...args], { cwd: folder });
  if (status !== 0) throw new Error(stderr);
}

/** Refused or failed: one line on stderr with the code, the same as the last object on stdout, nothing else left. */
function expectError(args: readonly string[], code: string, left: readonly string[]): string {
  const { status, stdout, stderr } = stillframe([...args, '--output', 'json', '--progress', 'none'], {
    cwd: folder,
  });
  const object = lastObject(stdout);
  expect(object).toEqual({ type: 'error', code, message: expect.any(String) });
  expect(stderr).toBe(`stillframe: ${String(object['message'])} [${code}]\n`);
  expect(status).toBe(1);
  expect(readdirSync(folder).sort()).toEqual([...left].sort());
  return String(object['message']);
}

describe('stillframe backup', () => {
  it('writes into an image with an external data file that is there', () => {
    writeFileSync(at('disk.raw'), random.bytes(1 << 20));
    createImage('-f', 'qcow2', '-o', 'data_file=copy.data', 'copy.qcow2', '1M');
    const args = ['backup', 'disk.raw', 'copy.qcow2', '--sync', 'full', '--format', 'qcow2', '--existing'];
    const { status, stderr } = stillframe([...args, '--source-format', 'raw', '-q'], { cwd: folder });
    expect(stderr).toBe('');
    expect(status).toBe(0);
    expect(firstDifference(readFileSync(at('copy.data')), readFileSync(at('disk.raw')))).toBe(-1);
  });

  it('prints one result object with --output json', () => {
    const data = random.bytes(1_000_000).fill(0, 65536, 65536 * 3);
    writeFileSync(at('disk.raw'), data);
    const args = [
      'backup',
      'disk.raw',
      'copy.qcow2',
      '--sync',
      'full',
      '--format',
      'qcow2',
      '--output',
      'json',
    ];
    const { status, stdout, stderr } = stillframe(args, { cwd: folder });
    expect({ status, stderr }).toEqual({ status: 0, stderr: '' });
    expect(stdout.trimEnd().split('\n')).toHaveLength(1);
    const result = lastObject(stdout);
    expect(result).toEqual({
      type: 'result',
      sync: 'full',
      virtualSize: 1_000_448,
      clusterSize: 65536,
      clusters: { total: 16, planned: 16, copied: expect.any(Number), zero: expect.any(Number), cbw: 0 },
      bytes: { read: expect.any(Number), written: expect.any(Number) },
      durationMs: expect.any(Number),
      checksum: { algorithm: 'xxh3-64', root: expect.stringMatching(/^[0-9a-f]{16}$/) },
    });
    expect(readdirSync(folder).sort()).toEqual(['copy.qcow2', 'disk.raw']);
    expect(stillframe(['compare', 'disk.raw', 'copy.qcow2'], { cwd: folder }).status).toBe(0);
  });

  it('tells people what it did', () => {
    writeFileSync(at('disk.raw'), random.bytes(1 << 20));
    const { status, stdout, stderr } = stillframe(['backup', 'disk.raw', 'copy.raw', '--sync', 'full'], {
      cwd: folder,
    });
    expect({ status, stderr }).toEqual({ status: 0, stderr: '' });
    expect(stdout).toMatch(/^target: .*copy\.raw\nsync: +full\nsize: +1 MiB \(1048576 bytes\)\n/);
    expect(stdout).toMatch(/\nchecksum: +xxh3-64 [0-9a-f]{16}\n$/);
    const quiet = stillframe(['backup', 'disk.raw', 'copy.raw', '--sync', 'full', '--force', '-q'], {
      cwd: folder,
    });
    expect(quiet).toEqual({ status: 0, stdout: '', stderr: '' });
  });

  it('reports progress as JSON lines on stderr', () => {
    writeFileSync(at('disk.raw'), random.bytes(4 << 20));
    const args = ['backup', 'disk.raw', 'copy.raw', '--sync', 'full', '--progress', 'json', '--speed', '16M'];
    const { status, stderr } = stillframe(args, { cwd: folder });
    expect(status).toBe(0);
    const lines = stderr.trimEnd().split('\n');
    const states = lines.map((line): Record<string, unknown> => JSON.parse(line));
    expect(states.length).toBeGreaterThan(1);
    const last = states.at(-1);
    expect(last).toMatchObject({ type: 'progress', offset: 4 << 20, length: 4 << 20 });
    const offsets = states.map((state) => Number(state['offset']));
    expect(offsets).toEqual([...offsets].sort((a, b) => a - b));
  });

  it('--sync top keeps the backing file and copies the top image only', () => {
    writeFileSync(at('base.raw'), random.bytes(1 << 20));
    createImage('-f', 'qcow2', '-b', 'base.raw', '-F', 'raw', 'overlay.qcow2');
    const args = ['backup', 'overlay.qcow2', 'copy.qcow2', '--sync', 'top', '--output', 'json'];
    const { status, stdout } = stillframe(args, { cwd: folder });
    expect(status).toBe(0);
    expect(lastObject(stdout)).toMatchObject({ sync: 'top', clusters: { total: 16, planned: 0, copied: 0 } });
    const info = JSON.parse(stillframe(['info', '--output', 'json', 'copy.qcow2'], { cwd: folder }).stdout);
    expect(info).toMatchObject({ 'backing-filename': 'base.raw', 'backing-filename-format': 'raw' });
    expect(stillframe(['compare', 'overlay.qcow2', 'copy.qcow2'], { cwd: folder }).status).toBe(0);
  });

  it('--sync none makes an image on top of the source', () => {
    writeFileSync(at('disk.raw'), random.bytes(1 << 20));
    const args = [
      'backup',
      'disk.raw',
      'copy.qcow2',
      '--sync',
      'none',
      '--format',
      'qcow2',
      '--output',
      'json',
    ];
    const { status, stdout } = stillframe(args, { cwd: folder });
    expect(status).toBe(0);
    expect(lastObject(stdout)).toMatchObject({
      sync: 'none',
      clusters: { total: 16, planned: 0, copied: 0 },
    });
    expect(stillframe(['compare', 'disk.raw', 'copy.qcow2'], { cwd: folder }).status).toBe(0);
  });

  it('works where the FFI is not available', () => {
    const data = random.bytes(3_000_000).fill(0, 1 << 20, 2 << 20);
    writeFileSync(at('disk.raw'), data);
    for (const format of ['raw', 'qcow2']) {
      const args = ['backup', 'disk.raw', `copy.${format}`, '--sync', 'full', '--format', format];
      const { status, stderr } = stillframe(args, { cwd: folder, env: { STILLFRAME_NO_FFI: '1' } });
      expect({ status, stderr }).toEqual({ status: 0, stderr: '' });
      expect(stillframe(['compare', 'disk.raw', `copy.${format}`], { cwd: folder }).status).toBe(0);
      if (format === 'qcow2' && hasPeer('qemu-img')) run('qemu-img', ['check', '-q', at('copy.qcow2')]);
    }
    expect(statSync(at('copy.raw')).blocks * 512).toBeLessThan(2_500_000);
  });
});

describe('stillframe backup refuses', () => {
  it.each<[string, string[]]>([
    ['no mode', ['backup', 'disk.raw', 'copy.raw']],
    ['an unknown mode', ['backup', 'disk.raw', 'copy.raw', '--sync', 'most']],
    ['no target', ['backup', 'disk.raw', '--sync', 'full']],
    ['too many arguments', ['backup', 'disk.raw', 'a', 'b', '--sync', 'full']],
    ['an unknown option', ['backup', 'disk.raw', 'a', '--sync', 'full', '--frobnicate']],
    ['an unknown format', ['backup', 'disk.raw', 'a', '--sync', 'full', '--format', 'vmdk']],
    ['a bad rate', ['backup', 'disk.raw', 'a', '--sync', 'full', '--speed', 'fast']],
    ['no workers', ['backup', 'disk.raw', 'a', '--sync', 'full', '--workers', '0']],
    ['an unknown progress style', ['backup', 'disk.raw', 'a', '--sync', 'full', '--progress', 'loud']],
    ['a bad cluster size', ['backup', 'disk.raw', 'a', '--sync', 'full', '--cluster-size', '3']],
  ])('%s', (_, args) => {
    writeFileSync(at('disk.raw'), new Uint8Array(65536));
    const { status, stdout, stderr } = stillframe(args, { cwd: folder });
    expect(status).toBe(1);
    expect(stdout).toBe('');
    expect(stderr).toMatch(/^stillframe: .+ \[ERR_STILLFRAME_INVALID_ARGUMENT\]\n$/);
    expect(readdirSync(folder)).toEqual(['disk.raw']);
  });

  it('a source that is not there', () => {
    const message = expectError(
      ['backup', 'gone.raw', 'copy', '--sync', 'full'],
      'ERR_STILLFRAME_NOT_FOUND',
      [],
    );
    expect(message).toContain('gone.raw');
  });

  it('a folder as source', () => {
    mkdirSync(at('folder'));
    expectError(['backup', 'folder', 'copy', '--sync', 'full'], 'ERR_STILLFRAME_FORMAT', ['folder']);
  });

  it.each(['source', 'symbolic link', 'hard link', 'backing file'])('the %s as target', (what) => {
    writeFileSync(at('base.raw'), random.bytes(65536));
    createImage('-f', 'qcow2', '-b', 'base.raw', '-F', 'raw', 'disk.qcow2');
    if (what === 'symbolic link') symlinkSync('disk.qcow2', at('link'));
    if (what === 'hard link') linkSync(at('disk.qcow2'), at('link'));
    const target = { source: 'disk.qcow2', 'backing file': 'base.raw' }[what] ?? 'link';
    const before = readFileSync(at('disk.qcow2'));
    const left = readdirSync(folder);
    for (const flag of ['--force', '--existing']) {
      const args = ['backup', 'disk.qcow2', target, '--sync', 'full', '--format', 'qcow2', flag];
      expectError(args, 'ERR_STILLFRAME_SAME_NODE', left);
    }
    expect(readFileSync(at('disk.qcow2')).equals(before)).toBe(true);
  });

  it('a file that is there already', () => {
    writeFileSync(at('disk.raw'), new Uint8Array(65536));
    writeFileSync(at('copy'), 'precious');
    const left = ['copy', 'disk.raw'];
    const args = ['backup', 'disk.raw', 'copy', '--sync', 'full'];
    expect(expectError(args, 'ERR_STILLFRAME_TARGET_EXISTS', left)).toContain('--force');
    expect(readFileSync(at('copy'), 'utf8')).toBe('precious');
  });

  it('raw targets of top and none', () => {
    writeFileSync(at('base.raw'), new Uint8Array(65536));
    createImage('-f', 'qcow2', '-b', 'base.raw', '-F', 'raw', 'disk.qcow2');
    const left = ['base.raw', 'disk.qcow2'];
    for (const mode of ['top', 'none']) {
      const args = ['backup', 'disk.qcow2', 'copy', '--sync', mode, '--format', 'raw'];
      expectError(args, 'ERR_STILLFRAME_BACKING_UNSUPPORTED', left);
    }
  });

  it('a target of another size', () => {
    writeFileSync(at('disk.raw'), new Uint8Array(65536));
    writeFileSync(at('copy'), new Uint8Array(65536 * 2));
    const args = ['backup', 'disk.raw', 'copy', '--sync', 'full', '--format', 'raw', '--existing'];
    expectError(args, 'ERR_STILLFRAME_SIZE_MISMATCH', ['copy', 'disk.raw']);
  });

  it('a folder that cannot be written to', () => {
    writeFileSync(at('disk.raw'), new Uint8Array(65536));
    expectError(['backup', 'disk.raw', 'nowhere/copy', '--sync', 'full'], 'ERR_STILLFRAME_NOT_FOUND', [
      'disk.raw',
    ]);
    // Root writes anywhere: sysfs says no to everybody.
    const { status, stderr } = stillframe(['backup', 'disk.raw', '/sys/copy', '--sync', 'full'], {
      cwd: folder,
    });
    expect(status).toBe(1);
    expect(stderr).toMatch(/\[ERR_STILLFRAME_(PERMISSION|READ_ONLY)\]/);
  });

  it.skipIf(process.getuid?.() === 0)('a read-only target', () => {
    writeFileSync(at('disk.raw'), new Uint8Array(65536));
    writeFileSync(at('copy'), new Uint8Array(65536));
    chmodSync(at('copy'), 0o444);
    const args = ['backup', 'disk.raw', 'copy', '--sync', 'full', '--format', 'raw', '--existing'];
    expectError(args, 'ERR_STILLFRAME_PERMISSION', ['copy', 'disk.raw']);
  });
});

describe('hostile and broken chains', () => {
  /** Makes a backing file name of the header another one of the same length. */
  function rename(image: string, from: string, to: string): void {
    const bytes = readFileSync(at(image));
    const place = bytes.indexOf(from);
    expect(place).toBeGreaterThan(0);
    expect(to.length).toBe(from.length);
    bytes.write(to, place);
    writeFileSync(at(image), bytes);
  }

  beforeEach(() => {
    writeFileSync(at('base.raw'), random.bytes(65536));
    createImage('-f', 'qcow2', '-b', 'base.raw', '-F', 'raw', 'disk.qcow2');
  });
  const left = ['base.raw', 'disk.qcow2'];
  const args = ['backup', 'disk.qcow2', 'copy.qcow2', '--sync', 'full'];

  it('a missing backing file', () => {
    rmSync(at('base.raw'));
    expect(expectError(args, 'ERR_STILLFRAME_BACKING_MISSING', ['disk.qcow2'])).toContain('base.raw');
  });

  it('a backing file outside of the folder, unless it is allowed', () => {
    const other = mkdtempSync(join(tmpdir(), 'stillframe-other-'));
    try {
      writeFileSync(join(other, 'secret.raw'), random.bytes(65536));
      createImage('-f', 'qcow2', '-b', join(other, 'secret.raw'), '-F', 'raw', 'evil.qcow2');
      const all = [...left, 'evil.qcow2'];
      const evil = ['backup', 'evil.qcow2', 'copy.qcow2', '--sync', 'full'];
      expect(expectError(evil, 'ERR_STILLFRAME_BACKING_FORBIDDEN', all)).toContain('--allow-backing');
      // A link inside of the folder leads outside all the same.
      symlinkSync(join(other, 'secret.raw'), at('link.raw'));
      rename('disk.qcow2', 'base.raw', 'link.raw');
      expectError(args, 'ERR_STILLFRAME_BACKING_FORBIDDEN', [...all, 'link.raw']);
      const allowed = stillframe([...evil, '--allow-backing', other], { cwd: folder });
      expect(allowed.status).toBe(0);
    } finally {
      rmSync(other, { recursive: true });
    }
  });

  it.each(['nbd:a:80', 'json:{ }'])('a protocol name: %s', (name) => {
    rename('disk.qcow2', 'base.raw', name);
    expectError(args, 'ERR_STILLFRAME_BACKING_FORBIDDEN', left);
  });

  it('an image that is its own backing file', () => {
    createImage('-f', 'qcow2', '-b', 'disk.qcow2', '-F', 'qcow2', 'one.qcow2');
    createImage('-f', 'qcow2', '-b', 'one.qcow2', '-F', 'qcow2', 'two1.qcow2');
    rename('one.qcow2', 'disk.qcow2', 'two1.qcow2');
    const ring = ['backup', 'two1.qcow2', 'copy.qcow2', '--sync', 'full'];
    expectError(ring, 'ERR_STILLFRAME_BACKING_CYCLE', [...left, 'one.qcow2', 'two1.qcow2']);
  });

  it('a backing file name that plays with the terminal', () => {
    rename('disk.qcow2', 'base.raw', '\u001b[2J\u0007\r\n\n');
    const { stderr, stdout } = stillframe(args, { cwd: folder });
    expect(stderr).toContain('[ERR_STILLFRAME_BACKING_MISSING]');
    expect(stillframe(['info', 'disk.qcow2'], { cwd: folder }).stdout).toContain('backing file: ?[2J????');
    expect(stderr.trimEnd() + stdout).not.toMatch(/[\p{Cc}]/u);
  });

  it('a chain deeper than 200 images', () => {
    const count = 202;
    createImage('-f', 'qcow2', 'c000.qcow2', '64k');
    createImage('-f', 'qcow2', '-b', 'c000.qcow2', '-F', 'qcow2', 'c001.qcow2');
    const template = readFileSync(at('c001.qcow2'));
    const place = template.indexOf('c000.qcow2');
    for (let index = 1; index < count; index++) {
      template.write(`c${String(index - 1).padStart(3, '0')}`, place);
      writeFileSync(at(`c${String(index).padStart(3, '0')}.qcow2`), template);
    }
    const all = readdirSync(folder);
    const deepest = ['backup', 'c201.qcow2', 'copy.qcow2', '--sync', 'full'];
    expectError(deepest, 'ERR_STILLFRAME_BACKING_DEPTH', all);
    const fits = stillframe(['backup', 'c150.qcow2', 'copy.qcow2', '--sync', 'full'], { cwd: folder });
    expect(fits.stderr).toBe('');
    expect(fits.status).toBe(0);
  });

  it('a truncated image', () => {
    truncateSync(at('disk.qcow2'), 100_000);
    const { status, stderr } = stillframe(args, { cwd: folder });
    expect(status).toBe(1);
    expect(stderr).toContain('ERR_STILLFRAME_CORRUPT_IMAGE');
    truncateSync(at('disk.qcow2'), 40);
    expectError([...args, '-f', 'qcow2'], 'ERR_STILLFRAME_FORMAT', left);
  });
});

describe('trouble in mid-copy', () => {
  it('a damaged L2 table: one error, nothing left, the source untouched', () => {
    writeFileSync(at('content.raw'), random.noise(40 << 20));
    const make = ['backup', 'content.raw', 'disk.qcow2', '--sync', 'full', '--format', 'qcow2'];
    expect(stillframe([...make, '--cluster-size', '4k'], { cwd: folder }).status).toBe(0);
    // With 4 KiB clusters an L2 table covers 2 MiB: the one in the middle gets reserved bits.
    const bytes = readFileSync(at('disk.qcow2'));
    const table = Number(
      bytes.readBigUInt64BE(Number(bytes.readBigUInt64BE(40)) + 10 * 8) & 0x00fffffffffffe00n,
    );
    const fd = openSync(at('disk.qcow2'), 'r+');
    writeSync(fd, Buffer.from('7fffffffffffff00', 'hex'), 0, 8, table + 80);
    const before = readFileSync(at('disk.qcow2'));
    const args = ['backup', 'disk.qcow2', 'copy.raw', '--sync', 'full', '--format', 'raw'];
    const message = expectError(args, 'ERR_STILLFRAME_CORRUPT_IMAGE', ['content.raw', 'disk.qcow2']);
    expect(message).toContain(`L2 table at offset ${table}`);
    expect(readFileSync(at('disk.qcow2')).equals(before)).toBe(true);
  });

  it.for(['raw', 'qcow2'])('a full file system: one error, nothing left (%s)', (format, { skip }) => {
    writeFileSync(at('disk.raw'), random.noise(20 << 20));
    const command = [process.execPath, CLI, 'backup', at('disk.raw'), 'copy', '--sync', 'full'];
    command.push('--format', format, '--progress', 'none');
    const output = runInSmallFileSystem('6m', command);
    if (output === undefined) skip(SMALL_FILE_SYSTEM_NEEDED);
    expect(output?.stderr).toMatch(
      /^stillframe: .*No space left on device.* \[ERR_STILLFRAME_NO_SPACE\]\n$/i,
    );
    expect(output?.stdout).toBe('status 1\n');
  });

  it('a file of 7 EiB: one error', ({ skip }) => {
    const script = 'truncate -s 7E huge.raw && "$@"; status=$?; rm huge.raw; exit $status';
    for (const command of [
      ['info', 'huge.raw'],
      ['backup', 'huge.raw', 'copy', '--sync', 'full'],
    ]) {
      const output = runInSmallFileSystem('1m', [
        'sh',
        '-c',
        script,
        'sh',
        process.execPath,
        CLI,
        ...command,
      ]);
      if (output === undefined) skip(SMALL_FILE_SYSTEM_NEEDED);
      expect(output?.stderr).toMatch(/^stillframe: .*2\^53.*\[ERR_STILLFRAME_UNSUPPORTED_FEATURE\]\n$/);
      expect(output?.stdout).toBe('status 1\n');
    }
  });

  it('SIGINT: cancelled, exit status 130, nothing left', async () => {
    writeFileSync(at('disk.raw'), random.noise(16 << 20));
    const args = [
      'backup',
      at('disk.raw'),
      at('copy.raw'),
      '--sync',
      'full',
      '--speed',
      '1M',
      '--output',
      'json',
    ];
    const { child, finished } = startStillframe(args);
    while (!existsSync(at('copy.raw.partial'))) await new Promise((resolve) => setTimeout(resolve, 10));
    await new Promise((resolve) => setTimeout(resolve, 100));
    child.kill('SIGINT');
    const { status, stdout } = await finished;
    expect(status).toBe(130);
    expect(lastObject(stdout)).toMatchObject({ type: 'error', code: 'ERR_STILLFRAME_JOB_CANCELLED' });
    expect(readdirSync(folder)).toEqual(['disk.raw']);
  });

  it('SIGKILL: only the partial file is left, and the next run replaces it', async () => {
    const data = random.noise(16 << 20);
    writeFileSync(at('disk.raw'), data);
    const args = ['backup', at('disk.raw'), at('copy.raw'), '--sync', 'full'];
    const { child, finished } = startStillframe([...args, '--speed', '1M']);
    while (!existsSync(at('copy.raw.partial'))) await new Promise((resolve) => setTimeout(resolve, 10));
    await new Promise((resolve) => setTimeout(resolve, 100));
    child.kill('SIGKILL');
    expect((await finished).signal).toBe('SIGKILL');
    expect(readdirSync(folder).sort()).toEqual(['copy.raw.partial', 'disk.raw']);
    expect(firstDifference(readFileSync(at('disk.raw')), data)).toBe(-1);
    expect(stillframe(args).status).toBe(0);
    expect(readdirSync(folder).sort()).toEqual(['copy.raw', 'disk.raw']);
  });

  it('a second backup to the same target while the first one runs', async () => {
    writeFileSync(at('disk.raw'), random.noise(16 << 20));
    const args = ['backup', at('disk.raw'), at('copy.raw'), '--sync', 'full', '--speed', '1M'];
    const { child, finished } = startStillframe(args);
    while (!existsSync(at('copy.raw.partial'))) await new Promise((resolve) => setTimeout(resolve, 10));
    await new Promise((resolve) => setTimeout(resolve, 100));
    expectError(args, 'ERR_STILLFRAME_LOCKED', ['copy.raw.partial', 'disk.raw']);
    child.kill('SIGINT');
    expect((await finished).status).toBe(130);
  });
});

describe('the program', () => {
  it('explains itself', () => {
    const { version }: { version: string } = JSON.parse(
      readFileSync(new URL('../../package.json', import.meta.url), 'utf8'),
    );
    expect(stillframe(['--version'])).toEqual({ status: 0, stdout: `stillframe ${version}\n`, stderr: '' });
    const help = stillframe(['--help']);
    expect(help.status).toBe(0);
    for (const name of ['create', 'info', 'map', 'compare', 'backup', 'demo']) {
      expect(help.stdout).toContain(`\n  ${name} `);
      const one = stillframe([name, '--help']);
      expect(one.status).toBe(0);
      expect(one.stdout).toContain(`usage: stillframe ${name}`);
    }
    expect(stillframe([])).toMatchObject({ status: 1, stdout: '', stderr: help.stdout });
    expect(stillframe(['frobnicate'])).toMatchObject({
      status: 1,
      stderr: expect.stringContaining("there is no command 'frobnicate'"),
    });
  });

  it('ends quietly when nobody reads on', () => {
    writeFileSync(at('disk.raw'), '');
    truncateSync(at('disk.raw'), 1 << 30);
    const fd = openSync(at('disk.raw'), 'r+');
    for (let index = 0; index < 5000; index++) writeSync(fd, 'x', index * 8192);
    const line = `"${process.execPath}" "${CLI}" map --output json disk.raw | head -1`;
    const { stderr, stdout } = spawnSync('bash', ['-c', line], { cwd: folder, encoding: 'utf8' });
    expect(stderr).toBe('');
    expect(stdout).toContain('"start": 0,');
  });
});
