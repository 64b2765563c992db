/** What the parts of the NBD benchmark share: servers that run in turn, and the processor time that they take. */
import { type ChildProcess, spawn } from 'node:child_process';
import { existsSync, readFileSync, rmSync } from 'node:fs';
import { join } from 'node:path';
import { folder, median, RUNS } from './harness.js';

export interface Server {
  readonly name: string;
  readonly socket: string;
  readonly child: ChildProcess;
}

const TICKS_PER_SECOND = 100;

/**
 * Starts a server.
 *
 * @param command makes its command line from the path of its socket
 * @param settings more of its environment
 */
export async function start(
  name: string,
  command: (socket: string) => readonly string[],
  settings: Readonly<Record<string, string>> = {},
): Promise<Server> {
  const socket = join(folder, `${name}.socket`);
  const [program = '', ...args] = command(socket);
  const child = spawn(program, args, { stdio: 'ignore', env: { ...process.env, ...settings } });
  for (let round = 0; !existsSync(socket); round++) {
    if (round === 500 || child.exitCode !== null) throw new Error(`${name} does not serve`);
    await new Promise((resolve) => setTimeout(resolve, 20));
  }
  return { name, socket, child };
}

export async function stop(servers: readonly Server[]): Promise<void> {
  for (const { child } of servers) child.kill();
  await Promise.all(
    servers.map(({ child }) => child.exitCode ?? new Promise((resolve) => child.once('exit', resolve))),
  );
  // Not every server removes it, and the next one of that name would seem to be there at once.
  for (const { socket } of servers) rmSync(socket, { force: true });
}

/** Seconds of processor time that a process has taken. */
function processorSeconds({ child }: Server): number {
  const fields = readFileSync(`/proc/${child.pid}/stat`, 'utf8').split(') ')[1]?.split(' ') ?? [];
  return (Number(fields[11]) + Number(fields[12])) / TICKS_PER_SECOND;
}

export async function output(command: string, args: readonly string[]): Promise<string> {
  const child = spawn(command, args, { stdio: ['ignore', 'pipe', 'inherit'] });
  let text = '';
  child.stdout.on('data', (data) => {
    text += String(data);
  });
  const status = await new Promise((resolve, reject) => {
    child.once('error', reject);
    child.once('close', resolve);
  });
  if (status !== 0) throw new Error(`${command} ${args.join(' ')} ended with ${String(status)}`);
  return text;
}

/** Figures of one run, by their names. */
export type Figures = Readonly<Record<string, number>>;

export async function interleaved(
  title: string,
  servers: readonly Server[],
  run: (server: Server) => Promise<Figures & { readonly operations: number }>,
): Promise<void> {
  const samples = new Map<string, Figures[]>(servers.map(({ name }) => [name, []]));
  for (let round = 0; round <= RUNS; round++) {
    for (const server of servers) {
      const before = processorSeconds(server);
      const { operations, ...figures } = await run(server);
      const cpu = ((processorSeconds(server) - before) * 1e6) / operations;
      if (round > 0) samples.get(server.name)?.push({ ...figures, 'server CPU µs': cpu });
    }
  }
  print(title, samples);
}

/** Prints the medians of each contestant's figures. */
export function print(title: string, samples: ReadonlyMap<string, readonly Figures[]>): void {
  console.log(`\n${title} (medians of ${RUNS}, interleaved)`);
  console.table(
    Object.fromEntries(
      [...samples].map(([name, list]) => [
        name,
        Object.fromEntries(
          Object.keys(list[0] ?? {}).map((figure) => {
            const value = median(list.map((sample) => sample[figure] ?? Number.NaN));
            return [figure, value >= 100 ? Math.round(value) : Number(value.toFixed(1))];
          }),
        ),
      ]),
    ),
  );
}

/** Address of a server, without TLS. */
export const plainUri = ({ socket }: Server): string => `nbd+unix:///?socket=${socket}`;
