/** Images that cannot be opened, or made longer, for what their headers say. */
import { describe, it } from 'vitest';
import { type Command, hasQemu, qcow2, same } from '../support/sessions.js';

const resize = (name: string, size: number): Command => ['block_resize', { 'node-name': name, size }];

describe.skipIf(!hasQemu())('headers, beside QEMU', () => {
  it('external data files that are not there or have no name, sizes that an image cannot have', async () => {
    await same({
      prepare: `
        truncate -s 1M base.raw
        for i in gone above both nameless; do
          case $i in above|both) base='-b base.raw -F raw';; *) base=;; esac
          qemu-img create -q -f qcow2 -o data_file=$i.data $base $i.qcow2 1M
        done
        at=$(grep -abo -m 1 DATA nameless.qcow2 | head -n 1 | cut -d: -f1)
        printf none | dd of=nameless.qcow2 bs=1 seek=$at conv=notrunc status=none
        qemu-img create -q -f qcow2 -b gone.raw -F raw -u -o data_file=below.data below.qcow2 1M
        rm gone.data both.data base.raw
        qemu-img create -q -f qcow2 -o compat=0.10 old.qcow2 1M
        qemu-img snapshot -c still old.qcow2
        qemu-img create -q -f qcow2 -o cluster_size=512 small.qcow2 1M
      `,
      steps: [
        ...['gone', 'above', 'both', 'nameless', 'below'].map((name) => qcow2(name)),
        ...['old', 'small'].map((name) => qcow2(name)),
        resize('old', 2 << 20),
        resize('small', 2 ** 52),
      ],
    });
  });
});
