/**
 * What a guest feels of a backup: the latency of its writes while one full backup after the other is taken of the drive,
 * beside the same in QEMU. The load is open: requests come at random times at a fixed rate, whether the ones before
 * them were answered or not.
 */
import { spawn } from 'node:child_process';
import { existsSync, rmSync } from 'node:fs';
import { createConnection } from 'node:net';
import { join } from 'node:path';
import { createEngine, type Engine } from '#src/index.js';
import { BYTES, fillRandom, folder, makeFile, RUNS } from './harness.js';
import { runFio } from './nbd-fio.js';
import { type Figures, print } from './nbd-servers.js';
import { Qmp } from './qmp.js';

/** Writes of the guest per second. */
const RATE = 2000;
/** Requests that may be under way before the load has to wait. */
const DEPTH = 256;
/** Of a target that is slow, in bytes per second. */
const SLOW = 10_000_000;

interface Contestant {
  readonly name: string;
  /** Takes one backup; undefined: there is none. */
  readonly backup: ((going: () => boolean) => Promise<void>) | undefined;
  readonly uri: string;
}

/** Takes backups for as long as the load runs. */
async function measure({ backup, uri }: Contestant): Promise<Figures> {
  const load = runFio(uri, 'write', DEPTH, [`--rate_iops=${RATE}`, '--rate_process=poisson']);
  let going = true;
  const over = load.finally(() => {
    going = false;
  });
  let backups = 0;
  while (backup !== undefined && going) {
    await backup(() => going);
    backups++;
  }
  const { operations: _, ...figures } = await over;
  return { ...figures, backups };
}

async function stillframe(engine: Engine, file: string, target: string): Promise<Contestant[]> {
  const disk = await engine.openDisk(file, { format: 'raw' });
  const socket = join(folder, 'latency.socket');
  await engine.serveNbd({ listen: `unix:${socket}`, exports: [{ disk }] });
  const uri = `nbd+unix:///?socket=${socket}`;
  const options = { target, format: 'raw', existing: true, sync: 'full' } as const;
  return [
    { name: 'stillframe, no backup', backup: undefined, uri },
    {
      name: 'stillframe, backups',
      uri,
      backup: async () => {
        await (await disk.backup(options)).result();
      },
    },
    {
      name: 'stillframe, slow target, fleecing',
      uri,
      backup: async (going) => {
        const job = await disk.backup({ ...options, speed: SLOW, fleece: true });
        const result = job.result().catch(() => undefined);
        while (going()) await new Promise((resolve) => setTimeout(resolve, 10));
        job.cancel();
        await result;
      },
    },
  ];
}

/** A storage daemon that serves the drive and takes backups of it. */
async function qemu(file: string, target: string): Promise<{ contestants: Contestant[]; end: () => void }> {
  const [monitor, socket] = [join(folder, 'latency.qmp'), join(folder, 'latency.qemu')];
  rmSync(monitor, { force: true });
  const child = spawn(
    'qemu-storage-daemon',
    [
      ...['--chardev', `socket,id=m,path=${monitor},server=on,wait=off`, '--monitor', 'chardev=m'],
      ...['--blockdev', `driver=raw,node-name=src,file.driver=file,file.filename=${file}`],
      ...['--blockdev', `driver=raw,node-name=dst,file.driver=file,file.filename=${target}`],
      ...['--nbd-server', `addr.type=unix,addr.path=${socket}`],
      ...['--export', 'type=nbd,id=e,node-name=src,name=,writable=on'],
    ],
    { stdio: ['ignore', 'ignore', 'inherit'] },
  );
  while (!existsSync(monitor) || !existsSync(socket)) await new Promise((resolve) => setTimeout(resolve, 10));
  const connection = createConnection(monitor);
  const qmp = new Qmp(connection);
  await qmp.wait((message) => 'QMP' in message);
  await qmp.command('qmp_capabilities');
  const uri = `nbd+unix:///?socket=${socket}`;
  const job = { 'job-id': 'j', device: 'src', target: 'dst', sync: 'full' };
  return {
    contestants: [
      { name: 'QEMU, no backup', backup: undefined, uri },
      {
        name: 'QEMU, backups',
        uri,
        backup: async () => {
          const over = qmp.wait((message) => message['event'] === 'BLOCK_JOB_COMPLETED');
          await qmp.command('blockdev-backup', job);
          const event = await over;
          if (JSON.stringify(event).includes('"error"')) throw new Error(JSON.stringify(event));
        },
      },
    ],
    end: () => {
      connection.destroy();
      child.kill();
    },
  };
}

export async function latency(file: string): Promise<void> {
  // Each program has a drive and a target of its own: they keep them open.
  const copy = (name: string): string => makeFile(name, BYTES, (fd) => fillRandom(fd, 0, BYTES));
  const engine = await createEngine();
  let end = (): void => undefined;
  try {
    const own = await stillframe(engine, file, copy('latency-target.raw'));
    const theirs = await qemu(copy('latency-drive.raw'), copy('latency-qemu-target.raw'));
    end = theirs.end;
    const contestants = [...own, ...theirs.contestants];
    const samples = new Map<string, Figures[]>(contestants.map(({ name }) => [name, []]));
    for (let round = 0; round <= RUNS; round++) {
      for (const contestant of contestants) {
        const figures = await measure(contestant);
        if (round > 0) samples.get(contestant.name)?.push(figures);
      }
    }
    print(`4 KiB random writes, ${RATE} a second at random times, during full backups`, samples);
  } finally {
    end();
    await engine.close();
  }
}
