import { spawnSync } from 'node:child_process';

/** Debian package of each peer tool the suite may call. */
const packages: Readonly<Record<string, string>> = {
  'qemu-img': 'qemu-utils',
  'qemu-io': 'qemu-utils',
  'qemu-nbd': 'qemu-utils',
  'qemu-storage-daemon': 'qemu-system-common',
  'qemu-system-x86_64': 'qemu-system-x86',
  'qemu-ga': 'qemu-guest-agent',
  busybox: 'busybox-static',
  nbdkit: 'nbdkit',
  'nbd-server': 'nbd-server',
  nbdcopy: 'libnbd-bin',
  nbdfuse: 'libnbd-bin',
  nbdinfo: 'libnbd-bin',
  nbdsh: 'python3-libnbd',
  fio: 'fio',
  openssl: 'openssl',
  'mkfs.ext4': 'e2fsprogs',
  e2fsck: 'e2fsprogs',
  debugfs: 'e2fsprogs',
  dumpe2fs: 'e2fsprogs',
  xxhsum: 'xxhash',
};

const known = new Map<string, boolean>();

/**
 * Whether a peer tool is installed. A missing one is said loudly, with the line that installs it; under
 * `CI=true` it is an error, so that no run passes by skipping.
 */
export function hasPeer(tool: string): boolean {
  let present = known.get(tool);
  if (present === undefined) {
    present = spawnSync('sh', ['-c', `command -v ${tool}`]).status === 0;
    known.set(tool, present);
    if (!present) {
      const line = `apt-get install ${packages[tool] ?? tool}`;
      if (process.env['CI'] === 'true')
        throw new Error(`peer '${tool}' is missing; install it with: ${line}`);
      console.warn(`SKIPPED: tests that need '${tool}'; install it with: ${line}`);
    }
  }
  return present;
}

/** Runs a tool (in `folder`) to its end; throws with its output when the exit status is none of `allowed`. */
export function run(
  tool: string,
  args: readonly string[],
  allowed: readonly number[] = [0],
  folder?: string,
): string {
  const result = spawnSync(tool, args, { encoding: 'utf8', maxBuffer: 1 << 28, cwd: folder });
  if (result.error) throw result.error;
  if (result.status === null || !allowed.includes(result.status)) {
    throw new Error(
      `${tool} ${args.join(' ')} ended with ${result.status ?? result.signal}\n${result.stdout}${result.stderr}`,
    );
  }
  return result.stdout;
}
