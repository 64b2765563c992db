import { spawnSync } from 'node:child_process';
import { copyFileSync, mkdirSync, readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { parseArguments } from '#src/cli/command.js';
import { namedImage } from '#src/cli/image-names.js';
import { info } from '#src/cli/info.js';
import { createEngine } from '#src/index.js';
import { temporaryFolder } from '../block/qcow2-support.js';
import { stillframe } from '../support/cli.js';
import { firstDifference } from '../support/data.js';
import { hasPeer, run } from '../support/peers.js';

const folder = temporaryFolder();
const at = (name: string): string => join(folder, name);
const engine = await createEngine({ workers: 1 });
afterAll(() => engine.close());

const json = (options: object): string => `json:${JSON.stringify(options)}`;

/** What a command line names. */
const named = (...args: string[]) => {
  const parsed = parseArguments(info, args);
  return namedImage(engine, parsed, parsed.positionals[0] ?? '');
};

describe('names of images', () => {
  it.each([
    [['a'], { path: 'a' }],
    [['-f', 'qcow2', 'a,b=c'], { path: 'a,b=c', format: 'qcow2' }],
    [['--image-opts', 'driver=qcow2,file.filename=a'], { path: 'a', format: 'qcow2' }],
    [['--image-opts', 'driver=qcow2,file.driver=file,file.filename=a,,b'], { path: 'a,b', format: 'qcow2' }],
    [['--image-opts', 'file.filename=a'], { path: 'a' }],
    [['--image-opts', 'driver=file,filename=a'], { path: 'a', format: 'raw' }],
    [['--image-opts', 'driver=raw,file.filename=file:nbd:a'], { path: './nbd:a', format: 'raw' }],
    [
      ['--image-opts', 'driver=raw,file.driver=file,file.filename=nbd:a:1'],
      { path: './nbd:a:1', format: 'raw' },
    ],
    [['--image-opts', 'driver=raw,file.filename=nbd://host/x'], { path: 'nbd://host/x', format: 'raw' }],
    [
      [
        '--image-opts',
        'driver=raw,file.driver=nbd,file.server.type=inet,file.server.host=h,file.server.port=7',
      ],
      { path: 'nbd://h:7/', format: 'raw' },
    ],
    [
      ['--image-opts', 'driver=nbd,server.type=unix,server.path=/s,export=x y'],
      { path: 'nbd+unix:///x%20y?socket=%2Fs', format: 'raw' },
    ],
    [
      ['--image-opts', 'driver=raw,offset=1k,size=512,file.filename=a'],
      { layers: { part: { offset: 1024, size: 512 } } },
    ],
    [[json({ driver: 'raw', offset: 512, file: { filename: 'a' } })], { layers: { part: { offset: 512 } } }],
    [
      [json({ driver: 'qcow2', 'file.filename': 'a', 'file.driver': 'file' })],
      { path: 'a', format: 'qcow2' },
    ],
    [[json({ driver: 'qcow2', file: { filename: 'a' }, backing: null })], { layers: { backing: null } }],
    [
      [
        json({
          driver: 'qcow2',
          file: { filename: 'a' },
          backing: { driver: 'raw', file: { filename: 'b' } },
        }),
      ],
      { layers: { backing: { path: 'b', format: 'raw' } } },
    ],
    [
      [json({ driver: 'qcow2', file: { filename: 'a' }, 'data-file': { driver: 'file', filename: 'b' } })],
      { layers: { dataFile: 'b' } },
    ],
    [['-f', 'raw', json({ driver: 'qcow2', file: { filename: 'a' } })], { path: 'a', format: 'raw' }],
    [
      [json({ driver: 'qcow2', 'read-only': true, file: { filename: 'a', locking: 'off' } })],
      { readOnly: true, forceShare: true },
    ],
  ] as const)('%j', async (args, expected) => {
    expect(await named(...args)).toMatchObject(expected);
  });

  it.each([
    ...[
      'driver=qcow2',
      'driver=nosuch,file.filename=a',
      'driver=qcow2,file.filename=a,foo=1',
      'filename=a',
      'a',
      '',
    ],
    ...[
      'driver=qcow2,file=node',
      'driver=throttle,file.filename=a',
      'driver=qcow2,file.driver=raw,file.file.filename=a',
    ],
    ...[
      'driver=raw,file.filename=a,offset=x',
      'driver=raw,file.filename=a,size=-1',
      'driver=raw,file.driver=nbd',
    ],
    ...['driver=raw,file.filename=a,backing.file.filename=b', 'driver=qcow2,file.driver=file'],
    ...[
      'driver=raw,file.driver=nbd,file.server.type=inet,file.server.host=h,file.server.port=7,file.tls-creds=t',
    ],
  ])('--image-opts %s is one clear error', async (text) => {
    await expect(named('--image-opts', text)).rejects.toThrow(
      expect.objectContaining({ code: 'ERR_STILLFRAME_INVALID_ARGUMENT' }),
    );
  });

  it.each([
    ...['json:', 'json:{', 'json:[]', 'json:"x"', json({}), json({ driver: 7 }), json({ filename: 'a' })],
    ...[
      json({ driver: 'qcow2', file: { filename: 'a' }, 'file.filename': 'b' }),
      json({ file: 7, 'file.x': 1 }),
    ],
    ...[`json:${'{"file":'.repeat(20_000)}1${'}'.repeat(20_000)}`, 'json:{"__proto__.driver": "raw"}'],
  ])('%.40s is one clear error', async (text) => {
    await expect(named(text)).rejects.toThrow(
      expect.objectContaining({ code: 'ERR_STILLFRAME_INVALID_ARGUMENT' }),
    );
  });

  it('are options or of a format', async () => {
    await expect(named('--image-opts', '-f', 'raw', 'driver=raw,file.filename=a')).rejects.toThrow(
      'exclusive',
    );
  });

  it('take credentials for TLS by their object', async () => {
    mkdirSync(at('psk'));
    writeFileSync(at('psk/keys.psk'), 'me:00112233445566778899aabbccddeeff\n');
    const name =
      'driver=raw,file.driver=nbd,file.tls-creds=t,file.server.type=inet,file.server.host=h,file.server.port=7';
    const object = ['--object', `tls-creds-psk,id=t,dir=${at('psk')},username=me,endpoint=client`];
    const { path } = await named(...object, '--image-opts', name);
    expect(path).toBe(
      `nbds://h:7/?${new URLSearchParams({ 'tls-psk-file': at('psk/keys.psk'), 'tls-username': 'me' })}`,
    );
    for (const wrong of [
      'throttle-group,id=t',
      'tls-creds-psk,id=t',
      'secret,data=x',
      `tls-creds-psk,id=t,dir=${at('none')}`,
    ]) {
      await expect(named('--object', wrong, '--image-opts', name)).rejects.toThrow(
        expect.objectContaining({ code: 'ERR_STILLFRAME_INVALID_ARGUMENT' }),
      );
    }
  });
});

describe.skipIf(!hasPeer('qemu-img') || !hasPeer('qemu-io'))(
  'images named by options, beside qemu-img',
  () => {
    const PLAIN = 'driver=qcow2,file.driver=file,file.filename=image';
    const OTHER = `${PLAIN},backing.driver=raw,backing.file.filename=other`;

    beforeAll(() => {
      for (const side of ['ours', 'theirs']) {
        const make = (tool: string, ...args: string[]): string => run(tool, args, [0], at(side));
        mkdirSync(at(side));
        for (const [name, byte] of [
          ['base', 9],
          ['other', 8],
        ] as const) {
          writeFileSync(at(`${side}/${name}`), Buffer.alloc(1 << 20, byte));
        }
        make('qemu-img', 'create', '-q', '-f', 'qcow2', '-b', 'base', '-F', 'raw', 'image');
        make('qemu-io', '-c', 'write -P 1 64k 64k', 'image');
        make('qemu-img', 'snapshot', '-c', 'one', 'image');
        make('qemu-img', 'create', '-q', '-f', 'qcow2', 'alone', '1M');
        make('qemu-img', 'create', '-q', '-f', 'qcow2', '-o', 'data_file=data', 'external', '1M');
        make('qemu-io', '-c', 'write -P 5 0 64k', 'external');
        make('mv', 'data', 'moved');
        make('qemu-img', 'create', '-q', '-f', 'raw', 'target', '1M');
      }
      for (const name of ['image', 'alone', 'external'])
        copyFileSync(at(`theirs/${name}`), at(`ours/${name}`));
    });

    interface Outcome {
      readonly status: number | null;
      readonly stdout: string;
    }

    function both(...args: readonly string[]): { readonly ours: Outcome; readonly theirs: Outcome } {
      const { status, stdout } = spawnSync('qemu-img', args, { cwd: at('theirs'), encoding: 'utf8' });
      const ours = stillframe(args, { cwd: at('ours') });
      return { ours: { status: ours.status, stdout: ours.stdout }, theirs: { status, stdout } };
    }

    it.each([
      ['info', '--image-opts', PLAIN],
      ['info', '--backing-chain', json({ driver: 'qcow2', file: { driver: 'file', filename: 'image' } })],
      ['map', '--output', 'json', '--image-opts', `${PLAIN},backing=`],
      ['map', '--output', 'json', json({ driver: 'raw', offset: 512, size: 2048, 'file.filename': 'base' })],
      ['map', '--image-opts', OTHER],
      ['map', '--image-opts', 'driver=qcow2,file.filename=external,data-file.filename=moved'],
      [
        'map',
        '--image-opts',
        'driver=qcow2,file.filename=alone,backing.driver=raw,backing.file.filename=other',
      ],
      ['check', '--image-opts', PLAIN],
      ['compare', '--image-opts', OTHER, 'driver=raw,file.filename=other'],
      ['compare', json({ driver: 'qcow2', file: { filename: 'image' } }), 'image'],
      ['measure', '-O', 'qcow2', '--image-opts', 'driver=raw,offset=1k,size=2k,file.filename=base'],
      ['snapshot', '-l', '--image-opts', PLAIN],
      ['snapshot', '--image-opts', PLAIN],
      ['snapshot', 'image'],
      ['snapshot', '-q', 'image'],
      ['resize', '--image-opts', PLAIN, '2M'],
      ['snapshot', '--image-opts', '-c', 'two', PLAIN],
      ['amend', '--image-opts', '-o', 'lazy_refcounts=on', PLAIN],
      ['bitmap', '--image-opts', '--add', PLAIN, 'bitmap'],
      ['rebase', '--image-opts', '-u', '-b', 'base', '-F', 'raw', PLAIN],
      ['commit', '-d', '--image-opts', PLAIN],
    ])('%s does the same (%j %j %j)', (...args) => {
      const { ours, theirs } = both(...args);
      // Dates of snapshots, and what the file system has of a copy.
      const undated = ({ status, stdout }: Outcome) => [
        status,
        stdout.replace(/\d{4}-\d\d-\d\d [\d:]+|disk size: .*/g, ''),
      ];
      expect(undated(ours)).toEqual(undated(theirs));
      expect(ours.status).toBe(args[0] === 'compare' && args[1] === '--image-opts' ? 1 : 0);
      const [one, other] = ['ours', 'theirs'].map((side) =>
        run('qemu-img', ['info', '--output=json', 'image'], [0], at(side)).replace(
          /("date-n?sec"|"actual-size"): \d+/g,
          '',
        ),
      );
      expect(one).toBe(other);
    });

    it.each([
      [['convert', '--image-opts', OTHER, 'out']],
      [['convert', '--image-opts', `${PLAIN},backing.driver=qcow2,backing.file.filename=alone`, 'out']],
      [['convert', json({ driver: 'qcow2', file: { filename: 'image' }, backing: null }), 'out']],
      [
        [
          'convert',
          '--image-opts',
          'driver=qcow2,file.filename=alone,backing.driver=raw,backing.file.filename=other',
          'out',
        ],
      ],
      [['convert', '--image-opts', 'driver=qcow2,file.filename=external,data-file.filename=moved', 'out']],
      [['convert', '--image-opts', 'driver=raw,offset=512,size=1024,file.filename=base', PLAIN, 'out']],
      [['convert', '-n', '--target-image-opts', 'alone', 'driver=raw,file.filename=target']],
      [['convert', '-n', 'other', json({ driver: 'raw', file: { filename: 'target' } })]],
      [['dd', '--image-opts', 'skip=100', `if=${OTHER}`, 'of=out']],
    ])('%j reads the same', (args) => {
      const { ours, theirs } = both(...args);
      expect(ours).toEqual(theirs);
      expect(ours.status).toBe(0);
      const made = args.some((word) => word.includes('target')) ? 'target' : 'out';
      const [one, other] = [readFileSync(at(`ours/${made}`)), readFileSync(at(`theirs/${made}`))];
      expect(one.length).toBe(other.length);
      expect(firstDifference(one, other)).toBe(-1);
    });

    it.each([
      [['info', '--image-opts', '-f', 'qcow2', PLAIN]],
      [['info', '--image-opts', 'image']],
      [['info', '--backing-chain', '--image-opts', OTHER]],
      [['create', '-f', 'raw', json({ driver: 'raw', file: { filename: 'new' } }), '1M']],
      [['info', 'json:{']],
      [['check', '--image-opts', 'driver=qcow2,foo=1,file.filename=image']],
      [['compare', '--image-opts', '-F', 'raw', PLAIN, PLAIN]],
      [['compare', 'json:{', 'base']],
      [['map', '--image-opts', 'driver=raw,file.filename=missing']],
      [['map', '--image-opts', 'driver=raw,offset=8M,file.filename=base']],
      [['resize', json({ driver: 'qcow2', file: { filename: 'image' }, 'read-only': true }), '3M']],
      [['convert', '--target-image-opts', 'image', 'driver=raw,file.filename=target']],
      [['convert', '-n', '--target-image-opts', '-O', 'raw', 'image', 'driver=raw,file.filename=target']],
      [['convert', 'image', json({ driver: 'raw', file: { filename: 'target' } })]],
      [['snapshot', 'missing']],
      [['snapshot', '-U', 'image']],
      [['snapshot']],
    ])('%j is refused', (args) => {
      const { ours, theirs } = both(...args);
      expect(ours).toEqual(theirs);
      expect(ours.status).toBe(args[0] === 'compare' ? 2 : 1);
    });

    it('of headers are still none of the user', () => {
      const name = json({ driver: 'raw', file: { driver: 'file', filename: at('ours/other') } });
      run('qemu-img', ['create', '-q', '-u', '-f', 'qcow2', '-b', name, '-F', 'raw', at('ours/sly'), '1M']);
      const sly = json({ driver: 'qcow2', file: { filename: 'sly' } });
      for (const image of ['sly', sly]) {
        const done = stillframe(['convert', image, 'out'], { cwd: at('ours') });
        expect(done.status).toBe(1);
        expect(done.stderr).toContain('ERR_STILLFRAME_BACKING_FORBIDDEN');
      }
      const over = json({
        driver: 'qcow2',
        file: { filename: 'alone' },
        backing: { driver: 'qcow2', file: { filename: 'sly' } },
      });
      expect(stillframe(['convert', over, 'out'], { cwd: at('ours') }).stderr).toContain('BACKING_FORBIDDEN');
    });
  },
);
