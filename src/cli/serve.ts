import { basename } from 'node:path';
import { Daemon } from '../daemon/commands.js';
import {
  createEngine,
  type Disk,
  type Engine,
  type NbdExport,
  type NbdServer,
  type TlsOptions,
} from '../index.js';
import { inheritedSockets, type ListenAddress, parseListenAddress } from '../nbd/server/address.js';
import { Monitors } from '../qmp/listener.js';
import {
  ALLOW_BACKING,
  type Arguments,
  type Command,
  FORCE_SHARE,
  FORMAT,
  FORMATS,
  OUTPUT,
  OUTPUTS,
  parseSnapshot,
  QUIET,
  SNAPSHOT,
  usageError,
} from './command.js';
import { formatBytes } from './units.js';
import { version } from './version.js';

interface Place {
  readonly addresses: readonly ListenAddress[];
  readonly exportName: string | undefined;
}

/** Where to listen: as the options say, or on what the program was started with. */
function placeOf(args: Arguments): Place {
  const given = args.texts('nbd');
  if (given === undefined) {
    const addresses = inheritedSockets();
    if (addresses === undefined) {
      throw usageError('say where to listen: --nbd unix:PATH, --nbd HOST:PORT or --nbd fd:N');
    }
    return { addresses, exportName: undefined };
  }
  const places = given.map(parseListenAddress);
  const tls = tlsOf(args) !== undefined;
  if (places.some((place) => place.tls) && !tls) {
    throw usageError('nbds:// needs --tls-certificates DIR or --tls-psk FILE');
  }
  const names = new Set(places.flatMap(({ exportName }) => exportName ?? []));
  if (names.size > 1) throw usageError('the URIs of --nbd name different exports; use --export');
  const [exportName] = names;
  return { addresses: places.map(({ address }) => address), exportName };
}

function tlsOf(args: Arguments): TlsOptions | undefined {
  const certificates = args.text('tls-certificates');
  const pskFile = args.text('tls-psk');
  const verifyPeer = args.flag('tls-verify-peer');
  if (certificates !== undefined && pskFile !== undefined) {
    throw usageError('--tls-certificates and --tls-psk do not go together');
  }
  if (verifyPeer && certificates === undefined)
    throw usageError('--tls-verify-peer needs --tls-certificates');
  if (certificates !== undefined) return { certificates, verifyPeer };
  return pskFile === undefined ? undefined : { pskFile };
}

/** The name of each disk's export. */
function namesOf(args: Arguments, fromUri: string | undefined): string[] {
  const disks = args.positionals;
  const given = args.texts('export') ?? (fromUri === undefined ? [] : [fromUri]);
  if (given.length > disks.length) throw usageError('there are more names (--export) than disks');
  return disks.map((disk, index) => given[index] ?? (disks.length === 1 ? '' : basename(disk)));
}

function wholeNumber(args: Arguments, name: string, least: number, most: number): number | undefined {
  const text = args.text(name);
  if (text === undefined) return undefined;
  const number = /^\d{1,9}$/.test(text) ? Number(text) : Number.NaN;
  if (number >= least && number <= most) return number;
  throw usageError(`--${name} takes a number from ${least} to ${most}, not '${text}'`);
}

function modeOf(args: Arguments): number | undefined {
  const text = args.text('socket-mode');
  if (text === undefined) return undefined;
  if (!/^0?[0-7]{3}$/.test(text)) throw usageError(`--socket-mode takes three octal digits, not '${text}'`);
  return Number.parseInt(text, 8);
}

/** Waits for the first signal, for the end of the server by itself, or for being told to quit. */
class Ending {
  /** The exit status. */
  readonly status: Promise<number>;
  #resolve: (status: number) => void = () => undefined;
  #stopping = false;

  constructor(server: NbdServer) {
    this.status = new Promise((resolve) => {
      this.#resolve = resolve;
    });
    process.on('SIGINT', () => this.stop(130));
    process.on('SIGTERM', () => this.stop(0));
    void server.finished.then(() => this.#resolve(0));
  }

  stop(status: number): void {
    if (this.#stopping) process.exit(status === 0 ? 1 : status);
    this.#stopping = true;
    this.#resolve(status);
  }
}

/** Makes the socket by which the disks, their backups and instants are controlled. */
async function controlDisks(
  args: Arguments,
  disks: readonly Disk[],
  names: readonly string[],
  engine: Engine,
  server: NbdServer,
  ending: Ending,
): Promise<{ readonly close: () => Promise<void> } | undefined> {
  const path = args.text('qmp');
  if (path === undefined) return undefined;
  const monitors = new Monitors(version());
  const daemon = new Daemon(engine, {
    tell: (event) => monitors.tell(event),
    // The answer is to be on its way before the sockets close.
    quit: () => setImmediate(() => ending.stop(0)),
    allowBacking: args.texts('allow-backing'),
  });
  monitors.handlers = daemon.handlers;
  const nodes = disks.map((disk, index) => daemon.graph.adopt(disk, `disk${index}`, `drive${index}`));
  daemon.exports.adopt(
    server,
    nodes.map((node, index) => ({ name: names[index] ?? '', node })),
  );
  await monitors.listen({ path });
  return {
    close: async () => {
      await daemon.close();
      await monitors.close();
    },
  };
}

async function openDisks(engine: Engine, args: Arguments, readOnly: boolean): Promise<Disk[]> {
  const disks: Disk[] = [];
  for (const path of args.positionals) {
    disks.push(
      await engine.openDisk(path, {
        readOnly,
        format: args.choice('format', FORMATS),
        allowBacking: args.texts('allow-backing'),
        snapshot: parseSnapshot(args.text('snapshot')),
        forceShare: args.flag('force-share'),
        discard: args.choice('discard', ['unmap', 'ignore']),
      }),
    );
  }
  return disks;
}

/** The export of the instant that is to be taken. */
async function freezeDisk(args: Arguments, disks: readonly Disk[]): Promise<NbdExport[]> {
  const name = args.text('freeze');
  const scratch = args.text('scratch');
  const onCbwError = args.choice('on-cbw-error', ['break-guest-write', 'break-snapshot']);
  const seconds = wholeNumber(args, 'cbw-timeout', 0, 86_400);
  if (name === undefined) {
    if (scratch === undefined && onCbwError === undefined && seconds === undefined) return [];
    throw usageError('--scratch, --on-cbw-error and --cbw-timeout go with --freeze NAME');
  }
  const [disk] = disks;
  if (disk === undefined || disks.length > 1) throw usageError('--freeze takes the instant of one disk');
  return [{ disk: await disk.freeze({ scratch, onCbwError, cbwTimeoutMs: (seconds ?? 0) * 1000 }), name }];
}

export const serve: Command = {
  name: 'serve',
  usage: 'DISK… --nbd ADDRESS [options]',
  summary:
    'Serves images as live disks over NBD, until it is interrupted (Ctrl-C, SIGTERM). ADDRESS is unix:PATH, HOST:PORT,\n' +
    ':PORT (this machine only), fd:N (an open socket that listens, or is connected to a client) or an NBD URI. Without\n' +
    '--nbd it listens on the sockets that systemd, nbdcopy or another program of that kind started it with.',
  positionals: [1, 64],
  options: [
    { long: 'nbd', value: 'ADDRESS', multiple: true, help: 'where to listen, any number of times' },
    {
      long: 'export',
      short: 'x',
      value: 'NAME',
      multiple: true,
      help: "name of the export, for each disk in turn (the empty one; with several disks their files' names)",
    },
    { long: 'description', short: 'D', value: 'TEXT', help: 'what listings of exports say about it' },
    { long: 'read-only', short: 'r', help: 'nobody can write' },
    {
      long: 'freeze',
      value: 'NAME',
      help: 'take the instant now and export it read-only as NAME; what is written to the disk is saved first',
    },
    {
      long: 'scratch',
      value: 'DIR',
      help: 'with --freeze: folder of the file that old data is saved to, which has no name there (that of DISK)',
    },
    {
      long: 'on-cbw-error',
      value: 'POLICY',
      help: 'with --freeze: break-guest-write or break-snapshot, where old data cannot be saved (break-guest-write)',
    },
    {
      long: 'cbw-timeout',
      value: 'SECONDS',
      help: 'with --freeze: how long a write may wait until its old data is saved; then that is such an error (0: long)',
    },
    FORMAT,
    SNAPSHOT,
    ALLOW_BACKING,
    {
      long: 'bitmap',
      short: 'B',
      value: 'NAME',
      multiple: true,
      help: 'dirty bitmap that clients can read, any number of times (all that the image has)',
    },
    { long: 'discard', value: 'unmap|ignore', help: 'what a discard does (unmap)' },
    {
      long: 'max-connections',
      short: 'e',
      value: 'N',
      help: 'clients at once; others wait until one leaves (100)',
    },
    {
      long: 'handshake-timeout',
      value: 'SECONDS',
      help: 'how long a client may take to choose an export (10)',
    },
    {
      long: 'tls-certificates',
      value: 'DIR',
      help: 'serve with TLS only; DIR holds server-cert.pem and server-key.pem',
    },
    { long: 'tls-verify-peer', help: 'only clients with a certificate of ca-cert.pem in the same folder' },
    {
      long: 'tls-psk',
      value: 'FILE',
      help: 'serve with TLS only, to those who know a key of FILE (user:hexadecimal)',
    },
    { long: 'socket-mode', value: 'MODE', help: 'permissions of a unix socket (600)' },
    {
      long: 'qmp',
      value: 'PATH',
      help: 'unix socket that takes QMP commands: backups of the disks (drive0, drive1, …), instants, their end',
    },
    FORCE_SHARE,
    OUTPUT,
    QUIET,
  ],
  async run(args) {
    const json = args.choice('output', OUTPUTS, 'human') === 'json';
    const { addresses, exportName } = placeOf(args);
    const names = namesOf(args, exportName);
    const maxConnections = wholeNumber(args, 'max-connections', 1, 10_000);
    const seconds = wholeNumber(args, 'handshake-timeout', 1, 86_400);
    const socketMode = modeOf(args);
    const readOnly = args.flag('read-only') || args.text('snapshot') !== undefined;
    const engine = await createEngine();
    try {
      const disks = await openDisks(engine, args, readOnly);
      const exports = disks.map<NbdExport>((disk, index) => ({
        disk,
        name: names[index],
        description: args.text('description'),
        bitmaps: args.texts('bitmap'),
      }));
      const frozen = await freezeDisk(args, disks);
      const server = await engine.serveNbd({
        listen: addresses,
        exports: [...exports, ...frozen],
        maxConnections,
        socketMode,
        tls: tlsOf(args),
        handshakeTimeoutMs: seconds === undefined ? undefined : seconds * 1000,
      });
      const ending = new Ending(server);
      const monitors = await controlDisks(args, disks, names, engine, server, ending);
      const { uris } = server;
      // A connection that it was started with may be its stdout.
      const quiet = args.flag('quiet') || uris.length === 0;
      if (!quiet && json) {
        const served = disks.map(({ path, length }, index) => ({
          path,
          name: names[index],
          'virtual-size': length,
          'read-only': readOnly,
        }));
        console.log(JSON.stringify({ type: 'serving', uris, exports: served }));
      } else if (!quiet) {
        for (const { path, length } of disks) {
          console.log(`serving '${path}' (${formatBytes(length)}${readOnly ? ', read-only' : ''})`);
        }
        for (const uri of uris) console.log(uri);
      }
      const status = await ending.status;
      await monitors?.close();
      await server.close();
      return status;
    } finally {
      await engine.close();
    }
  },
};
