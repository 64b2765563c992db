/**
 * NBD beside `qemu-nbd` and `nbdkit`, all of them serving one file:
 * `npm run bench:nbd -- [--folder DIR] [--runs N] [--gib N] [--only PART,PART]`. Parts: `copy` and `fio` (the server),
 * `tls` (the same in confidence), `client` (reading an export, beside `nbdcopy`), `latency` (of a guest's writes during
 * backups, beside QEMU's).
 *
 * Contestants run in turn (A B C A B C …), page cache warm; medians are printed, with the processor time that the
 * servers took: it does not depend on what else the machine does. The first run of each only warms up. `qemu-nbd` runs
 * as it comes, and once more with the settings of its allocator with which it is fastest: as it comes it takes memory from
 * the system for each request and gives it back, until something made the allocator keep more.
 */
import { rmSync } from 'node:fs';
import { availableParallelism } from 'node:os';
import { BYTES, CLI, fillRandom, folder, MiB, makeFile, ONLY } from './harness.js';
import { client } from './nbd-client.js';
import { runFio } from './nbd-fio.js';
import { latency } from './nbd-latency.js';
import { interleaved, output, plainUri, type Server, start, stop } from './nbd-servers.js';
import { tls } from './nbd-tls.js';

const file = makeFile('drive.raw', BYTES, (fd) => fillRandom(fd, 0, BYTES));

/** `qemu-nbd` with an allocator that keeps the memory of its requests. */
const TUNED = 'qemu-nbd-tuned';
const TUNING = { MALLOC_MMAP_THRESHOLD_: '67108864', MALLOC_TRIM_THRESHOLD_: '134217728' };

function qemuNbd(socket: string): readonly string[] {
  return [
    ...['qemu-nbd', '-t', '-e', '8', '-k', socket],
    ...['--image-opts', `driver=raw,file.driver=file,file.locking=off,file.filename=${file}`],
  ];
}

const commands: Readonly<Record<string, (socket: string) => readonly string[]>> = {
  stillframe: (socket) => [process.execPath, CLI, 'serve', file, '-f', 'raw', '--nbd', `unix:${socket}`],
  'qemu-nbd': qemuNbd,
  [TUNED]: qemuNbd,
  nbdkit: (socket) => ['nbdkit', '-f', '-U', socket, 'file', file],
};

/** Runs a part with the servers that it compares. */
async function withServers(body: (servers: readonly Server[]) => Promise<void>): Promise<void> {
  const servers: Server[] = [];
  try {
    for (const [name, command] of Object.entries(commands)) {
      servers.push(await start(name, command, name === TUNED ? TUNING : {}));
    }
    await body(servers);
  } finally {
    await stop(servers);
  }
}

/** Each time with new servers: what one has read before makes it quicker or slower at writing. */
async function copy(): Promise<void> {
  for (const connections of [1, 4]) {
    const how = ['-C', `${connections}`, '-T', `${Math.min(connections, availableParallelism())}`];
    for (const direction of ['read', 'write'] as const) {
      await withServers((servers) =>
        interleaved(`nbdcopy, ${direction}, ${connections} connections`, servers, async (server) => {
          const uri = plainUri(server);
          const begin = performance.now();
          await output('nbdcopy', [...how, ...(direction === 'read' ? [uri, 'null:'] : [file, uri])]);
          return { 'MiB/s': BYTES / MiB / ((performance.now() - begin) / 1000), operations: BYTES / MiB };
        }),
      );
    }
  }
}

async function fio(servers: readonly Server[]): Promise<void> {
  for (const direction of ['read', 'write'] as const) {
    for (const depth of [1, 32]) {
      await interleaved(`fio, 4 KiB random ${direction}, depth ${depth}`, servers, (server) =>
        runFio(plainUri(server), direction, depth),
      );
    }
  }
}

const parts = new Map([
  ['copy', copy],
  ['fio', () => withServers(fio)],
  ['tls', () => tls(file)],
  ['client', () => client(file)],
  ['latency', () => latency(file)],
]);
try {
  console.log(
    `node ${process.version}, ${availableParallelism()} processors, ${BYTES / 2 ** 30} GiB in ${folder}`,
  );
  const unknown = ONLY?.find((name) => !parts.has(name));
  if (unknown !== undefined) {
    throw new Error(`there is no part '${unknown}'; parts are ${[...parts.keys()].join(', ')}`);
  }
  for (const [name, run] of parts) if (ONLY?.includes(name) ?? true) await run();
} finally {
  rmSync(folder, { recursive: true, force: true });
}
