import { expect, it } from 'vitest';
import { isNbdName, nbdIdentity, parseNbdName } from '#src/block/nbd/uri.js';

const tcp = (host: string, port: number) => ({ type: 'tcp', host, port });
const unix = (path: string) => ({ type: 'unix', path });

it.each<[name: string, address: object, exportName: string]>([
  ['nbd://host', tcp('host', 10809), ''],
  ['nbd://host/', tcp('host', 10809), ''],
  ['nbd://host:1234/disk', tcp('host', 1234), 'disk'],
  ['NBD://Host:/disk', tcp('Host', 10809), 'disk'],
  ['nbd://host//disk', tcp('host', 10809), '/disk'],
  ['nbd://[::1]:1234/a/b', tcp('::1', 1234), 'a/b'],
  ['nbd://[fe80::1%25eth0]', tcp('fe80::1%25eth0', 10809), ''],
  ['nbd:///disk', tcp('localhost', 10809), 'disk'],
  ['nbd+tcp://host/disk', tcp('host', 10809), 'disk'],
  ['nbds://user@host/disk', tcp('host', 10809), 'disk'],
  ['nbd://host/a%20b%2Fc%C3%A4', tcp('host', 10809), 'a b/cä'],
  ['nbd+unix:///disk?socket=/run/nbd', unix('/run/nbd'), 'disk'],
  ['nbd+unix://?socket=/run/nbd', unix('/run/nbd'), ''],
  ['nbds+unix:///?socket=/run/a%20b', unix('/run/a b'), ''],
  ['nbd+unix:///?socket=%00abstract', unix('\0abstract'), ''],
  ['nbd:host:10809', tcp('host', 10809), ''],
  ['nbd:host:10809:exportname=a:b', tcp('host', 10809), 'a:b'],
  ['nbd:[::1]:10809:exportname=disk', tcp('::1', 10809), 'disk'],
  ['nbd:unix:/run/nbd', unix('/run/nbd'), ''],
  ['nbd:unix:/run/nbd:exportname=disk', unix('/run/nbd'), 'disk'],
])('%s', (name, address, exportName) => {
  expect(isNbdName(name)).toBe(true);
  expect(parseNbdName(name)).toMatchObject({ address, exportName });
});

it.each([
  'nbd:',
  'nbd:host',
  'nbd:host:0',
  'nbd:host:65536',
  'nbd:unix:',
  'nbd://host:x/',
  'nbd://host:70000/',
  'nbd://[::1/',
  'nbd://host/%zz',
  'nbd://host/%ff',
  'nbd://host/a%00b',
  `nbd://host/${'x'.repeat(4097)}`,
  'nbd://host/?socket=/run/nbd',
  'nbd://host/?unknown=1',
  'nbd://host/?tls-hostname=a&tls-hostname=b',
  'nbd+unix:///',
  'nbd+unix:///?socket=',
  'nbd+unix://host/?socket=/run/nbd',
  'nbd+vsock://1/',
  'nbds://host/?tls-type=anon',
  'nbds://host/?tls-type=psk',
  'nbds://host/?tls-verify-peer=maybe',
  'nbd://host/?x-timeout=soon',
  'nbd://host/?x-connections=0',
  'nbd://host/?x-connections=17',
  'nbd://host/#fragment',
])('%s is refused', (name) => {
  expect(() => parseNbdName(name)).toThrow(
    expect.objectContaining({ code: 'ERR_STILLFRAME_INVALID_ARGUMENT' }),
  );
});

it.each(['nbd', 'nbd.raw', './nbd:host:1', '/nbd://host', 'anbd://host', 'nbd/disk'])(
  '%s is a file',
  (name) => {
    expect(isNbdName(name)).toBe(false);
  },
);

it('takes parameters', () => {
  const name =
    'nbds://alice@host/?tls-certificates=/etc/pki&tls-hostname=other&tls-verify-peer=0&x-reconnect-delay=2.5&x-open-timeout=3&x-timeout=4&x-connections=2&x-dirty-bitmap=b0&x-other=1';
  expect(parseNbdName(name)).toMatchObject({
    tls: {
      certificates: '/etc/pki',
      hostname: 'other',
      verifyPeer: false,
      username: 'alice',
      pskFile: undefined,
    },
    reconnectDelayMs: 2500,
    openTimeoutMs: 3000,
    timeoutMs: 4000,
    connections: 2,
    cut: true,
    contexts: ['qemu:dirty-bitmap:b0'],
  });
  expect(parseNbdName('nbds+unix://alice@here/?socket=/s').tls).toMatchObject({
    username: 'alice',
    hostname: 'here',
  });
  expect(parseNbdName('nbds+unix://here/?socket=/s&tls-hostname=there').tls).toMatchObject({
    hostname: 'there',
  });
  expect(() => parseNbdName('nbds+unix://here:1/?socket=/s')).toThrow("names the host 'here:1'");
  expect(() => parseNbdName('nbd+unix://here/?socket=/s')).toThrow("names the host 'here'");
  expect(parseNbdName('nbds://host/?tls-type=psk&tls-psk-file=/keys').tls).toMatchObject({
    pskFile: '/keys',
    verifyPeer: true,
  });
  expect(parseNbdName('nbd://host').tls).toBeUndefined();
});

it('knows two names of one export', () => {
  const identity = (name: string) => nbdIdentity(parseNbdName(name));
  expect(identity('nbd://HOST/disk?x-timeout=1')).toBe(identity('nbd:host:10809:exportname=disk'));
  expect(identity('nbd+unix:///disk?socket=/run/nbd')).toBe(identity('nbd:unix:/run/nbd:exportname=disk'));
  expect(identity('nbd://host/a')).not.toBe(identity('nbd://host/b'));
});
