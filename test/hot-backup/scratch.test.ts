/** Where old data of a running QEMU goes. */
import { chmodSync, chownSync, mkdirSync, mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { backupRunning, createEngine } from '#src/index.js';
import { CLI } from '../support/cli.js';
import { run } from '../support/peers.js';
import { runInSmallFileSystem, SMALL_FILE_SYSTEM_NEEDED } from '../support/small-file-system.js';
import { hasProgram, Machine } from './machine.js';

/** Backs a full drive up into nothing, slowly, while it is overwritten; all paths are in the folder $1. */
const SCRIPT = `
qemu-storage-daemon --blockdev qcow2,node-name=drv0,file.driver=file,file.filename=$1/drive \\
  --nbd-server addr.type=unix,addr.path=$1/live --export nbd,id=live,node-name=drv0,name=live,writable=on \\
  --chardev socket,id=c,path=$1/qmp,server=on,wait=off --monitor c & daemon=$!
while [ ! -S $1/qmp ]; do sleep 0.1; done
"$2" "$3" backup --qmp $1/qmp --nbd unix:$1/live --device drv0 $1/target --scratch . --speed 1k --progress json \\
  2>$1/progress & backup=$!
while ! grep -q running $1/progress && kill -0 $backup; do sleep 0.1; done
failed=0
for at in $(seq 0 39); do
  qemu-io -f raw -c "write -P 2 \${at}M 1M" "nbd+unix:///live?socket=$1/live" >/dev/null || failed=$((failed + 1))
  sleep 0.2
done
wait $backup
echo "backup ended with $?, $failed writes failed"
tail -n 1 $1/progress
kill $daemon; wait $daemon
`;

describe.skipIf(!hasProgram('qemu-storage-daemon'))('the scratch', { timeout: 180_000 }, () => {
  it('that has little space left ends the backup, and not the writes of the guest', (context) => {
    const folder = mkdtempSync(join(tmpdir(), 'stillframe-scratch-'));
    try {
      run('qemu-img', ['create', '-q', '-f', 'qcow2', join(folder, 'drive'), '64M']);
      run('qemu-io', ['-c', 'write -P 1 0 64M', join(folder, 'drive')]);
      const result = runInSmallFileSystem('32m', ['sh', '-c', SCRIPT, 'sh', folder, process.execPath, CLI]);
      if (result === undefined) context.skip(SMALL_FILE_SYSTEM_NEEDED);
      expect(result?.stdout).toContain('backup ended with 1, 0 writes failed');
      expect(result?.stdout).toMatch(/the scratch folder '.*' has less than 16777216 bytes left/);
      expect(result?.stdout).toContain('[ERR_STILLFRAME_NO_SPACE]');
    } finally {
      rmSync(folder, { recursive: true });
    }
  });

  it.skipIf(process.getuid?.() !== 0 || !hasProgram('qemu-system-x86_64'))(
    'belongs to the user whose drive it is, and is asked for where that user cannot reach it',
    async () => {
      const machine = await Machine.start('qemu-system-x86_64', { more: ['-runas', 'nobody'] });
      const engine = await createEngine({ workers: 1 });
      try {
        const [uid, gid] = ['-u', '-g'].map((option) => Number(run('id', [option, 'nobody'])));
        chownSync(machine.at('drive0'), uid ?? -1, gid ?? -1);
        const disks = [{ device: 'disk0', target: machine.at('target') }];
        // Its folder is for root alone.
        await expect(backupRunning(engine, { qmp: machine.qmp, disks })).rejects.toMatchObject({
          code: 'ERR_STILLFRAME_PERMISSION',
          message: expect.stringMatching(/the QEMU cannot open the scratch file .* with --scratch/),
        });
        expect(await machine.leftovers()).toEqual([]);
        machine.mark();
        const scratch = machine.at('scratch');
        mkdirSync(scratch, { mode: 0o711 });
        chmodSync(machine.folder, 0o711);
        await backupRunning(engine, { qmp: machine.qmp, disks, scratch });
        expect(machine.momentOf([machine.at('target')])).toBe(0);
      } finally {
        await engine.close();
        await machine.remove();
      }
    },
  );
});
