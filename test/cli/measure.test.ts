import { spawnSync } from 'node:child_process';
import { writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { beforeAll, describe, expect, it } from 'vitest';
import { temporaryFolder } from '../block/qcow2-support.js';
import { stillframe } from '../support/cli.js';
import { Random } from '../support/data.js';
import { hasPeer, run } from '../support/peers.js';

const folder = temporaryFolder();
const at = (name: string): string => join(folder, name);

describe.skipIf(!hasPeer('qemu-img') || !hasPeer('qemu-io'))(
  'stillframe measure beside qemu-img measure',
  () => {
    beforeAll(() => {
      run('qemu-img', ['create', '-q', '-f', 'qcow2', at('source.qcow2'), '1G']);
      const requests = [
        'write 0 10M',
        'write 100M 3k',
        'write -z 300M 1M',
        'write 199k 1k',
        'write 900M 64k',
      ];
      run('qemu-io', ['-f', 'qcow2', ...requests.flatMap((each) => ['-c', each]), at('source.qcow2')]);
      for (const name of ['one', 'another']) run('qemu-img', ['bitmap', '--add', at('source.qcow2'), name]);
      run('qemu-img', ['bitmap', '--add', '-g', '512', at('source.qcow2'), 'fine']);
      run('qemu-img', ['snapshot', '-c', 's', at('source.qcow2')]);
      const backing = ['-F', 'qcow2', '-b', 'source.qcow2'];
      run('qemu-img', ['create', '-q', '-f', 'qcow2', ...backing, at('top.qcow2')]);
      run('qemu-io', ['-f', 'qcow2', '-c', 'write 200M 3M', '-c', 'write -z 0 1M', at('top.qcow2')]);
      run('qemu-img', ['create', '-q', '-f', 'qcow2', '-o', 'compat=0.10', at('old.qcow2'), '3M']);
      const raw = Buffer.alloc(10 << 20);
      raw.set(new Random(1).noise(700_000), 5_000_000);
      writeFileSync(at('source.raw'), raw);
    });

    it.each<string>([
      '--size 10G',
      '--size 10G -O qcow2',
      '--size 10G -O qcow2 -o cluster_size=4k,refcount_bits=1',
      '--size 3T -O qcow2 -o cluster_size=512,refcount_bits=64',
      '--size 10G -O qcow2 -o cluster_size=2M,extended_l2=on',
      '--size 10G -O qcow2 -o preallocation=full',
      '--size 10G -O qcow2 -o preallocation=falloc',
      '--size 10G -O qcow2 -o preallocation=metadata',
      '--size 10G -O qcow2 -o compat=0.10',
      '--size 1000 -O qcow2',
      '--size 1000 -O raw',
      '--size 0 -O qcow2',
      '-O qcow2 SOURCE.qcow2',
      '-O qcow2 --output json SOURCE.qcow2',
      '-O raw --output json SOURCE.qcow2',
      '-O qcow2 -o cluster_size=4k SOURCE.qcow2',
      '-O qcow2 -o cluster_size=2M SOURCE.qcow2',
      '-O qcow2 -o compat=0.10 SOURCE.qcow2',
      '-O qcow2 -l s SOURCE.qcow2',
      '-O qcow2 TOP.qcow2',
      '-O qcow2 -o backing_file=b,backing_fmt=raw TOP.qcow2',
      '-O qcow2 OLD.qcow2',
      '-f raw -O qcow2 SOURCE.raw',
      '-f raw -O qcow2 --output json SOURCE.raw',
      '-f raw SOURCE.raw',
      '',
      '--size 1M SOURCE.qcow2',
      '--size 1M -l s',
      '--size 1M -f raw',
      '--size 1M --image-opts',
      '-O qcow2 nothing',
      '--size 100P -O qcow2 -o cluster_size=512',
    ])('%s', (line) => {
      const words = line.split(' ').filter((word) => word !== '');
      const args = words.map((word) => (/^[A-Z]+\./.test(word) ? at(word.toLowerCase()) : word));
      const theirs = spawnSync('qemu-img', ['measure', ...args], { encoding: 'utf8' });
      const ours = stillframe(['measure', ...args]);
      expect(ours.status).toBe(theirs.status);
      if (!line.includes('json')) expect(ours.stdout).toBe(theirs.stdout);
      else expect(JSON.parse(ours.stdout)).toEqual(JSON.parse(theirs.stdout));
      if (theirs.status === 0) return;
      expect(ours.stderr).toMatch(/^stillframe: .{20,} \[ERR_STILLFRAME_(INVALID_ARGUMENT|NOT_FOUND)\]\n$/);
      if (/^(--size 1M|$)/.test(line)) expect(ours.stderr).toContain(theirs.stderr.slice(10).trim());
    });
  },
);
