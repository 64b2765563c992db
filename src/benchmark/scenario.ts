import { stat } from 'node:fs/promises';
import { setTimeout as sleep } from 'node:timers/promises';
import { StillframeError } from '../errors.js';
import type { Contestant } from './contestant.js';
import { type GuestFigures, guestFigures, median, type Span } from './figures.js';
import { Guest } from './guest.js';
import { clockMs, type Pattern } from './guest-memory.js';
import type { Images } from './images.js';

/** Modes that are measured; `off`: the guest alone. */
export const MODES = ['off', 'full', 'top', 'none', 'incremental'] as const;
export type MeasuredMode = (typeof MODES)[number];

/** What is measured at once. */
export interface Scenario {
  readonly mode: MeasuredMode;
  readonly pattern: Pattern;
  /** Bytes that the target takes in a second; undefined: as many as it can. */
  readonly targetSpeed: number | undefined;
  /** Old data goes to a scratch file first. */
  readonly fleece: boolean;
}

export interface LoadOptions {
  /** Seconds in which backups are taken, one after the other. */
  readonly seconds: number;
  /** Seconds in which the guest writes before, and between increments. */
  readonly warmUp: number;
  /** Requests per second. */
  readonly rate: number;
  /** Bytes of a request. */
  readonly blockBytes: number;
}

export interface Outcome extends Scenario {
  readonly contestant: string;
  readonly guest: GuestFigures;
  /** Backups that were completed; with `none` there are none, since it goes on until it is told to end. */
  readonly backups: number;
  /** Seconds of one, the median; undefined: none was completed. */
  readonly seconds: number | undefined;
  /** Bytes that the target of the last one holds that was completed, or if none was, of the last one. */
  readonly targetBytes: number | undefined;
}

const JOB = 'backup';

/** Measures one scenario on a fresh drive. What fails leaves the daemon as it is then: it is of no use any more. */
export async function measure(
  contestant: Contestant,
  images: Images,
  scenario: Scenario,
  options: LoadOptions,
  signal: AbortSignal,
): Promise<Outcome> {
  const { mode, pattern } = scenario;
  await images.renewDrive();
  await contestant.tell('blockdev-add', {
    ...{ driver: 'qcow2', 'node-name': 'drive', file: { driver: 'file', filename: images.drive } },
    backing: { driver: 'raw', 'read-only': true, file: { driver: 'file', filename: images.base } },
  });
  await contestant.tell('block-export-add', {
    ...{ type: 'nbd', id: 'guest', 'node-name': 'drive', name: 'drive', writable: true },
  });
  if (mode === 'incremental')
    await contestant.tell('block-dirty-bitmap-add', { node: 'drive', name: 'bitmap' });
  const { rate, blockBytes, warmUp, seconds } = options;
  const load = { pattern, rate, blockBytes, length: images.length };
  const guest = new Guest(contestant.socket, 'drive', load, warmUp + seconds);
  const spans: Span[] = [];
  const durations: number[] = [];
  let targetBytes: number | undefined;
  try {
    await sleep(warmUp * 1000, undefined, { signal });
    if (mode === 'off') {
      const from = clockMs();
      await sleep(seconds * 1000, undefined, { signal });
      spans.push({ from, to: clockMs() });
    } else {
      for (let until = clockMs() + seconds * 1000; clockMs() < until; ) {
        const { span, completed } = await backup(contestant, images, scenario, until - clockMs(), signal);
        spans.push(span);
        if (completed) durations.push((span.to - span.from) / 1000);
        if (completed || durations.length === 0) targetBytes = (await stat(images.target)).blocks * 512;
        guest.check();
        // There has to be something in it.
        if (mode === 'incremental') await sleep(warmUp * 1000, undefined, { signal });
      }
    }
  } catch (error) {
    await guest.end(0).catch(() => undefined);
    throw error;
  }
  const figures = guestFigures(await guest.end(), spans);
  await contestant.tell('block-export-del', { id: 'guest', mode: 'hard' });
  await contestant.stopUsing('drive');
  return {
    ...{ ...scenario, contestant: contestant.name, guest: figures },
    ...{ backups: durations.length, seconds: median(durations), targetBytes },
  };
}

/** Takes one backup, and gives it up when the time is over. */
async function backup(
  contestant: Contestant,
  images: Images,
  { mode, targetSpeed, fleece }: Scenario,
  mostMs: number,
  signal: AbortSignal,
): Promise<{ readonly span: Span; readonly completed: boolean }> {
  await images.renewTarget();
  const file = { driver: 'file', filename: images.target };
  if (targetSpeed !== undefined) {
    const limits = { 'bps-total': targetSpeed };
    await contestant.tell('object-add', { 'qom-type': 'throttle-group', id: 'target-speed', limits });
  }
  await contestant.tell('blockdev-add', {
    ...{ driver: 'qcow2', 'node-name': 'target' },
    file: targetSpeed === undefined ? file : { driver: 'throttle', 'throttle-group': 'target-speed', file },
  });
  const over = contestant.next(
    ({ event, data }) => event.startsWith('BLOCK_JOB_C') && data['device'] === JOB,
  );
  // Whoever waits for it hears of it; it must not be a failure of its own before.
  over.catch(() => undefined);
  const from = clockMs();
  await contestant.tell('blockdev-backup', {
    ...{ 'job-id': JOB, device: 'drive', target: 'target', sync: mode },
    ...(mode === 'incremental' ? { bitmap: 'bitmap' } : {}),
    ...(fleece ? { 'x-fleece': true } : {}),
  });
  const timer = new AbortController();
  const timeOver = sleep(mostMs, undefined, { signal: AbortSignal.any([signal, timer.signal]) });
  const ended = await Promise.race([over, timeOver]).finally(() => timer.abort());
  const to = clockMs();
  // It may have ended meanwhile.
  if (ended === undefined) await contestant.tell('block-job-cancel', { device: JOB }).catch(() => undefined);
  const { event, data } = ended ?? (await over);
  if (data['error'] !== undefined) {
    throw new StillframeError(
      'ERR_STILLFRAME_IO',
      `${contestant.name}: the backup failed: ${String(data['error'])}`,
    );
  }
  await contestant.stopUsing('target');
  if (targetSpeed !== undefined) await contestant.tell('object-del', { id: 'target-speed' });
  const completed = ended !== undefined && event === 'BLOCK_JOB_COMPLETED';
  return { span: { from, to }, completed };
}
