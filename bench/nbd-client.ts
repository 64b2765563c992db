/** Reading an export beside `nbdcopy` and `qemu-img`: the same server, the same kind of file to write to. */
import { join } from 'node:path';
import { createEngine } from '#src/index.js';
import { makeCertificates } from '../test/support/certificates.js';
import { BYTES, CLI, compare, fillRandom, folder, makeFile, time } from './harness.js';
import { plainUri, type Server, start, stop } from './nbd-servers.js';

/** An export as each of the clients wants it to be told of. */
interface Source {
  readonly title: string;
  readonly server: Server;
  readonly uri: string;
  /** Arguments of `qemu-img convert`. */
  readonly qemu: readonly string[];
}

export async function client(file: string): Promise<void> {
  // All write over what is there: nobody has to find new memory.
  const target = makeFile('target.raw', BYTES, (fd) => fillRandom(fd, 0, BYTES));
  for (const open of [plain, secure]) {
    const source = await open(file);
    try {
      await read(source, target);
    } finally {
      await stop([source.server]);
    }
  }
}

async function plain(file: string): Promise<Source> {
  const server = await start('nbdkit-source', (socket) => ['nbdkit', '-f', '-U', socket, 'file', file]);
  const uri = plainUri(server);
  return { title: 'from an nbdkit export to a raw file that exists', server, uri, qemu: ['-f', 'raw', uri] };
}

async function secure(file: string): Promise<Source> {
  const pki = makeCertificates(join(folder, 'client-pki'));
  const server = await start('nbdkit-tls', (socket) => [
    ...['nbdkit', '-f', '-U', socket, '--tls=require', `--tls-certificates=${pki}`, 'file', file],
  ]);
  const { socket } = server;
  return {
    title: 'the same with TLS and certificates',
    server,
    uri: `nbds+unix://localhost/?socket=${socket}&tls-certificates=${pki}`,
    qemu: [
      ...['--object', `tls-creds-x509,id=tls,endpoint=client,dir=${pki}`, '--image-opts'],
      `driver=nbd,server.type=unix,server.path=${socket},tls-creds=tls,tls-hostname=localhost`,
    ],
  };
}

async function read({ title, uri, qemu }: Source, target: string): Promise<void> {
  const engine = await createEngine();
  const nothing = (): void => undefined;
  const program = (name: string, command: string, ...args: readonly string[]) => ({
    name,
    process: true,
    prepare: nothing,
    run: () => time(command, args),
  });
  try {
    await compare(title, BYTES, [
      program(
        'stillframe convert',
        process.execPath,
        ...[CLI, 'convert', '-n', '-f', 'raw', '-O', 'raw', uri, target],
      ),
      program('nbdcopy', 'nbdcopy', uri, target),
      program('nbdcopy --flush', 'nbdcopy', '--flush', uri, target),
      program(
        'qemu-img convert',
        'qemu-img',
        ...['convert', '-n', '-W', '-m', '16', '-O', 'raw', ...qemu, target],
      ),
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
  }
}
