import { describe, it } from 'vitest';
import { hasPeer } from '../../support/peers.js';
import { temporaryFolder } from '../qcow2-support.js';
import { Killed } from './killed.js';

describe.skipIf(!hasPeer('qemu-img'))('a process that writes is killed, and so is the next one', () => {
  const killed = new Killed(temporaryFolder());

  it.each([1, 2])('seed %i', async (seed) => {
    await killed.run(seed, 3);
  });
});
