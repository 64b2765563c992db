import type { ChildProcess } from 'node:child_process';
import { chmodSync, mkdtempSync, readFileSync, rmSync, statSync, writeFileSync } from 'node:fs';
import { createServer } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, afterEach, beforeEach, describe, expect, it } from 'vitest';
import { CLI, lastObject, startStillframe, stillframe } from '../support/cli.js';
import { firstDifference, Random } from '../support/data.js';
import { RawClient, tool } from '../support/nbd-client.js';
import { hasPeer, run } from '../support/peers.js';

const folder = mkdtempSync(join(tmpdir(), 'stillframe-serve-cli-'));
const at = (name: string): string => join(folder, name);
const content = new Random(9).bytes(3 << 20);
const children: ChildProcess[] = [];

beforeEach(() => writeFileSync(at('disk'), content));
afterEach(() => {
  for (const child of children.splice(0)) child.kill('SIGKILL');
  rmSync(at('socket'), { force: true });
});
afterAll(() => rmSync(folder, { recursive: true }));

type Started = ReturnType<typeof startStillframe>;

/** Starts the server and waits until it says where it can be found. */
async function serve(...args: readonly string[]): Promise<Started & { readonly said: string }> {
  const started = startStillframe(['serve', ...args]);
  children.push(started.child);
  const said = await new Promise<string>((resolve, reject) => {
    let text = '';
    started.child.stdout?.on('data', (data) => {
      text += String(data);
      if (/^nbds?[+:].*\n|^\{.*\n/m.test(text)) resolve(text);
    });
    void started.finished.then(({ stderr }) => reject(new Error(stderr)));
  });
  return { ...started, said };
}

const here = (): string => `unix:${at('socket')}`;

describe('serve', () => {
  it('says what it serves and where, and ends when it is told to', async () => {
    const { said, child, finished } = await serve(at('disk'), '-f', 'raw', '--nbd', here());
    expect(said).toBe(`serving '${at('disk')}' (3 MiB)\nnbd+unix:///?socket=${at('socket')}\n`);
    expect(statSync(at('socket')).mode & 0o777).toBe(0o600);
    const client = await RawClient.to(at('socket'), { options: [] });
    client.request(1, 1, 5, 3, 0, Buffer.from('abc'));
    expect((await client.answer()).error).toBe(0);
    child.kill('SIGTERM');
    expect(await finished).toMatchObject({ status: 0, stderr: '' });
    await client.closed();
    client.destroy();
    expect(() => statSync(at('socket'))).toThrow();
    expect(readFileSync(at('disk')).toString('latin1', 5, 8)).toBe('abc');
  });

  it('ends with 130 when it is interrupted', async () => {
    const { child, finished } = await serve(at('disk'), '-f', 'raw', '--nbd', here());
    child.kill('SIGINT');
    expect((await finished).status).toBe(130);
  });

  it('tells machines', async () => {
    const { said } = await serve(
      ...[at('disk'), '-r', '--nbd', `nbd+unix:///drive?socket=${at('socket')}`, '--output', 'json'],
    );
    expect(lastObject(said)).toEqual({
      type: 'serving',
      uris: [`nbd+unix:///drive?socket=${at('socket')}`],
      exports: [{ path: at('disk'), name: 'drive', 'virtual-size': 3 << 20, 'read-only': true }],
    });
  });

  it('chooses a free port, and permissions as asked for', async () => {
    const { said } = await serve(
      ...[at('disk'), '-r', '--nbd', '127.0.0.1:0', '--nbd', here(), '--socket-mode', '660', '-x', 'a b'],
    );
    expect(said).toMatch(/^nbd:\/\/127\.0\.0\.1:\d+\/a%20b$/m);
    expect(statSync(at('socket')).mode & 0o777).toBe(0o660);
    if (!hasPeer('nbdinfo')) return;
    const [uri = ''] = /nbd:.*/.exec(said) ?? [];
    expect(await tool('nbdinfo', '--size', uri)).toBe(`${3 << 20}\n`);
  });

  it('takes the place of a server that was killed, not that of one that runs, nor that of a file', async () => {
    const first = await serve(at('disk'), '-r', '--nbd', here());
    const second = stillframe(['serve', at('disk'), '-r', '--nbd', here()]);
    expect(second).toMatchObject({ status: 1, stdout: '' });
    expect(second.stderr).toContain('somebody else does already');
    expect(statSync(at('socket')).isSocket()).toBe(true);
    first.child.kill('SIGKILL');
    await first.finished;
    const third = await serve(at('disk'), '-r', '--nbd', here());
    third.child.kill('SIGTERM');
    await third.finished;
    writeFileSync(at('socket'), 'something');
    expect(stillframe(['serve', at('disk'), '-r', '--nbd', here()]).status).toBe(1);
    expect(readFileSync(at('socket'), 'utf8')).toBe('something');
  });

  it.each<[args: readonly string[], text: string]>([
    [['--nbd', 'unix:'], 'is no address to listen on'],
    [['--nbd', 'localhost:99999'], 'is no address to listen on'],
    [['--nbd', 'fd:77'], 'descriptor 77 is no stream socket'],
    [[], 'say where to listen'],
    [['--nbd', 'nbds://localhost'], 'needs --tls-certificates'],
    [['--nbd', ':0', '-B', 'monday'], "Dirty bitmap 'monday' not found"],
    [['--nbd', ':0', '-e', '0'], '--max-connections takes a number from 1'],
    [['--nbd', ':0', '--socket-mode', '999'], 'three octal digits'],
    [['--nbd', ':0', '-x', 'a', '-x', 'b'], 'more names'],
  ])('refuses %j', (args, text) => {
    const { status, stderr } = stillframe(['serve', at('disk'), '-r', ...args]);
    expect(stderr).toContain(text);
    expect(status).toBe(1);
  });

  it('keeps the sockets of others', async () => {
    const other = createServer();
    await new Promise<void>((resolve) => other.listen(at('socket'), resolve));
    chmodSync(at('socket'), 0o600);
    expect(stillframe(['serve', at('disk'), '-r', '--nbd', here()]).status).toBe(1);
    expect(statSync(at('socket')).isSocket()).toBe(true);
    other.close();
  });
});

describe('sockets that it is started with', () => {
  it.skipIf(!hasPeer('nbdcopy'))('are those that nbdcopy listens on', () => {
    const command = [process.execPath, CLI, 'serve', at('disk'), '-r'];
    run('nbdcopy', ['--', '[', ...command, ']', at('copy')]);
    expect(firstDifference(readFileSync(at('copy')), content)).toBe(-1);
  });

  it.skipIf(!hasPeer('nbdsh'))('can be a connection', () => {
    const command = [process.execPath, CLI, 'serve', at('disk'), '-f', 'raw', '--nbd', 'fd:0'];
    const script = `h.connect_command(${JSON.stringify(command)}); h.pwrite(b"xyz", 7); print(h.pread(3, 7)); h.shutdown()`;
    expect(run('env', ['PATH=/usr/bin:/bin', 'nbdsh', '-c', script])).toContain("b'xyz'");
    expect(readFileSync(at('disk')).toString('latin1', 7, 10)).toBe('xyz');
  });
});
