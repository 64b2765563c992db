import { afterEach, expect, it, vi } from 'vitest';
import { prepareTls } from '#src/nbd/server/tls.js';

afterEach(() => {
  vi.unstubAllEnvs();
});

it('says so where there is no OpenSSL that could speak TLS', () => {
  const attempt = () => prepareTls({ certificates: '/nowhere' });
  expect(attempt).toThrow("'/nowhere/server-cert.pem'");
  vi.stubEnv('STILLFRAME_NO_FFI', '1');
  expect(attempt).toThrow('there is no OpenSSL here that can be called: NBD speaks TLS by that of Node');
});
