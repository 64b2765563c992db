/** Sessions with backing chains: images `b0.qcow2`, `b1.qcow2`, … of 4 MiB, each on the one before. */
import { join } from 'node:path';
import { expect } from 'vitest';
import type { Message } from './qmp.js';
import { play, type Session, type Step, sh } from './sessions.js';

/** Plays a session to QEMU's daemon and to ours, which are to answer the same. */
export async function compared(folder: string, session: Session): Promise<void> {
  const [theirs, ours] = await Promise.all([
    play(session.peer ?? 'qemu-storage-daemon', join(folder, 'theirs'), session),
    play('stillframe', join(folder, 'ours'), session),
  ]);
  for (const [index, answer] of theirs.answers.entries()) expect(ours.answers[index]).toEqual(answer);
  const { '': others, ...events } = theirs.events;
  const rest = (others ?? []).filter((one) => !JSON.stringify(one).includes('"SHUTDOWN"'));
  expect(ours.events).toEqual(rest.length > 0 ? { ...events, '': rest } : events);
}

/** Lines for the shell that make the images of a chain, and `was.raw` with what the one on top shows. */
export function create(count: number): string {
  const lines: string[] = [];
  for (let number = 0; number < count; number++) {
    const on = number === 0 ? '' : `-b b${number - 1}.qcow2 -F qcow2`;
    lines.push(
      `qemu-img create -q -f qcow2 ${on} b${number}.qcow2 4M`,
      `qemu-io -c 'write -P ${number + 1} ${number * 300}k 600k' -c 'write -z ${number * 128}k 64k' b${number}.qcow2 >/dev/null`,
    );
  }
  return `${lines.join('\n')}\nqemu-img convert -O raw b${count - 1}.qcow2 was.raw\n`;
}

/** The chain as nodes `n0`, `n1`, … on `f0`, `f1`, …; only the one on top is anybody's own. */
export function chain(count: number, more: Message = {}): Step {
  const image = (number: number): Message => ({
    driver: 'qcow2',
    'node-name': `n${number}`,
    file: { driver: 'file', filename: `b${number}.qcow2`, 'node-name': `f${number}` },
    ...(number === 0 ? {} : { backing: image(number - 1) }),
  });
  return ['blockdev-add', { ...image(count - 1), discard: 'unmap', ...more }];
}

export const server = ['nbd-server-start', { addr: { type: 'unix', data: { path: 'n.sock' } } }] as const;
export const exported = (id: string, node: string, writable = true): Step => [
  'block-export-add',
  { type: 'nbd', id, 'node-name': node, name: id, writable },
];
export const io = (...commands: readonly string[]): Step =>
  sh(`qemu-io -f raw ${commands.map((one) => `-c '${one}'`).join(' ')} 'nbd+unix:///live?socket=n.sock'`);
export const graph: Step = ['query-named-block-nodes', { flat: true }];
export const jobs: readonly Step[] = [['query-jobs'], ['query-block-jobs']];

/** Lines for the shell that say what became of the images. */
export function images(count: number): string {
  const lines: string[] = [];
  for (let number = 0; number < count; number++) {
    lines.push(
      `qemu-img info b${number}.qcow2`,
      `qemu-img check b${number}.qcow2 | grep -v 'fragmented\\|end offset'`,
    );
  }
  return `${lines.join('; ')}; qemu-img compare b${count - 1}.qcow2 was.raw`;
}
