import { type ChildProcess, spawn } from 'node:child_process';
import { copyFileSync, mkdirSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { basename, dirname, join } from 'node:path';
import { hasPeer, run } from './peers.js';

/** In the order in which they have to be loaded. */
const MODULES = [
  'drivers/virtio/virtio_ring',
  'drivers/virtio/virtio',
  'drivers/virtio/virtio_pci_modern_dev',
  'drivers/virtio/virtio_pci_legacy_dev',
  'drivers/virtio/virtio_pci',
  'drivers/block/virtio_blk',
  'drivers/char/virtio_console',
];
/** What a guest has besides its disk. */
export interface GuestOptions {
  /** For QEMU's command line. Default: its disk is the export. */
  readonly options?: readonly string[];
  /** Runs QEMU's guest agent, on the first port of a serial device of virtio. Default false. */
  readonly agent?: boolean;
}
/** Files that the guest keeps. */
const KEPT = 40;
/** Files that it may be ahead of what it says: the console is slower than the disk. */
const AHEAD = 15;
const VERSION = /^vmlinuz-(.*cloud-amd64)$/;

/** The installed kernel for virtual machines, if there is one. */
function kernelVersion(): string | undefined {
  try {
    return readdirSync('/boot').flatMap((name) => VERSION.exec(name)?.[1] ?? [])[0];
  } catch {
    return undefined;
  }
}

/** Whether a guest can be started here; what is missing is said as for every other peer. */
export function hasGuest(): boolean {
  const tools = ['qemu-system-x86_64', 'busybox'].map((name) => hasPeer(name));
  if (!tools.every((there) => there)) return false;
  if (kernelVersion() !== undefined) return true;
  const line = 'apt-get install linux-image-cloud-amd64';
  if (process.env['CI'] === 'true')
    throw new Error(`the kernel of a guest is missing; install it with: ${line}`);
  console.warn(`SKIPPED: tests with a real guest; install its kernel with: ${line}`);
  return false;
}

/**
 * Mounts the disk and writes file after file: `f1`, `f2`, … of other sizes and contents each, with fsync. Says
 * `synced N SIZE` when one is safe, and takes the one away that is {@link KEPT} older. Ends when a line comes in.
 */
const INIT = `#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin:/sbin
mkdir -p /proc /sys /dev /mnt
mount -t proc none /proc; mount -t sysfs none /sys; mount -t devtmpfs none /dev
echo 4 > /proc/sys/kernel/printk
for module in /modules/*.ko; do insmod $module || echo "GUEST cannot load $module"; done
mount -t ext4 -o discard /dev/vda /mnt || echo GUEST cannot mount
if [ -e /sbin/qemu-ga ]; then
  mkdir -p /tmp; qemu-ga -d -t /tmp -f /tmp/pid -m virtio-serial -p /dev/vport*p1 || echo GUEST cannot start its agent
fi
exec 3<&0
(read line <&3; touch /stop) &
echo GUEST begins
n=0
while [ ! -e /stop ]; do
  n=$((n + 1)); size=$((1000 + n * 7919 % 150000))
  yes "file $n" | head -c $size | dd of=/mnt/f$n bs=16k conv=fsync 2>/dev/null || echo "GUEST cannot write $n"
  echo "GUEST synced $n $size"
  old=$((n - ${KEPT}))
  if [ $old -gt 0 ]; then rm /mnt/f$old; fi
done
umount /mnt && echo GUEST done
poweroff -f
`;

/** What `fN` holds. */
export function fileContent(number: number, size: number): Buffer {
  const line = `file ${number}\n`;
  return Buffer.alloc(size, line);
}

/**
 * Holds a file system of the guest, as a raw image of ours, to be sound and to have files with what they held.
 *
 * @param frozen it is to be clean as it is; otherwise what is in its journal is written first, as after a power cut
 */
export function proveFiles(
  path: string,
  files: ReadonlyMap<number, number>,
  folder: string,
  frozen = false,
): void {
  if (!frozen) run('e2fsck', ['-E', 'journal_only', '-y', path], [0, 1]);
  else if (run('dumpe2fs', ['-h', path]).includes('needs_recovery')) throw new Error('it was not frozen');
  run('e2fsck', ['-f', '-n', path]);
  const out = join(folder, 'files');
  mkdirSync(out);
  run('debugfs', ['-R', `rdump / ${out}`, path]);
  if (files.size === 0) throw new Error('there are no files to look at');
  for (const [number, size] of files) {
    if (!readFileSync(join(out, `f${number}`)).equals(fileContent(number, size))) {
      throw new Error(`f${number} is not what it was`);
    }
  }
  rmSync(out, { recursive: true });
}

/** A Linux guest whose disk is an NBD export, or something else. */
export class Guest {
  /** Files that are safe, by their numbers, with their sizes. */
  readonly synced = new Map<number, number>();
  console = '';
  readonly #child: ChildProcess;
  readonly #exited: Promise<void>;
  #line = '';

  /** @param folder for its kernel's modules and programs */
  constructor(folder: string, uri: string, { options, agent = false }: GuestOptions = {}) {
    const initramfs = makeInitramfs(folder, agent);
    this.#child = spawn(
      'qemu-system-x86_64',
      [
        ...['-accel', 'tcg', '-cpu', 'max', '-m', '192', '-nodefaults', '-no-reboot', '-display', 'none'],
        ...['-kernel', `/boot/vmlinuz-${kernelVersion()}`, '-initrd', initramfs],
        ...['-append', 'console=ttyS0 quiet panic=-1', '-serial', 'stdio'],
        ...(options ?? ['-drive', `file=${uri},if=virtio,format=raw,discard=unmap`]),
      ],
      { stdio: ['pipe', 'pipe', 'pipe'] },
    );
    for (const stream of [this.#child.stdout, this.#child.stderr]) {
      stream?.on('data', (data) => this.#take(String(data)));
    }
    this.#exited = new Promise((resolve) => this.#child.once('exit', () => resolve()));
  }

  #take(text: string): void {
    this.console += text;
    const lines = (this.#line + text).split(/\r?\n/);
    this.#line = lines.pop() ?? '';
    for (const line of lines) {
      const [, number, size] = /^GUEST synced (\d+) (\d+)$/.exec(line) ?? [];
      if (number !== undefined) this.synced.set(Number(number), Number(size));
    }
  }

  /** The files that are safe, and that it does not take away in the next moment. */
  safeFiles(): Map<number, number> {
    const oldest = this.synced.size - KEPT + AHEAD;
    return new Map([...this.synced].filter(([number]) => number > oldest));
  }

  /** Waits until so many more files are safe. */
  async writes(files: number): Promise<void> {
    const wanted = this.synced.size + files;
    while (this.synced.size < wanted) {
      if (
        this.#child.exitCode !== null ||
        this.#child.signalCode !== null ||
        this.console.includes('GUEST cannot')
      ) {
        throw new Error(`the guest is of no use:\n${this.console}`);
      }
      await new Promise((resolve) => setTimeout(resolve, 20));
    }
  }

  /** Has it unmount its disk and switch off. */
  async stop(): Promise<void> {
    this.#child.stdin?.write('stop\n');
    await this.#exited;
  }

  kill(): void {
    this.#child.kill('SIGKILL');
  }
}

function makeInitramfs(folder: string, agent: boolean): string {
  const root = join(folder, 'root');
  for (const name of ['bin', 'modules', 'sbin']) mkdirSync(join(root, name), { recursive: true });
  copyFileSync(run('sh', ['-c', 'command -v busybox']).trim(), join(root, 'bin/busybox'));
  MODULES.forEach((name, index) => {
    const from = join('/lib/modules', kernelVersion() ?? '', 'kernel', `${name}.ko`);
    copyFileSync(from, join(root, 'modules', `${index}.ko`));
  });
  if (agent) copyProgram(run('sh', ['-c', 'command -v qemu-ga']).trim(), root);
  writeFileSync(join(root, 'init'), INIT, { mode: 0o755 });
  run('sh', ['-c', 'find . | busybox cpio -o -H newc 2>/dev/null | gzip -1 > ../initramfs'], [0], root);
  return join(folder, 'initramfs');
}

/** A program with the libraries that it needs. */
function copyProgram(path: string, root: string): void {
  copyFileSync(path, join(root, 'sbin', basename(path)));
  const libraries = [...run('ldd', [path]).matchAll(/(\/\S+) \(0x/g)].map(([, library = '']) => library);
  for (const library of libraries) {
    mkdirSync(join(root, dirname(library)), { recursive: true });
    copyFileSync(library, join(root, library));
  }
}
