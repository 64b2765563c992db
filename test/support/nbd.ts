import { type SpawnSyncReturns, spawnSync } from 'node:child_process';
import { existsSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';

/** A real NBD server on a unix socket. */
export interface Server {
  readonly socket: string;
  /** Name of its default export, or of another one. */
  readonly uri: (exportName?: string, parameters?: string) => string;
  /** Ends it and waits until it and its socket are gone. */
  readonly stop: () => void;
  /** Kills it with everything that it has not written yet; another one may take its place. */
  readonly kill: () => void;
  /** It does nothing until it is resumed, as if its machine hung. */
  readonly pause: () => void;
  readonly resume: () => void;
}

/** `qemu-nbd` with these arguments; it goes on until it is stopped. */
export function qemuNbd(args: readonly string[], socket?: string): Server {
  return serve(socket, (at, pidFile) =>
    spawnSync('qemu-nbd', ['--fork', '--persistent', '--pid-file', pidFile, '--socket', at, ...args], {
      stdio: 'ignore',
    }),
  );
}

/** `nbdkit` with these arguments: filters, then the plugin and its parameters; on the port of `--port` instead of a socket. */
export function nbdkit(args: readonly string[], socket?: string): Server {
  const tcp = args.includes('--port');
  return serve(socket, (at, pidFile) =>
    spawnSync('nbdkit', ['--pidfile', pidFile, ...(tcp ? [] : ['--unix', at]), ...args], { stdio: 'ignore' }),
  );
}

/** `nbd-server` with the export `disk`, and further lines of its configuration. */
export function nbdServer(path: string, ...lines: readonly string[]): Server {
  return serve(undefined, (at, pidFile) => {
    const configuration = `${pidFile}.conf`;
    const generic = ['[generic]', `unixsock = ${at}`, '[disk]', `exportname = ${path}`];
    writeFileSync(configuration, `${[...generic, ...lines].join('\n')}\n`);
    return spawnSync('nbd-server', ['-C', configuration, '-p', pidFile], { stdio: 'ignore' });
  });
}

function waitUntil(condition: () => boolean): void {
  for (let round = 0; round < 4000; round++) {
    if (condition()) return;
    Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, 5);
  }
  throw new Error('waited too long for a server');
}

/** Whether a process runs; one that has ended but was not asked for its status does not. */
function alive(pid: number): boolean {
  try {
    return !/\) [ZX] /.test(readFileSync(`/proc/${pid}/stat`, 'utf8'));
  } catch {
    return false;
  }
}

/** Starts a server that goes to the background once it is ready. */
function serve(
  given: string | undefined,
  start: (socket: string, pidFile: string) => SpawnSyncReturns<Buffer>,
): Server {
  const folder = mkdtempSync(join(tmpdir(), 'stillframe-nbd-'));
  const socket = given ?? join(folder, 'socket');
  const pidFile = join(folder, 'pid');
  rmSync(socket, { force: true });
  const { status, error } = start(socket, pidFile);
  if (status !== 0) throw error ?? new Error(`the server ended with ${status}`);
  // nbdkit writes it a moment later.
  waitUntil(() => existsSync(pidFile) && Number(readFileSync(pidFile, 'utf8')) > 0);
  const pid = Number(readFileSync(pidFile, 'utf8'));
  let running = true;
  const end = (signal: NodeJS.Signals): void => {
    if (!running) return;
    running = false;
    if (alive(pid)) process.kill(pid, signal);
    // One that was paused hears it only now.
    if (alive(pid)) process.kill(pid, 'SIGCONT');
    waitUntil(() => !alive(pid));
  };
  return {
    socket,
    uri: (exportName = '', parameters = '') =>
      `nbd+unix:///${encodeURIComponent(exportName)}?socket=${encodeURIComponent(socket)}${parameters}`,
    stop: () => {
      end('SIGTERM');
      rmSync(folder, { recursive: true, force: true });
    },
    kill: () => end('SIGKILL'),
    pause: () => process.kill(pid, 'SIGSTOP'),
    resume: () => process.kill(pid, 'SIGCONT'),
  };
}
