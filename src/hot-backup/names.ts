import { randomBytes } from 'node:crypto';
import { mkdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { StillframeError } from '../errors.js';

/**
 * Names of what we make in a QEMU, so that the next run knows what a killed one has left: those of one run begin with
 * the run's own, which also says whether the NBD server of the QEMU is ours. A node's name has at most 31 bytes.
 */
const NAME = /^(stillframe-(?:own-)?[0-9a-f]{12})-\d+(?:-[a-z]+)?$/;
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
  const place = placeOf(run);
  mkdirSync(place, { mode: 0o700 });
  writeFileSync(join(place, 'pid'), `${process.pid} ${startOf(process.pid) ?? ''}`);
  return place;
}

export function removePlace(run: string): void {
  rmSync(placeOf(run), { recursive: true, force: true });
}

/** @throws StillframeError ERR_STILLFRAME_LOCKED where the run is still at work on this machine */
export function checkNotAtWork(run: string): void {
  let text: string;
  try {
    text = readFileSync(join(placeOf(run), 'pid'), 'utf8');
  } catch {
    return;
  }
  const [pid, start] = text.split(' ');
  if (start === undefined || start === '' || startOf(Number(pid)) !== start) return;
  throw new StillframeError(
    'ERR_STILLFRAME_LOCKED',
    `another backup of this QEMU is under way (process ${pid}); wait for its end, or end it`,
  );
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
