/** `stillframe backup --qmp`. */
import { existsSync } from 'node:fs';
import { afterEach, describe, expect, it } from 'vitest';
import { lastObject, startStillframe, stillframe } from '../support/cli.js';
import { hasProgram, LENGTH, Machine } from './machine.js';

let machine: Machine;
afterEach(() => machine.remove());

const program = 'qemu-system-x86_64';
const backup = (...args: string[]) => stillframe(['backup', '--qmp', machine.qmp, ...args]);

function expectDone({ status, stderr }: { readonly status: number | null; readonly stderr: string }): void {
  expect(stderr).toBe('');
  expect(status).toBe(0);
}

describe.skipIf(!hasProgram(program))('the command line', { timeout: 180_000 }, () => {
  it('backs a drive of a running machine up in full and by increments', async () => {
    machine = await Machine.start(program);
    const full = backup(
      '--device',
      'disk0',
      machine.at('full'),
      '-B',
      'daily',
      '--compress',
      '--output',
      'json',
    );
    expectDone(full);
    expect(lastObject(full.stdout)).toMatchObject({ type: 'result', sync: 'full', virtualSize: LENGTH });
    await machine.write(0, { offset: 3 << 20, length: 70_000 });
    machine.mark();
    const next = backup(
      ...['--device', `disk0=${machine.at('next')}`, '--sync', 'incremental', '--bitmap', 'daily'],
      ...['--backing', machine.at('full')],
    );
    expectDone(next);
    expect(next.stdout).toMatch(/^device: {4}disk0\ntarget: .*\nsync: {6}incremental\n/);
    expect(next.stdout).toContain('2 of 128 planned');
    expect(machine.momentOf([machine.at('next')])).toBe(0);
    // The same again without the bitmap being touched.
    await machine.write(0, { offset: 0, length: 4096 });
    machine.mark();
    const differing = ['--sync', 'bitmap', '-B', 'daily', '--bitmap-mode', 'never', '-b', machine.at('next')];
    for (const name of ['one', 'two']) {
      expectDone(backup('--device', 'disk0', machine.at(name), ...differing));
      expect(machine.momentOf([machine.at(name)])).toBe(0);
    }
    expect(await machine.bitmap('daily')).toMatchObject({ count: 65536 });
  });

  it('backs several drives up at one instant', async () => {
    machine = await Machine.start(program, { count: 2 });
    const devices = (name: string) =>
      [0, 1].flatMap((index) => ['--device', `disk${index}=${machine.at(`${name}${index}`)}`]);
    expectDone(backup(...devices('full'), '--bitmap', 'daily'));
    await machine.write(0);
    await machine.write(1);
    machine.mark();
    const next = backup(
      ...devices('next'),
      ...['--sync', 'incremental', '--bitmap', 'daily', '--output', 'json'],
      ...[0, 1].flatMap((index) => ['--backing', `disk${index}=${machine.at(`full${index}`)}`]),
    );
    expectDone(next);
    expect(lastObject(next.stdout)).toMatchObject({
      type: 'result',
      disks: [
        { device: 'disk0', sync: 'incremental' },
        { device: 'disk1', sync: 'incremental' },
      ],
    });
    expect(machine.momentOf([machine.at('next0'), machine.at('next1')])).toBe(0);
  });

  it('ends with 130 and leaves nothing behind when it is interrupted', async () => {
    machine = await Machine.start(program);
    const { child, finished } = startStillframe([
      ...['backup', '--qmp', machine.qmp, '--device', 'disk0', machine.at('target')],
      ...['--speed', '1k', '--progress', 'json'],
    ]);
    await new Promise((resolve) => child.stderr?.once('data', resolve));
    child.kill('SIGINT');
    const { status, stderr } = await finished;
    expect(status, stderr).toBe(130);
    expect(await machine.leftovers()).toEqual([]);
    expect(existsSync(machine.at('target'))).toBe(false);
    expect(existsSync(machine.at('target.partial'))).toBe(false);
  });

  it('says what is wrong with what it is told', async () => {
    machine = await Machine.start(program, { count: 2 });
    const target = machine.at('t');
    const wrong: [args: string[], code: string, text: string][] = [
      [[], 'INVALID_ARGUMENT', 'say which drive'],
      [['--device', 'disk0'], 'INVALID_ARGUMENT', '--device disk0=TARGET'],
      [['--device', 'disk0=x', target], 'INVALID_ARGUMENT', 'and not'],
      [['--device', 'disk0', target, 'more'], 'INVALID_ARGUMENT', 'one target too many'],
      [['--device', `disk0=${target}`, '--device', `disk1=${target}`], 'INVALID_ARGUMENT', 'of two drives'],
      [['--device', `disk0=${target}`, '--device', `drv0=${target}2`], 'INVALID_ARGUMENT', 'the same drive'],
      [['--device', 'nope', target], 'NOT_FOUND', 'it has drv'],
      [['--device', 'disk0', target, '--sync', 'top'], 'INVALID_ARGUMENT', 'full, incremental, bitmap'],
      [['--device', 'disk0', target, '--sync', 'incremental'], 'INVALID_ARGUMENT', 'valid bitmap name'],
      [['--device', 'disk0', target, '--nbd', 'nbd://host/name'], 'INVALID_ARGUMENT', 'NBD server listens'],
      [['--device', 'disk0', target, '--guest-agent-timeout', 'x'], 'INVALID_ARGUMENT', 'number of seconds'],
      [['--device', 'disk0', target, '--guest-agent', machine.at('ga')], 'NOT_FOUND', 'guest agent'],
      [['--device', 'disk0', target, '--scratch', machine.at('none')], 'NOT_FOUND', 'none'],
      [['--device', 'disk0', machine.at('drive1')], 'TARGET_EXISTS', '--force'],
    ];
    for (const [args, code, text] of wrong) {
      const { status, stderr } = backup(...args);
      expect(stderr).toContain(`[ERR_STILLFRAME_${code}]`);
      expect(stderr).toContain(text);
      expect(status).toBe(1);
    }
    expect(existsSync(target)).toBe(false);
    expect(await machine.leftovers()).toEqual([]);
    const { stderr } = stillframe(['backup', 'x', 'y', '--sync', 'full', '--device', 'disk0']);
    expect(stderr).toContain('--device goes with --qmp SOCKET');
  });
});
