/** Whatever monitors are sent, the daemon stays up and answers. */
import { spawn } from 'node:child_process';
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { connect } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, expect, it } from 'vitest';
import { COMMANDS } from '#src/qmp/schema.js';
import type { Members } from '#src/qmp/types.js';
import { CLI } from '../support/cli.js';
import { Random } from '../support/data.js';
import { QmpClient } from '../support/qmp.js';

const folder = mkdtempSync(join(tmpdir(), 'stillframe-qmp-fuzz-'));
afterAll(() => rmSync(folder, { recursive: true, force: true }));

const WORDS = [
  'd',
  't',
  'j',
  'b',
  'full',
  'bitmap',
  'none',
  'raw',
  'qcow2',
  'file',
  'nbd',
  'unix',
  'disk',
  'other',
  '',
];

/** A value of no type in particular. */
function anything(random: Random, depth: number): unknown {
  const kind = random.between(0, depth > 4 ? 5 : 8);
  switch (kind) {
    case 0:
      return null;
    case 1:
      return random.chance(0.5);
    case 2:
      return random.between(-10, 1_000_000) * random.pick([1, 0.5, 2 ** 40]);
    case 3:
      return 'x'.repeat(random.between(0, 3000));
    case 4:
    case 5:
      return WORDS[random.between(0, WORDS.length - 1)];
    case 6:
      return Array.from({ length: random.between(0, 4) }, () => anything(random, depth + 1));
    default:
      return Object.fromEntries(
        Array.from({ length: random.between(0, 5) }, () => [
          WORDS[random.between(0, WORDS.length - 1)],
          anything(random, depth + 1),
        ]),
      );
  }
}

/** Arguments with the right names, some of them. */
function argumentsOf(random: Random, command: keyof typeof COMMANDS): unknown {
  if (random.chance(0.1)) return anything(random, 0);
  const wanted: object = COMMANDS[command];
  const members: Members = 'members' in wanted ? (wanted.members as Members) : (wanted as Members);
  return Object.fromEntries(
    Object.entries(members).flatMap(([name, { kind, optional }]) => {
      if (random.chance(optional === true ? 0.8 : 0.05)) return [];
      if (Array.isArray(kind) && random.chance(0.9))
        return [[name, kind[random.between(0, kind.length - 1)]]];
      if (kind === 'bool' && random.chance(0.9)) return [[name, random.chance(0.5)]];
      if (kind === 'str' && random.chance(0.9)) return [[name, WORDS[random.between(0, WORDS.length - 1)]]];
      return [[name, anything(random, 0)]];
    }),
  );
}

it('answers every one of 3000 commands of all kinds, and takes little memory', async () => {
  for (const name of ['disk', 'other']) writeFileSync(join(folder, name), new Uint8Array(1 << 20));
  const daemon = spawn(
    process.execPath,
    [
      ...[CLI, 'daemon', '--blockdev', 'raw,node-name=d,file.driver=file,file.filename=disk'],
      ...['--blockdev', 'raw,node-name=t,file.driver=file,file.filename=other'],
      ...['--chardev', 'socket,id=c,path=qmp,server=on,wait=off', '--monitor', 'c'],
    ],
    { cwd: folder, stdio: 'inherit' },
  );
  const ended = new Promise((resolve) => daemon.once('exit', resolve));
  const client = await QmpClient.connect(join(folder, 'qmp'));
  await client.execute('qmp_capabilities');
  const names = (Object.keys(COMMANDS) as (keyof typeof COMMANDS)[]).filter((name) => name !== 'quit');
  const random = new Random(77);
  const resident = (): number =>
    Number(/VmRSS:\s+(\d+)/.exec(readFileSync(`/proc/${daemon.pid}/status`, 'utf8'))?.[1]) * 1024;
  const internal: unknown[] = [];
  for (let round = 0; round < 3000; round++) {
    const execute = names[random.between(0, names.length - 1)] ?? 'query-jobs';
    const answer = await client.send(JSON.stringify({ execute, arguments: argumentsOf(random, execute) }));
    if (JSON.stringify(answer).includes('internal error')) internal.push([execute, answer]);
    if (round % 100 === 0) {
      const bad = connect(join(folder, 'qmp'));
      bad.on('error', () => undefined);
      bad.write(Buffer.from(random.noise(20_000)));
      bad.end();
    }
    client.forget();
  }
  expect(internal).toEqual([]);
  expect(resident()).toBeLessThan(600 << 20);
  expect(await client.execute('query-status')).toMatchObject({ singlestep: false });
  await client.execute('quit');
  expect(await ended).toBe(0);
}, 120_000);
