/** Reading an export beside `nbdcopy`: the same server, the same kind of file to write to. */
import { createEngine } from '#src/index.js';
import { BYTES, CLI, compare, fillRandom, makeFile, time } from './harness.js';
import { plainUri, start, stop } from './nbd-servers.js';

export async function client(file: string): Promise<void> {
  const server = await start('nbdkit-source', (socket) => ['nbdkit', '-f', '-U', socket, 'file', file]);
  const engine = await createEngine();
  try {
    const uri = plainUri(server);
    // Both write over what is there: nobody has to find new memory.
    const target = makeFile('target.raw', BYTES, (fd) => fillRandom(fd, 0, BYTES));
    const nothing = (): void => undefined;
    await compare('from an nbdkit export to a raw file that exists', BYTES, [
      {
        name: 'stillframe convert',
        process: true,
        prepare: nothing,
        run: () => time(process.execPath, [CLI, 'convert', '-n', '-f', 'raw', '-O', 'raw', uri, target]),
      },
      {
        name: 'nbdcopy',
        process: true,
        prepare: nothing,
        run: () => time('nbdcopy', [uri, target]),
      },
      {
        name: 'nbdcopy --flush',
        process: true,
        prepare: nothing,
        run: () => time('nbdcopy', ['--flush', uri, target]),
      },
      {
        name: 'qemu-img convert',
        process: true,
        prepare: nothing,
        run: () =>
          time('qemu-img', ['convert', '-n', '-W', '-m', '16', '-f', 'raw', '-O', 'raw', uri, target]),
      },
      {
        name: 'stillframe job',
        process: false,
        prepare: nothing,
        run: async () => {
          const disk = await engine.openDisk(uri, { format: 'raw', readOnly: true });
          const begin = performance.now();
          const job = await disk.backup({ target, format: 'raw', existing: true, sync: 'full' });
          await job.result();
          const seconds = (performance.now() - begin) / 1000;
          await disk.close();
          return { seconds, peakRss: undefined };
        },
      },
    ]);
  } finally {
    await engine.close();
    await stop([server]);
  }
}
