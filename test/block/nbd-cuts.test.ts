/** A connection that ends after any byte of what the server says: the error is told, soon, and nothing else is harmed. */
import { once } from 'node:events';
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { connect, createServer } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { createEngine, type Engine } from '#src/index.js';
import { makeCertificates } from '../support/certificates.js';
import { Random } from '../support/data.js';
import { hasPeer } from '../support/peers.js';

const folder = mkdtempSync(join(tmpdir(), 'stillframe-cuts-'));
const at = (name: string): string => join(folder, name);
const content = new Random(5).noise(1 << 20);
const READ_BYTES = 3000;
const CODES = ['ERR_STILLFRAME_NBD_CONNECTION', 'ERR_STILLFRAME_NBD_REFUSED'];

let engine: Engine;
beforeAll(async () => {
  engine = await createEngine({ workers: 1 });
  writeFileSync(at('disk'), content);
  if (hasPeer('openssl')) makeCertificates(at('pki'));
});
afterAll(async () => {
  await engine.close();
  rmSync(folder, { recursive: true });
});

/** Passes connections on to a server, and ends each after so many bytes from there. */
class Cutter {
  /** Bytes that the last connection has passed on from the server. */
  passed = 0;
  readonly #server;
  most = Number.POSITIVE_INFINITY;

  constructor(socket: string, near: string) {
    this.#server = createServer((client) => {
      this.passed = 0;
      const server = connect(socket);
      const end = (): void => {
        client.destroy();
        server.destroy();
      };
      server.on('data', (bytes: Buffer) => {
        const part = bytes.subarray(0, this.most - this.passed);
        this.passed += part.length;
        client.write(part, () => {
          if (this.passed >= this.most) end();
        });
      });
      client.on('data', (bytes: Buffer) => {
        if (!server.destroyed) server.write(bytes);
      });
      for (const side of [client, server]) side.on('error', end).on('close', end);
    }).listen(near);
  }

  async close(): Promise<void> {
    this.#server.close();
    await once(this.#server, 'close');
  }
}

async function readOnce(name: string): Promise<string> {
  try {
    const disk = await engine.openDisk(name, { format: 'raw', readOnly: true });
    try {
      const bytes = Buffer.from(await disk.read(512, READ_BYTES));
      return bytes.equals(content.subarray(512, 512 + READ_BYTES)) ? 'read' : 'other data';
    } finally {
      await disk.close();
    }
  } catch (error) {
    return error instanceof Error && 'code' in error ? String(error.code) : String(error);
  }
}

describe.skipIf(!hasPeer('openssl'))('a server whose connection ends at any byte', () => {
  it.each([
    ['in plain text', undefined, 'nbd', '', 1],
    ['with TLS', { certificates: at('pki') }, 'nbds', `&tls-certificates=${at('pki')}`, 19],
  ] as const)('%s', async (_, tls, scheme, parameters, step) => {
    const disk = await engine.openDisk(at('disk'), { format: 'raw', readOnly: true });
    const far = at(`far-${scheme}.sock`);
    const server = await engine.serveNbd({ listen: `unix:${far}`, exports: [{ disk }], tls });
    const near = at(`near-${scheme}.sock`);
    const cutter = new Cutter(far, near);
    const name = `${scheme}+unix:///?socket=${near}${parameters}`;
    try {
      expect(await readOnce(name)).toBe('read');
      // A farewell of TLS may come behind the data.
      const whole = cutter.passed - 100;
      expect(whole).toBeGreaterThan(READ_BYTES);
      const outcomes = new Set<string>();
      // All of what is said before the data, and some of that.
      for (cutter.most = 1; cutter.most < whole - READ_BYTES + 200; cutter.most += step) {
        outcomes.add(await readOnce(name));
      }
      expect([...outcomes].filter((outcome) => !CODES.includes(outcome))).toEqual([]);
      cutter.most = Number.POSITIVE_INFINITY;
      expect(await readOnce(name)).toBe('read');
    } finally {
      await cutter.close();
      await server.close();
      await disk.close();
    }
  });
});
