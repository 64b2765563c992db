/** Servers that speak TLS, with keys that both sides know and with certificates. */
import { mkdirSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { makeCertificates } from '../test/support/certificates.js';
import { BYTES, CLI, folder, MiB } from './harness.js';
import { interleaved, output, type Server, start, stop } from './nbd-servers.js';

const KEY = '00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff';

export async function tls(file: string): Promise<void> {
  const pki = makeCertificates(join(folder, 'pki'));
  const keys = join(folder, 'psk', 'keys.psk');
  mkdirSync(join(folder, 'psk'));
  writeFileSync(keys, `bench:${KEY}\n`);
  const stillframe = (socket: string) => [
    ...[process.execPath, CLI, 'serve', file, '-f', 'raw', '--nbd', `unix:${socket}`],
  ];
  const qemu = (socket: string, secret: string) => [
    ...['qemu-nbd', '-t', '-e', '8', '-k', socket, '--object', `${secret},id=tls,endpoint=server`],
    ...['--tls-creds', 'tls'],
    ...['--image-opts', `driver=raw,file.driver=file,file.locking=off,file.filename=${file}`],
  ];
  const nbdkit = (socket: string) => ['nbdkit', '-f', '-U', socket, '--tls=require'];
  const ways = [
    {
      name: 'keys',
      user: 'bench@',
      parameter: `tls-psk-file=${keys}`,
      servers: {
        stillframe: (socket: string) => [...stillframe(socket), '--tls-psk', keys],
        'qemu-nbd': (socket: string) => qemu(socket, `tls-creds-psk,dir=${join(folder, 'psk')}`),
        nbdkit: (socket: string) => [...nbdkit(socket), `--tls-psk=${keys}`, 'file', file],
      },
    },
    {
      name: 'certificates',
      user: 'localhost',
      parameter: `tls-certificates=${pki}`,
      servers: {
        stillframe: (socket: string) => [...stillframe(socket), '--tls-certificates', pki],
        'qemu-nbd': (socket: string) => qemu(socket, `tls-creds-x509,dir=${pki},verify-peer=no`),
        nbdkit: (socket: string) => [...nbdkit(socket), `--tls-certificates=${pki}`, 'file', file],
      },
    },
  ];
  for (const { name, user, parameter, servers } of ways) {
    const running: Server[] = [];
    try {
      for (const [server, command] of Object.entries(servers)) {
        running.push(await start(`${server}-${name}`, command));
      }
      for (const [direction, connections] of [
        ['read', 1],
        ['read', 4],
        ['write', 1],
        ['write', 4],
      ] as const) {
        const title = `nbdcopy, TLS with ${name}, ${direction}, ${connections} connections`;
        await interleaved(title, running, async ({ socket }) => {
          const uri = `nbds+unix://${user}/?socket=${socket}&${parameter}`;
          const begin = performance.now();
          const how = ['-C', `${connections}`, '-T', `${Math.min(connections, 2)}`];
          await output('nbdcopy', [...how, ...(direction === 'read' ? [uri, 'null:'] : [file, uri])]);
          return { 'MiB/s': BYTES / MiB / ((performance.now() - begin) / 1000), operations: BYTES / MiB };
        });
      }
    } finally {
      await stop(running);
    }
  }
}
