import { randomBytes } from 'node:crypto';
import { existsSync, mkdirSync, readdirSync, readFileSync, renameSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { StillframeError } from '../errors.js';

/**
 * Names of what we make in a QEMU, so that the next run knows what a killed one has left: those of one run begin with
 * the run's own, which also says whether the NBD server of the QEMU is ours. A node's name has at most 31 bytes.
 */
const NAME = /^(stillframe-(?:own-)?[0-9a-f]{12})-\d+(?:-[a-z]+)?$/;
const PLACE = /^stillframe-(?:own-)?[0-9a-f]{12}$/;
const OWN_SERVER = /^stillframe-own-/;

/** @param ownServer it starts an NBD server in the QEMU, and stops it */
export function nameRun(ownServer: boolean): string {
  return `stillframe-${ownServer ? 'own-' : ''}${randomBytes(6).toString('hex')}`;
}

/** The run that has given the name; undefined where it is none of ours. */
export function runOf(name: unknown): string | undefined {
  return typeof name === 'string' ? NAME.exec(name)?.[1] : undefined;
}

export function hasOwnServer(run: string): boolean {
  return OWN_SERVER.test(run);
}

/** A folder of a run on this machine: for its socket, and to tell whether it is still at work. */
export function makePlace(run: string): string {
  sweepPlaces();
  const place = placeOf(run);
  mkdirSync(place, { mode: 0o700 });
  // Whoever looks sees all of it or nothing.
  writeFileSync(join(place, 'new'), `${process.pid} ${startOf(process.pid) ?? ''}`);
  renameSync(join(place, 'new'), join(place, 'pid'));
  return place;
}

export function removePlace(run: string): void {
  rmSync(placeOf(run), { recursive: true, force: true });
}

/** Removes the places of runs that were killed, and whose QEMU does not tell of them any more. */
function sweepPlaces(): void {
  for (const name of readdirSync(tmpdir())) {
    if (PLACE.test(name) && existsSync(join(placeOf(name), 'pid')) && processOf(name) === undefined) {
      removePlace(name);
    }
  }
}

/** @throws StillframeError ERR_STILLFRAME_LOCKED where the run is still at work on this machine */
export function checkNotAtWork(run: string): void {
  const pid = processOf(run);
  if (pid === undefined) return;
  throw new StillframeError(
    'ERR_STILLFRAME_LOCKED',
    `another backup of this QEMU is under way (process ${pid}); wait for its end, or end it`,
  );
}

/** The process of a run that is at work on this machine. */
function processOf(run: string): number | undefined {
  let text: string;
  try {
    text = readFileSync(join(placeOf(run), 'pid'), 'utf8');
  } catch {
    return undefined;
  }
  const [pid, start] = text.split(' ');
  return start !== undefined && start !== '' && startOf(Number(pid)) === start ? Number(pid) : undefined;
}

function placeOf(run: string): string {
  return join(tmpdir(), run);
}

/** When a process was started, so that another one of its number is not taken for it. */
function startOf(pid: number): string | undefined {
  try {
    const stat = readFileSync(`/proc/${pid}/stat`, 'utf8');
    // The name of the program, in parentheses, can be anything; the start is the 22nd field.
    return stat.slice(stat.lastIndexOf(')') + 2).split(' ')[19];
  } catch {
    return undefined;
  }
}
