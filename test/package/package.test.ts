/** The package as its users get it: packed, installed into an empty folder, run, imported, type-checked. */
import {
  existsSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  rmSync,
  writeFileSync,
} from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { run } from '../support/peers.js';

const root = fileURLToPath(new URL('../..', import.meta.url));
const folder = mkdtempSync(join(tmpdir(), 'stillframe-package-'));
afterAll(() => rmSync(folder, { recursive: true, force: true }));
const at = (...names: string[]): string => join(folder, ...names);

beforeAll(() => {
  // Built already, and other tests are using what was built.
  run('npm', ['pack', '--silent', '--ignore-scripts', '--pack-destination', folder, root]);
  const [tarball] = readdirSync(folder).filter((name) => name.endsWith('.tgz'));
  if (tarball === undefined) throw new Error('npm pack made nothing');
  mkdirSync(at('app'));
  writeFileSync(at('app', 'package.json'), '{ "type": "module", "private": true }');
  const flags = ['--silent', '--no-audit', '--no-fund', '--prefer-offline'];
  run('npm', ['install', ...flags, '--prefix', at('app'), at(tarball)]);
}, 120_000);

const installed = (...names: string[]): string => at('app', 'node_modules', 'stillframe', ...names);

describe('the installed package', () => {
  it('holds what is needed and nothing else', () => {
    expect(readdirSync(installed()).sort()).toEqual(['LICENSE', 'README.md', 'dist', 'package.json']);
    expect(existsSync(installed('dist', 'kernels', 'kernels.wasm'))).toBe(true);
    const manifest: Record<string, unknown> = JSON.parse(readFileSync(installed('package.json'), 'utf8'));
    expect(manifest).toMatchObject({ name: 'stillframe', license: 'Apache-2.0', type: 'module' });
  });

  it.each(['engine/worker.js', 'nbd/server/thread.js'])(
    'has what the thread %s loads in one file',
    (thread) => {
      const imported = [
        ...readFileSync(installed('dist', thread), 'utf8').matchAll(/^import .* from "(.*)";$/gm),
      ];
      expect(imported.length).toBeGreaterThan(0);
      expect(imported.map(([, name]) => name).filter((name) => !name?.startsWith('node:'))).toEqual([]);
    },
  );

  it('runs the CLI', () => {
    const stillframe = at('app', 'node_modules', '.bin', 'stillframe');
    writeFileSync(at('disk.raw'), Buffer.alloc(300_000, 'data'));
    run(stillframe, ['backup', at('disk.raw'), at('copy.qcow2'), '--sync', 'full', '--format', 'qcow2']);
    expect(run(stillframe, ['compare', at('disk.raw'), at('copy.qcow2')])).toBe('Images are identical.\n');
  });

  it('is imported as a library', () => {
    writeFileSync(
      at('app', 'use.js'),
      `import { createEngine, StillframeError } from 'stillframe';
      const engine = await createEngine();
      await engine.createImage(process.argv[2], { format: 'qcow2', length: 1 << 20 });
      const disk = await engine.openDisk(process.argv[2]);
      await disk.write(0, new Uint8Array(512).fill(7));
      const job = await disk.backup({ target: process.argv[3], sync: 'full', format: 'raw' });
      await disk.write(0, new Uint8Array(512).fill(8));
      const { clusters } = await job.result();
      const refused = await engine.openDisk('/nonexistent').catch((error) => error);
      console.log(JSON.stringify({ clusters, typed: refused instanceof StillframeError, code: refused.code }));
      await engine.close();`,
    );
    const output = run(process.execPath, [at('app', 'use.js'), at('disk.qcow2'), at('backup.raw')]);
    expect(JSON.parse(output)).toMatchObject({
      clusters: { total: 16, copied: 1, zero: 15 },
      typed: true,
      code: 'ERR_STILLFRAME_NOT_FOUND',
    });
    expect(
      readFileSync(at('backup.raw'))
        .subarray(0, 512)
        .every((byte) => byte === 7),
    ).toBe(true);
  });

  it('has types that hold without any library but those of Node', () => {
    writeFileSync(
      at('app', 'use.ts'),
      `import { createEngine, type BackupJob, type BackupResult, type Disk, StillframeError } from 'stillframe';
      const engine = await createEngine({ workers: 2 });
      const disk: Disk = await engine.openDisk('disk.qcow2', { readOnly: true });
      const job: BackupJob = await disk.backup({ target: 'copy.qcow2', sync: 'top' });
      for await (const { offset, length, status } of job.progress()) console.log(offset / length, status);
      const result: BackupResult = await job.result();
      const root: string = result.checksum.root;
      const code = (error: unknown) => (error instanceof StillframeError ? error.code : undefined);
      // @ts-expect-error: there is no such mode
      await disk.backup({ target: root, sync: 'most' });
      // @ts-expect-error: a number of bytes
      await disk.read('0', 512);
      console.log(code(undefined) === 'ERR_STILLFRAME_LOCKED');
      // @ts-expect-error: there is no such code
      console.log(code(undefined) === 'ERR_STILLFRAME_WHATEVER');`,
    );
    writeFileSync(
      at('app', 'tsconfig.json'),
      JSON.stringify({
        compilerOptions: {
          target: 'ES2022',
          lib: ['ES2022', 'ESNext.Disposable'],
          module: 'NodeNext',
          strict: true,
          noEmit: true,
          exactOptionalPropertyTypes: true,
          typeRoots: [join(root, 'node_modules', '@types')],
          types: ['node'],
        },
        files: ['use.ts'],
      }),
    );
    run(process.execPath, [join(root, 'node_modules', 'typescript', 'bin', 'tsc'), '-p', at('app')]);
  });
});
