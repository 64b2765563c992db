import { spawn } from 'node:child_process';
import { closeSync, constants, existsSync, openSync, rmSync, writeFileSync } from 'node:fs';
import { Daemon } from '../daemon/commands.js';
import { listProperties } from '../daemon/qom.js';
import { systemError, toStillframeError } from '../errors.js';
import { createEngine } from '../index.js';
import { BLOCKDEV, EXPORT, OBJECT, SOCKET_ADDRESS } from '../qmp/blockdev-schema.js';
import { openErrorText, QmpError } from '../qmp/errors.js';
import { parseKeyval, parseOption } from '../qmp/keyval.js';
import { type MonitorPlace, Monitors } from '../qmp/listener.js';
import {
  coerce,
  isObject,
  type JsonObject,
  type Members,
  type StructKind,
  wrongValue,
} from '../qmp/types.js';
import { ALLOW_BACKING, type Arguments, type Command, usageError } from './command.js';
import { version } from './version.js';

const optional = { optional: true } as const;

const CHARDEV: StructKind = {
  struct: {
    backend: { kind: 'str' },
    append: { kind: 'bool', ...optional },
    id: { kind: 'str', ...optional },
    path: { kind: 'str', ...optional },
    host: { kind: 'str', ...optional },
    port: { kind: 'str', ...optional },
    fd: { kind: 'str', ...optional },
    server: { kind: 'bool', ...optional },
    wait: { kind: 'bool', ...optional },
    nodelay: { kind: 'bool', ...optional },
    ipv4: { kind: 'bool', ...optional },
    ipv6: { kind: 'bool', ...optional },
    reconnect: { kind: 'uint32', ...optional },
    abstract: { kind: 'bool', ...optional },
    mux: { kind: 'bool', ...optional },
    signal: { kind: 'bool', ...optional },
  },
};

const MONITOR: StructKind = {
  struct: {
    chardev: { kind: 'str' },
    id: { kind: 'str', ...optional },
    mode: { kind: ['control', 'readline'], ...optional },
    pretty: { kind: 'bool', ...optional },
  },
};

const NBD_SERVER: StructKind = {
  struct: {
    addr: { kind: SOCKET_ADDRESS },
    'tls-creds': { kind: 'str', ...optional },
    'tls-authz': { kind: 'str', ...optional },
    'max-connections': { kind: 'uint32', ...optional },
  },
};

/** What a process that is to go on in the background tells the one that started it. */
const READY = 'ready';
const IN_BACKGROUND = 'STILLFRAME_IN_BACKGROUND';

/** Words of older programs, `server` for `server=on` and `nowait` for `wait=off`. */
function modernise(text: string): string {
  return text
    .split(/(?<!,),(?!,)/)
    .map((part, index) => {
      if (index === 0 || part.includes('=')) return part;
      return part.startsWith('no') && part !== 'nodelay' ? `${part.slice(2)}=off` : `${part}=on`;
    })
    .join(',');
}

function placeOf({ path, host, port, fd, abstract }: JsonObject): MonitorPlace {
  if (typeof path === 'string') return { path: abstract === true ? `\0${path}` : path };
  if (typeof fd === 'string') return { fd: Number(fd) };
  return { host: String(host ?? 'localhost'), port: Number(port) };
}

/** What a character device is connected with, as QEMU names it. */
function filenameOf({ backend, path, host, port, fd, server }: JsonObject): string {
  if (backend !== 'socket') return String(backend);
  const place =
    typeof path === 'string' ? `unix:${path}` : typeof fd === 'string' ? `fd:${fd}` : `tcp:${host}:${port}`;
  return server === true ? `${place},server=on` : place;
}

/** Types of character devices that a monitor can be on, as `--chardev help` lists them. */
const BACKENDS: readonly string[] = ['file', 'socket', 'stdio', 'null', 'pipe'];

/** @throws QmpError where there can be no such character device */
function checkChardev({ backend, id, path }: JsonObject): void {
  const type = String(backend);
  if (typeof id !== 'string') throw new QmpError('chardev: no id specified');
  if (!BACKENDS.includes(type)) throw new QmpError(`'${type}' is not a valid char driver name`);
  if (type === 'file' && path === undefined) throw new QmpError('chardev: file: no filename given');
  if (type === 'pipe' && path === undefined) throw new QmpError('chardev: pipe: no device path given');
}

/** @throws QmpError in QEMU's words */
function openAt(path: string, flags: number): number {
  try {
    return openSync(path, flags, 0o666);
  } catch (error) {
    throw new QmpError(openErrorText(systemError(`cannot open '${path}'`, error), path));
  }
}

/** A character device of the command line, and the files that it has open. */
interface OpenChardev {
  readonly chardev: JsonObject;
  readonly input?: number;
  readonly output?: number;
}

/** @throws QmpError in QEMU's words */
function openChardev(chardev: JsonObject): OpenChardev {
  checkChardev(chardev);
  const path = String(chardev['path']);
  switch (chardev['backend']) {
    case 'file': {
      const how = chardev['append'] === true ? constants.O_APPEND : constants.O_TRUNC;
      return { chardev, output: openAt(path, constants.O_WRONLY | constants.O_CREAT | how) };
    }
    case 'pipe': {
      // A pair of pipes, or one for both ways.
      const pair = ['in', 'out'].map((end) => `${path}.${end}`);
      const [input = path, output = path] = pair.every((end) => existsSync(end)) ? pair : [];
      const flags = constants.O_RDWR | constants.O_NONBLOCK;
      return { chardev, input: openAt(input, flags), output: openAt(output, flags) };
    }
    default:
      return { chardev };
  }
}

/** Starts a monitor on what a character device says. */
async function startMonitor(monitors: Monitors, { chardev, input, output }: OpenChardev): Promise<void> {
  if (output !== undefined) {
    if (input === undefined) monitors.write(output);
    else monitors.pipe({ input, output });
    return;
  }
  switch (chardev['backend']) {
    case 'stdio':
      monitors.stdio();
      return;
    case 'null':
      return;
    default:
      break;
  }
  const place = placeOf(chardev);
  if (chardev['server'] !== true) {
    await monitors.connect(place, Number(chardev['reconnect'] ?? 0) * 1000);
    return;
  }
  await monitors.listen(place);
  if (chardev['wait'] !== false) await monitors.client();
}

/** QEMU's `-drive` has two words for each. */
function discardOption(word: unknown): string {
  if (word === 'on' || word === 'unmap') return 'unmap';
  if (word === 'off' || word === 'ignore') return 'ignore';
  throw new QmpError('Invalid discard option');
}

/** Options of a node, from those of QEMU's `-drive`. */
function driveOptions(text: string): JsonObject {
  const given = parseKeyval(text, 'file');
  const { if: _, id, file, format, cache, media: __, readonly, discard, ...rest } = given;
  if (id !== undefined && typeof id !== 'string') throw new QmpError(`Parameter 'id' expects a name`);
  const below =
    typeof file === 'string'
      ? /^nbds?(\+[a-z]+)?:/i.test(file)
        ? { driver: 'nbd', 'x-uri': file }
        : { driver: 'file', filename: file, 'node-name': undefined }
      : file;
  const flags = {
    ...(cache === 'none' || cache === 'directsync' ? { direct: true } : {}),
    ...(cache === 'unsafe' ? { 'no-flush': true } : {}),
  };
  const options = {
    ...rest,
    ...(discard === undefined ? {} : { discard: discardOption(discard) }),
    ...(readonly === undefined ? {} : { 'read-only': readonly }),
    ...(format === undefined ? {} : { driver: format }),
    ...(id === undefined ? {} : { 'x-device': id }),
    ...(below === undefined ? {} : { file: below }),
  };
  const typed = coerce({ struct: { ...BLOCKDEV.members, file: { kind: BLOCKDEV, ...optional } } }, options);
  const detect = isObject(typed) ? typed['detect-zeroes'] : undefined;
  if (detect !== undefined && !['off', 'on', 'unmap'].includes(String(detect))) {
    throw new QmpError(`invalid parameter value: ${String(detect)}`);
  }
  return { ...(isObject(typed) ? typed : {}), ...(Object.keys(flags).length === 0 ? {} : { cache: flags }) };
}

/** What an option's word `help` prints; undefined where it is not that. @throws QmpError where there is no help */
function helpFor(name: string, value: string): string | undefined {
  const words = value.split(',');
  if (!words.includes('help') && !words.includes('?')) return undefined;
  const [type = ''] = words;
  const isList = type === 'help' || type === '?';
  const lines = (list: readonly string[]): string => list.map((line) => `  ${line}\n`).join('');
  if (name === 'chardev') {
    return isList
      ? `Available chardev backend types: \n${lines(BACKENDS)}`
      : `chardev options:\n${lines(optionsOf(CHARDEV.struct))}`;
  }
  if (name === 'object') {
    if (isList) return `List of user creatable objects:\n${lines(Object.keys(OBJECT.variants).sort())}`;
    const members = OBJECT.variants[type];
    if (members === undefined) return undefined;
    const properties = listProperties(type).filter((one) => Object.hasOwn(members, one.name));
    const named = properties.map((one) => `${one.name}=<${one.type}>`);
    return `${type} options:\n${lines(named.sort())}`;
  }
  if (HELPLESS.includes(name) && isList) throw new QmpError('Help is not available for this option');
  return undefined;
}

const HELPLESS: readonly string[] = ['blockdev', 'drive', 'export', 'monitor', 'nbd-server'];
const TYPE_NAMES: Readonly<Record<string, string>> = { bool: 'bool (on/off)', uint32: 'num' };

/** Options with their types, as QEMU lists them. */
function optionsOf(members: Members): string[] {
  return Object.entries(members)
    .map(([name, { kind }]) => `${name}=<${typeof kind === 'string' ? (TYPE_NAMES[kind] ?? kind) : 'str'}>`)
    .sort();
}

/** Does what the options say, in their order. @returns what to print instead of going on, where one of them asks for help */
async function setUp(args: Arguments, daemon: Daemon, monitors: Monitors): Promise<string | undefined> {
  const chardevs = new Map<string, OpenChardev>();
  for (const { name, value = '' } of args.given) {
    try {
      const help = helpFor(name, value);
      if (help !== undefined) return help;
      switch (name) {
        case 'blockdev':
          await daemon.graph.add(parseOption(value, BLOCKDEV, 'driver'));
          break;
        case 'drive':
          await daemon.graph.addDrive(driveOptions(value));
          break;
        case 'object':
          daemon.objects.add(parseOption(value, OBJECT, 'qom-type'));
          break;
        case 'chardev': {
          const chardev = parseOption(modernise(value), CHARDEV, 'backend');
          chardevs.set(String(chardev['id']), openChardev(chardev));
          daemon.chardevs.register(String(chardev['id']), String(chardev['backend']), filenameOf(chardev));
          break;
        }
        case 'monitor': {
          const { chardev, mode } = parseOption(value, MONITOR, 'chardev');
          if (mode === 'readline') throw new QmpError('Only QMP is supported');
          const found = chardevs.get(String(chardev));
          if (found === undefined) throw new QmpError(`chardev "${String(chardev)}" not found`);
          daemon.chardevs.use(String(chardev));
          await startMonitor(monitors, found);
          break;
        }
        case 'nbd-server': {
          const { addr, ...rest } = parseOption(value, NBD_SERVER);
          if (!isObject(addr)) throw new TypeError('the schema was not looked at');
          await daemon.exports.start(addr, rest);
          break;
        }
        case 'export': {
          const wanted = parseOption(value, EXPORT, 'type');
          const wrong = wrongValue(EXPORT, wanted, '');
          if (wrong !== undefined) throw new QmpError(wrong);
          await daemon.exports.add(wanted);
          break;
        }
        default:
          break;
      }
    } catch (error) {
      const text = error instanceof QmpError ? error.message : toStillframeError(error).message;
      throw usageError(`--${name} ${value}: ${text}`);
    }
  }
  return undefined;
}

/** Starts the same program once more, without a terminal. Resolves with the exit status when it is set up, or failed. */
function startInBackground(): Promise<number> {
  const [, script = '', ...rest] = process.argv;
  const words = rest.filter((word) => word !== '--daemonize');
  const descriptors = words.flatMap((word) =>
    [...word.matchAll(/\bfd(?:=|:)(\d+)/g)].map(([, fd]) => Number(fd)),
  );
  const highest = Math.max(2, ...descriptors);
  const inherited = Array.from({ length: highest - 2 }, () => 'inherit' as const);
  const child = spawn(process.execPath, [...process.execArgv, script, ...words], {
    detached: true,
    stdio: ['ignore', 'ignore', 'inherit', ...inherited, 'ipc'],
    env: { ...process.env, [IN_BACKGROUND]: '1' },
  });
  return new Promise((resolve) => {
    child.once('message', () => {
      child.disconnect();
      child.unref();
      resolve(0);
    });
    child.once('exit', (status) => resolve(status ?? 1));
  });
}

/** Says that everything is set up, and lets the terminal go. */
function leaveTerminal(): void {
  if (process.env[IN_BACKGROUND] === undefined) return;
  closeSync(2);
  openSync('/dev/null', 'w');
  process.send?.(READY);
  process.disconnect?.();
}

export const daemon: Command = {
  name: 'daemon',
  usage: '[options]',
  summary:
    'A daemon for the backup side of QEMU: nodes, NBD exports and jobs, controlled by QMP. Its options and commands are\n' +
    "those of 'qemu-storage-daemon'; they are carried out in their order. It runs until QMP 'quit', SIGTERM, SIGINT or\n" +
    'SIGHUP; jobs are cancelled then and everything is closed.',
  positionals: [0, 0],
  options: [
    { long: 'blockdev', value: 'OPTIONS', multiple: true, help: 'a node: driver=…,node-name=…,… or JSON' },
    {
      long: 'drive',
      value: 'OPTIONS',
      multiple: true,
      help: 'a drive: file=…,format=…,id=NAME,node-name=…,read-only=on; jobs know it as NAME',
    },
    {
      long: 'object',
      value: 'OPTIONS',
      multiple: true,
      help: 'an object: throttle-group, tls-creds-x509, …,id=…',
    },
    {
      long: 'chardev',
      value: 'OPTIONS',
      multiple: true,
      help: 'socket,id=…,path=…,server=on,wait=off (or host=…,port=… or fd=N; without server=on it connects), stdio, file or pipe,id=…,path=…',
    },
    { long: 'monitor', value: 'OPTIONS', multiple: true, help: 'a QMP monitor on a chardev: chardev=ID' },
    {
      long: 'nbd-server',
      value: 'OPTIONS',
      multiple: true,
      help: 'the NBD server: addr.type=unix,addr.path=… or addr.type=inet,addr.host=…,addr.port=…,tls-creds=ID',
    },
    {
      long: 'export',
      value: 'OPTIONS',
      multiple: true,
      help: 'an export: type=nbd,id=…,node-name=…,name=…,writable=on,bitmaps.0=…',
    },
    { long: 'pidfile', value: 'PATH', help: 'file for the number of the process, once everything is set up' },
    { long: 'version', short: 'V', help: 'print the version' },
    { long: 'daemonize', help: 'go on in the background once everything is set up' },
    {
      long: 'x-qemu-compat',
      help: "backup jobs complete where QEMU's do: also without a flush of the target, and with a frame that lost old data",
    },
    { long: 'trace', short: 'T', value: 'PATTERN', multiple: true, help: 'taken and ignored' },
    ALLOW_BACKING,
  ],
  async run(args) {
    if (args.flag('version')) {
      console.log(`stillframe daemon version ${version()}`);
      return 0;
    }
    if (args.flag('daemonize')) return await startInBackground();
    const pidfile = args.text('pidfile');
    const engine = await createEngine();
    try {
      let end = (_: number): void => undefined;
      const ended = new Promise<number>((resolve) => {
        end = resolve;
      });
      const monitors = new Monitors(version());
      const running = new Daemon(engine, {
        tell: (event) => monitors.tell(event),
        // The answer is to be on its way before the sockets close.
        quit: () => setImmediate(() => end(0)),
        allowBacking: args.texts('allow-backing'),
        qemuCompat: args.flag('x-qemu-compat'),
      });
      monitors.handlers = running.handlers;
      for (const signal of ['SIGINT', 'SIGTERM', 'SIGHUP'] as const) process.on(signal, () => end(0));
      try {
        const start = monitors.hold();
        const help = await setUp(args, running, monitors);
        if (help !== undefined) {
          process.stdout.write(help);
          return 0;
        }
        start();
        if (pidfile !== undefined) writeFileSync(pidfile, `${process.pid}\n`);
        leaveTerminal();
        // Without a monitor and a server nothing else would keep the program.
        const alive = setInterval(() => undefined, 2 ** 30);
        try {
          return await ended;
        } finally {
          clearInterval(alive);
        }
      } finally {
        try {
          await running.close();
        } finally {
          await monitors.close();
          if (pidfile !== undefined) rmSync(pidfile, { force: true });
        }
      }
    } finally {
      await engine.close();
    }
  },
};
