/**
 * One deliberate mistake: a text that occurs once in a file, what it becomes, and the tests that must notice where the
 * simulator does not.
 */
export interface Mutant {
  readonly name: string;
  readonly what: string;
  readonly file: string;
  readonly find: string;
  readonly replace: string;
  readonly tests?: readonly string[];
}

const FRAME = 'src/block/filters/copy-before-write.ts';
const DESK = 'src/block/filters/copy-desk.ts';
const DISK = 'src/block/disk.ts';
const NODE = 'src/block/qcow2/node.ts';
const REBASE = 'src/block/rebase.ts';
const METADATA = 'src/block/qcow2/metadata.ts';
const ALL_TABLES = 'src/block/qcow2/all-tables.ts';
const TARGET = 'src/backup/target.ts';
const JOB = 'src/backup/backup-job.ts';
const ANY_JOB = 'src/job/job.ts';
const TRACKER = 'src/block/tracked-requests.ts';
const FUTEX = 'src/kernels/futex.ts';
const CONTROL = 'src/job/control.ts';
const CACHE = 'src/block/qcow2/slice-cache.ts';
const FILE = 'src/block/raw/file.ts';
const BITMAPS = 'src/bitmap/bitmap-set.ts';
const SNAPSHOT = 'src/block/filters/snapshot-access.ts';
const MIRROR = 'src/block/filters/mirror.ts';
const MIRROR_JOB = 'src/backup/mirror-job.ts';
const STREAM_JOB = 'src/backup/stream-job.ts';
const COMMIT_JOB = 'src/backup/commit-job.ts';

const threads = ['test/block/disk.test.ts'];
const hung = ['test/block/nbd.test.ts'];
const modes = ['test/backup/modes.test.ts'];
const errors = ['test/backup/errors.test.ts'];
const bitmaps = ['test/backup/bitmap-modes.test.ts'];
const fleece = ['test/backup/fleece.test.ts', 'test/nbd/freeze.test.ts'];
const rounds = ['test/backup/rounds.test.ts'];
const power = ['test/block/qcow2-power-cut.test.ts'];
const kill = ['test/block/kill/power-cut.test.ts'];
const amended = ['test/block/qcow2-amend-power-cut.test.ts'];
const qcow2 = ['test/block/qcow2.test.ts'];
const contract = ['test/block/conformance.test.ts'];
const compressed = ['test/block/qcow2-compressed.test.ts'];
const durable = ['test/backup/durable.test.ts'];
const mirrors = ['test/block/mirror.test.ts', 'test/backup/mirror.test.ts', 'test/daemon/mirror.test.ts'];
const mirrorSessions = ['test/daemon/mirror-sessions.test.ts'];
const chains = ['test/block/chains.test.ts'];
const chainDevices = ['test/daemon/chain-devices.test.ts'];
const streams = ['test/daemon/stream.test.ts'];
const commits = ['test/daemon/commit.test.ts'];
const chainJobs = ['test/daemon/chain-jobs.test.ts'];

export const mutants: readonly Mutant[] = [
  {
    name: 'write-first',
    what: 'the guest writes before the old data is copied',
    file: DISK,
    find: 'for (const frame of this.#activeFrames()) frame.beforeWrite(offset, length);\n      try {\n        body(node);',
    replace:
      'body(node);\n      try {\n        for (const frame of this.#activeFrames()) frame.beforeWrite(offset, length);',
    tests: threads,
  },
  {
    name: 'discard-unseen',
    what: 'a discard passes copy-before-write by',
    file: DISK,
    find: "this.mutate('discard', offset, length, (node) => node.discard(offset, length));",
    replace: 'this.node.discard(offset, length);',
    tests: threads,
  },
  {
    name: 'zeroes-unseen',
    what: 'a write of zeroes passes copy-before-write by',
    file: DISK,
    find: "this.mutate('write zeroes', offset, length, (node) => node.writeZeroes(offset, length, mayUnmap));",
    replace: 'this.node.writeZeroes(offset, length, mayUnmap);',
    tests: threads,
  },
  {
    name: 'no-drain',
    what: 'the instant does not wait for requests in flight',
    file: DISK,
    find: 'return this.#requests.drained(() => {',
    replace: 'return ((work: () => T) => work())(() => {',
    tests: threads,
  },
  {
    name: 'overlap-let-in',
    what: 'overlapping requests run side by side',
    file: TRACKER,
    find: 'start < otherEnd && (slots[slot * 2] ?? 0) < end',
    replace: 'start < otherEnd && (slots[slot * 2] ?? 0) === start && end < 0',
    tests: threads,
  },
  {
    name: 'adjacent-refused',
    what: 'a request waits for one that only touches it',
    file: TRACKER,
    find: 'start < otherEnd && (slots',
    replace: 'start <= otherEnd + 4096 && (slots',
    tests: threads,
  },
  {
    name: 'busy-ignored',
    what: 'a guest does not wait for a cluster that is being copied',
    file: FRAME,
    find: 'else this.#waitWhileBusy(cluster, deadline);',
    replace: 'else cluster++;',
    tests: threads,
  },
  {
    name: 'first-cluster-only',
    what: 'copy-before-write saves the first cluster of a request only',
    file: FRAME,
    find: 'const end = Math.ceil((offset + length) / clusterSize);',
    replace: 'const end = Math.floor(offset / clusterSize) + 1;',
    tests: threads,
  },
  {
    name: 'done-on-failure',
    what: 'a cluster that could not be copied counts as done',
    file: FRAME,
    find: 'kernels.clustersTransition(states, cluster, count, CLUSTER_BUSY, CLUSTER_TODO);',
    replace:
      'kernels.clustersTransition(states, cluster, count, CLUSTER_BUSY, CLUSTER_DONE); Atomics.sub(this.#runtime.arena.i32, (this.descriptor.control + REMAINING) >> 2, count);',
    tests: errors,
  },
  {
    name: 'broken-completes',
    what: 'a frame whose old data was lost is not marked broken',
    file: FRAME,
    find: 'Atomics.or(this.#runtime.arena.i32, word, cancelled ? GIVEN_UP : LOST);',
    replace: '',
    tests: errors,
  },
  {
    name: 'broken-unheard',
    what: 'a job asleep is not woken when its frame breaks',
    file: FRAME,
    find: 'advance(this.#runtime.arena, this.descriptor.owner);',
    replace: '',
    tests: errors,
  },
  {
    name: 'tail-lost',
    what: 'the last, short cluster is rounded down',
    file: FRAME,
    find: 'return start + bytes === length ? Math.ceil(bytes / clusterSize) : Math.floor(bytes / clusterSize);',
    replace: 'return Math.ceil(bytes / clusterSize);',
    tests: [...modes, ...rounds],
  },
  {
    name: 'zero-is-unallocated',
    what: 'top takes a zero cluster for an unallocated one',
    file: FRAME,
    find: "if ((own.flags & STATUS_ALLOCATED) === 0) return { kind: 'skip', length: own.length };",
    replace:
      "if ((own.flags & STATUS_ALLOCATED) === 0 || own.flags & STATUS_ZERO) return { kind: 'skip', length: own.length };",
    tests: modes,
  },
  {
    name: 'zero-not-written',
    what: 'zeroes are left out of a target that does not read as zeroes',
    file: FRAME,
    find: 'if (zero > 0 && !targetReadsZero) this.#zeroUnits(start, bytes, count);',
    replace: '',
    tests: modes,
  },
  {
    name: 'holes-not-written',
    what: 'holes of the source are left out of a target that does not read as zeroes',
    file: FRAME,
    find: 'if (!targetReadsZero) this.#onTarget(() => this.target.writeZeroes(start, bytes, true));',
    replace: '',
    tests: [...modes, ...rounds],
  },
  {
    name: 'existing-is-zero',
    what: 'an existing target is taken to read as zeroes',
    file: TARGET,
    find: 'readsZero: false, finalPath: path',
    replace: 'readsZero: true, finalPath: path',
    tests: modes,
  },
  {
    name: 'partial-kept',
    what: 'a job that failed leaves its unfinished target',
    file: TARGET,
    find: 'rmSync(target.partialPath, { force: true });\n      // Nobody',
    replace: '// Nobody',
    tests: ['test/backup/job.test.ts'],
  },
  {
    name: 'folder-not-synced',
    what: 'the new name is not made durable',
    file: TARGET,
    find: '    syncFolder(dirname(target.finalPath));\n',
    replace: '',
    tests: durable,
  },
  {
    name: 'same-file-allowed',
    what: 'a backing file of the source may be the target',
    file: TARGET,
    find: 'const sources = filesOf(source);',
    replace: 'const sources = filesOf(source).slice(0, 1);',
    tests: modes,
  },
  {
    name: 'cluster-too-small',
    what: 'the copy works in clusters smaller than those of the target',
    file: TARGET,
    find: 'return Math.max(BACKUP_CLUSTER_SIZE, target.clusterSize ?? 0);',
    replace: 'return BACKUP_CLUSTER_SIZE;',
    tests: modes,
  },
  {
    name: 'error-forgotten',
    what: 'a job that failed ends without its error',
    file: ANY_JOB,
    find: 'failure = this.end(outcome, failure);',
    replace: 'failure = this.end(outcome, undefined);',
    tests: errors,
  },
  {
    name: 'backing-shorter',
    what: 'a read beyond the end of a shorter backing file goes to it all the same',
    file: NODE,
    find: 'const inside = backing === undefined ? 0 : Math.max(0, Math.min(length, backing.length - offset));',
    replace: 'const inside = backing === undefined ? 0 : length;',
    tests: contract,
  },
  {
    name: 'backing-shines-through',
    what: 'zeroes are not written over unallocated clusters of an image whose backing file is not open',
    file: NODE,
    find: 'this.#hasBacking = backing !== undefined || descriptor.backingFile !== undefined;',
    replace: 'this.#hasBacking = backing !== undefined;',
    tests: modes,
  },
  {
    name: 'metadata-before-data',
    what: 'metadata is written before what it refers to is durable',
    file: METADATA,
    find: "const reached = state.get('sequence');\n    this.#sync(hold);",
    replace: "const reached = state.get('sequence');",
    tests: power,
  },
  {
    name: 'freed-too-early',
    what: 'clusters are freed while entries on the disk still refer to them',
    file: METADATA,
    find: '  #deferFree(run: HostRun, sequence: number): void {',
    replace:
      '  #deferFree(run: HostRun, sequence: number): void {\n    if (sequence > 0) return this.#lower(run);',
    tests: power,
  },
  {
    name: 'freed-under-reader',
    what: 'a freed cluster is reused while a read of it is in flight',
    file: METADATA,
    find: 'if (!closing && Atomics.load(i32, old) !== 0) return;',
    replace: '',
    tests: qcow2,
  },
  {
    name: 'snapshot-overwritten',
    what: 'a cluster that a snapshot shares is written in place',
    file: NODE,
    find: 'if (found.kind === L2_DATA && found.copied) {',
    replace: 'if (found.kind === L2_DATA) {',
    tests: qcow2,
  },
  {
    name: 'claim-unchecked',
    what: 'a claim does not look again whether the cluster is still to do',
    file: 'assembly/clusters.ts',
    find: 'if (atomic.cmpxchg<u64>(at, old, old ^ claim) == old) break;',
    replace: 'atomic.store<u64>(at, old ^ claim);\n      break;',
    tests: ['test/kernels/kernels.test.ts'],
  },
  {
    name: 'last-byte-unseen',
    what: 'the zero scan leaves out the last bytes',
    file: 'assembly/zero.ts',
    find: '  while (at < end) {\n    if (load<u8>(at) != 0) return false;\n    at++;\n  }\n',
    replace: '',
    tests: ['test/kernels/kernels.test.ts'],
  },
  {
    name: 'lock-not-looked-at',
    what: 'a writer does not look whether others read',
    file: 'src/os/image-lock.ts',
    find: 'if (syscalls.isLocked(fd, UNSHARED + bit, 1))',
    replace: 'if (fd < 0)',
    tests: ['test/os/image-lock.test.ts'],
  },
  {
    name: 'locks-kept-after-refusal',
    what: 'a file stays locked for what was refused',
    file: 'src/os/image-lock.ts',
    find: '    shrinkLock(fd, has);\n    throw error;',
    replace: '    throw error;',
    tests: ['test/daemon/file-locks.test.ts'],
  },
  {
    name: 'locks-kept-after-use',
    what: 'a file stays locked for what nobody does with it any more',
    file: 'src/daemon/file-locks.ts',
    find: 'isWithin(has, wanted) || isLengthened(node)',
    replace: 'isWithin(has, wanted) || has.used !== 0',
    tests: ['test/daemon/file-locks.test.ts'],
  },
  {
    name: 'wake-before-state',
    what: 'those who wait for a cluster are woken before it is done',
    file: FRAME,
    find: `    this.#runtime.kernels.clustersTransition(this.descriptor.states, cluster, count, CLUSTER_BUSY, state);
    if (state === CLUSTER_NONE) this.#count('skipped', count);
    Atomics.sub(this.#runtime.arena.i32, (this.descriptor.control + REMAINING) >> 2, count);
    this.#wake();
`,
    replace: `    this.#wake();
    this.#runtime.kernels.clustersTransition(this.descriptor.states, cluster, count, CLUSTER_BUSY, state);
    if (state === CLUSTER_NONE) this.#count('skipped', count);
    Atomics.sub(this.#runtime.arena.i32, (this.descriptor.control + REMAINING) >> 2, count);
`,
  },
  {
    name: 'sequence-read-late',
    what: 'a guest looks at the sequence it sleeps on after it saw the cluster busy',
    file: FRAME,
    find: `      const sequence = load(arena, control + SEQUENCE);
      if (kernels.clusterState(states, cluster) !== CLUSTER_BUSY) break;
`,
    replace: `      if (kernels.clusterState(states, cluster) !== CLUSTER_BUSY) break;
      const sequence = load(arena, control + SEQUENCE);
`,
  },
  {
    name: 'failed-claim-kept',
    what: 'a claim whose copy failed is never given back',
    file: FRAME,
    find: `      this.#release(cluster, end - cluster);
      throw error;
    }
    return { end, bytes, zeroes };`,
    replace: `      throw error;
    }
    return { end, bytes, zeroes };`,
  },
  {
    name: 'skipped-remain',
    what: 'clusters that are passed over still count as left to do',
    file: FRAME,
    find: `    if (state === CLUSTER_NONE) this.#count('skipped', count);`,
    replace: `    if (state === CLUSTER_NONE) {
      this.#count('skipped', count);
      this.#wake();
      return;
    }`,
  },
  {
    name: 'hole-swallows-data',
    what: 'data behind a hole is passed over with it',
    file: FRAME,
    find: 'const claimed = beyond?.kind === run.kind ? kernels.clustersClaimAt(states, end, end + whole) : 0;',
    replace: 'const claimed = kernels.clustersClaimAt(states, end, end + Math.max(1, whole));',
  },
  {
    name: 'drain-unheard',
    what: 'requests kept out by a drain are not woken at its end',
    file: TRACKER,
    find: `      withLock(this.#arena, this.#control, () => store(this.#arena, this.#control + DRAINED, 0));
      this.#wake();`,
    replace:
      '      withLock(this.#arena, this.#control, () => store(this.#arena, this.#control + DRAINED, 0));',
  },
  {
    name: 'leave-unheard',
    what: 'a request that ends does not wake those that wait for it',
    file: TRACKER,
    find: `load(this.#arena, this.#control + IN_FLIGHT) - 1);
    });
    this.#wake();`,
    replace: `load(this.#arena, this.#control + IN_FLIGHT) - 1);
    });`,
  },
  {
    name: 'second-look-left-out',
    what: 'a request does not look again once it has announced that it waits',
    file: TRACKER,
    find: `      if (withLock(this.#arena, this.#control, attempt)) {
        Atomics.sub(this.#arena.i32, waiters, 1);
        return;
      }
`,
    replace: '',
  },
  {
    name: 'drain-one-short',
    what: 'the instant does not wait for the last request in flight',
    file: TRACKER,
    find: 'this.#waitUntil(() => load(this.#arena, this.#control + IN_FLIGHT) === 0);',
    replace: 'this.#waitUntil(() => load(this.#arena, this.#control + IN_FLIGHT) <= 1);',
  },
  {
    name: 'unlock-unheard',
    what: 'a lock is given back without waking who waits for it',
    file: FUTEX,
    find: 'if (Atomics.exchange(words, index, 0) === 2) Atomics.notify(words, index, 1);',
    replace: 'Atomics.exchange(words, index, 0);',
  },
  {
    name: 'notify-before-change',
    what: 'sleepers are woken before the word they sleep on changes',
    file: FUTEX,
    find: `  Atomics.add(arena.i32, pointer >> 2, 1);
  Atomics.notify(arena.i32, pointer >> 2);`,
    replace: `  Atomics.notify(arena.i32, pointer >> 2);
  Atomics.add(arena.i32, pointer >> 2, 1);`,
  },
  {
    name: 'finalize-unheard',
    what: 'a job that waits to be finalized is not woken by it',
    file: CONTROL,
    find: `this.#store(FINALIZE, 1);
    this.wake();`,
    replace: 'this.#store(FINALIZE, 1);',
  },
  {
    name: 'resume-unheard',
    what: 'a paused job is not woken when it may go on',
    file: CONTROL,
    find: `this.#store(PAUSE, value ? 1 : 0);
    this.wake();`,
    replace: 'this.#store(PAUSE, value ? 1 : 0);',
  },
  {
    name: 'frame-left-on-disk',
    what: 'the frame stays on the disk when the job is over',
    file: JOB,
    find: `    this.#disk.removeFrame(id);
`,
    replace: '',
  },
  {
    name: 'cancel-commits',
    what: `a cancelled job's target gets its name`,
    file: JOB,
    find: `(outcome === 'cancelled' && this.#sync === 'none');`,
    replace: `outcome === 'cancelled';`,
  },
  {
    name: 'broken-at-the-end',
    what: 'whether the frame broke is not looked at once it is off the disk',
    file: JOB,
    find: "    if (failure === undefined && isSpoilt) failure = brokenFrameError('the backup has failed');\n",
    replace: '',
  },
  {
    name: 'target-unsynced',
    what: 'the flush of a target does not reach the disk',
    file: FILE,
    find: `    if (this.readOnly) return;
    this.#attempt('flush'`,
    replace: `    if (this.readOnly || this.descriptor.writeBehind) return;
    this.#attempt('flush'`,
  },
  {
    name: 'l1-too-early',
    what: 'L1 entries are written before the tables they refer to are durable',
    file: METADATA,
    find: `if (state.get('l1DirtyTo') > 0 && state.get('l1Needed') <= state.get('durable')) this.#writeL1();`,
    replace: `if (state.get('l1DirtyTo') > 0) this.#writeL1();`,
  },
  {
    name: 'extend-without-recheck',
    what: 'a thread that waited to make a file longer cuts what another has added meanwhile',
    file: FILE,
    find: `    withLock(this.#arena, this.descriptor.control + LENGTH_LOCK, () => {
      if (length <= this.length) return;
      this`,
    replace: `    withLock(this.#arena, this.descriptor.control + LENGTH_LOCK, () => {
      this`,
  },
  {
    name: 'slice-too-early',
    what: 'L2 entries are written before what they refer to is durable',
    file: CACHE,
    find: 'if ((this.#needed[slot] ?? 0) <= durable) this.#write(slot);',
    replace: 'if ((this.#needed[slot] ?? 0) <= durable + 1e9) this.#write(slot);',
    tests: power,
  },
  {
    name: 'table-before-block',
    what: 'the refcount table is written before the blocks it refers to are durable',
    file: METADATA,
    find: `      this.#refcounts.writeDirty();
      this.#sync(true);
      const from`,
    replace: `      this.#refcounts.writeDirty();
      const from`,
    tests: kill,
  },
  {
    name: 'data-freed-before-emptied',
    what: 'a committed image gives up the data in its data file while its tables on the disk refer to it',
    file: NODE,
    find: `    this.flush();
    this.#freeData(0, clusters);`,
    replace: `    this.#freeData(0, clusters);`,
    tests: kill,
  },
  {
    name: 'renamed-before-copied',
    what: 'a rebased image names its new backing file before what it needed of the old one is durable',
    file: REBASE,
    find: `    node.flush();
`,
    replace: '',
    tests: kill,
  },
  {
    name: 'zeroes-uncovered',
    what: 'an image of version 2 without a backing file, given one, loses the zeroes that it has no flag for',
    file: REBASE,
    find: 'if (canFlag && kernels.isZero(',
    replace: 'if (kernels.isZero(',
    tests: chains,
  },
  {
    name: 'hole-counted-twice',
    what: 'a hole that goes on where another thread counts is in a checksum twice',
    file: 'src/block/checksum.ts',
    find: 'if (offset + hole > end && team.claimOn(end, offset + hole)) end = offset + hole;',
    replace: 'if (offset + hole > end) { team.claimOn(end, offset + hole); end = offset + hole; }',
    tests: ['test/cli/checksum.test.ts'],
  },
  {
    name: 'flush-without-sync',
    what: 'a flush ends before the metadata it wrote is on the disk',
    file: METADATA,
    find: `    this.#sync(hold);
    const { f64 }`,
    replace: '    const { f64 }',
  },
  {
    name: 'refcount-forgotten',
    what: 'the refcounts of allocated clusters are not written',
    file: METADATA,
    find: `      fillRefcounts(this.#runtime.arena, this.#refcounts.pointer(slot), within, n, this.#order);
      this.#refcounts.markDirty(slot, this.state.get('sequence'), 0);`,
    replace:
      '      fillRefcounts(this.#runtime.arena, this.#refcounts.pointer(slot), within, n, this.#order);',
  },
  {
    name: 'cluster-not-filled-up',
    what: 'a write of a part of a cluster forgets what is around it',
    file: NODE,
    find: `          this.#read(begin, scratch + (begin - start), visible - begin, input);
`,
    replace: '',
  },
  {
    name: 'discard-uncovers',
    what: `a discard lets the backing file's old data come to light`,
    file: NODE,
    find: `return this.#hasZeroFlag ? 'zero' : 'clear';`,
    replace: `return 'clear';`,
  },
  {
    name: 'scratch-shared',
    what: 'two threads get the same scratch buffer',
    file: 'src/block/qcow2/scratch.ts',
    find: 'const index = 31 - Math.clz32(~used & (used + 1));',
    replace: 'const index = 0;',
  },
  {
    name: 'short-write-lost',
    what: 'a write of which the system took a part counts as whole',
    file: FILE,
    find: '      done += put;',
    replace: '      done += Math.max(put, wanted);',
  },
  {
    name: 'short-read-lost',
    what: 'a read of which the system gave a part counts as whole',
    file: FILE,
    find: '      done += got;',
    replace: '      done += Math.max(got, wanted);',
  },
  {
    name: 'status-beyond-backing',
    what: 'the status of a range beyond the end of a shorter backing file is asked of it',
    file: 'src/block/status.ts',
    find: `    if (backing === undefined || offset >= backing.length) {
      return { length: stop, flags: STATUS_ZERO, depth, hostOffset, node: undefined };
    }
    stop = Math.min(stop, backing.length - offset);`,
    replace: `    if (backing === undefined) {
      return { length: stop, flags: STATUS_ZERO, depth, hostOffset, node: undefined };
    }
    stop = Math.max(1, Math.min(stop, backing.length - offset));`,
  },
  {
    name: 'last-flush-forgotten',
    what: 'a target whose last flush failed stays open',
    file: TARGET,
    find: `    abandonTarget(runtime, target);
    throw error;`,
    replace: '    throw error;',
  },
  {
    name: 'packed-into-freed',
    what: 'compressed data goes on in a cluster that was given up, and may be another one by now',
    file: METADATA,
    find: 'if (Math.floor(this.state.get(place) / this.clusterSize) === index) this.state.set(place, 0);',
    replace: '',
    tests: compressed,
  },
  {
    name: 'compressed-too-early',
    what: 'the entry of a compressed cluster is written before what it refers to is durable',
    file: METADATA,
    find: `    if (this.#entryBytes === 16) view.setBigUint64(at + 8, 0n);
    this.l2.markDirty(slot, sequence, sequence);`,
    replace: `    if (this.#entryBytes === 16) view.setBigUint64(at + 8, 0n);
    this.l2.markDirty(slot, sequence, 0);`,
    tests: power,
  },
  {
    name: 'packed-over-plain',
    what: 'compressed data moves over a cluster of the buffer that is still to be written as it is',
    file: NODE,
    find: '        packed = at + bytes;\n',
    replace: '',
    tests: compressed,
  },
  {
    name: 'packed-uncounted',
    what: 'the space that compressed data did not come to use stays counted',
    file: NODE,
    find: 'for (const { host, length } of unused) meta.releaseBytes(host, length);',
    replace: '',
    tests: compressed,
  },
  {
    name: 'raise-unwritten',
    what: 'the refcount of a cluster that takes more compressed data is not written',
    file: METADATA,
    find: `    this.#refcounts.markDirty(slot, this.state.get('sequence'), 0);
    return true;`,
    replace: '    return true;',
    tests: power,
  },
  {
    name: 'instant-unheld',
    what: 'guests may change what is being read of the instant from the live disk',
    file: SNAPSHOT,
    find: 'else this.#disk.undisturbed(at, stop - at, () => this.#readHeld(at, to, stop));',
    replace: 'else this.#readHeld(at, to, stop);',
    tests: [...threads, ...fleece],
  },
  {
    name: 'instant-not-looked-at-again',
    what: 'what was saved while a read of the instant waited is read from the live disk',
    file: SNAPSHOT,
    find: "const node = found === 'live' ? this.#disk.node : this.#frame.target;\n      node.read",
    replace: 'const node = this.#disk.node;\n      node.read',
    tests: [...threads, ...fleece],
  },
  {
    name: 'instant-status-unheld',
    what: 'guests may change what is being asked for the status of the instant',
    file: SNAPSHOT,
    find: `this.#disk.undisturbed(offset, most, () => {
      const now = this.#run(offset, offset + most);`,
    replace: `((_from: number, _bytes: number, body: () => void) => body())(offset, most, () => {
      const now = { found, stop: Math.min(stop, offset + most) };`,
    tests: [...threads, ...fleece],
  },
  {
    name: 'forgotten-too-early',
    what: 'guests need not save any more what is about to be copied',
    file: FRAME,
    find: "return this.#copyClaim(first, kernels.claimedCount, stepwise ? 'step' : 'run');",
    replace: `const claimed = kernels.claimedCount;
    const { clusterSize, length } = this.descriptor;
    this.#holder?.forget(first * clusterSize, Math.min((first + claimed) * clusterSize, length));
    return this.#copyClaim(first, claimed, 'run');`,
    tests: fleece,
  },
  {
    name: 'forgotten-too-much',
    what: 'what was saved of the cluster behind the copied ones is dropped as well',
    file: FRAME,
    find: 'if (saved >= 0) this.#drop(saved, stop);',
    replace: 'if (saved >= 0) this.#drop(saved, stop + 1);',
    tests: fleece,
  },
  {
    name: 'broken-holder',
    what: 'a job goes on although what holds its instant has lost it',
    file: FRAME,
    find: 'return own || this.#holder?.broken === true;',
    replace: 'return own;',
    tests: fleece,
  },
  {
    name: 'not-in-the-plan',
    what: 'what guests wrote first is taken for a part of the topmost image',
    file: SNAPSHOT,
    find: `      return { length, flags: 0, hostOffset: -1 };
    }`,
    replace: '    }',
    tests: fleece,
  },
  {
    name: 'bitmap-of-the-rest',
    what: 'an incremental backup copies what is clean',
    file: FRAME,
    find: "if (first > cluster) return { kind: 'skip', count: first - cluster };",
    replace: "if (first === cluster) return { kind: 'skip', count: 1 };",
    tests: bitmaps,
  },
  {
    name: 'not-recorded',
    what: 'a disk does not record what is written to it',
    file: DISK,
    find: '        // Whether or not it went well: a part of it may have been made.\n        this.#bitmaps.record(offset, length);',
    replace: '',
    tests: bitmaps,
  },
  {
    name: 'successor-lost',
    what: 'what was written during a failed backup is not dirty afterwards',
    file: BITMAPS,
    find: 'else bitmap.merge(successor);',
    replace: '',
    tests: bitmaps,
  },
  {
    name: 'frozen-late',
    what: 'what is written after the instant is taken off the bitmap with what was copied',
    file: BITMAPS,
    find: 'successor.enabled = bitmap.enabled;\n      bitmap.enabled = false;',
    replace: 'successor.enabled = false;',
    tests: bitmaps,
  },
  {
    name: 'uncopied-forgotten',
    what: "under 'always' what was not copied is not dirty afterwards",
    file: JOB,
    find: 'this.#frame.markUncopied(bitmap, !isKept)',
    replace: 'undefined',
    tests: bitmaps,
  },
  {
    name: 'unflushed-taken-for-copied',
    what: "under 'always' what a target lost at its last flush is not dirty afterwards",
    file: JOB,
    find: 'const how = isKept ?',
    replace: 'isKept ||= this.#target.partialPath === undefined;\n      const how = isKept ?',
    tests: ['test/sim/sim.test.ts'],
  },
  {
    name: 'not-claimed',
    what: 'a bitmap that a job changes in memory still counts in the file',
    file: JOB,
    find: 'claimDiskBitmap(runtime, disk.descriptor, bitmap);',
    replace: '',
    tests: bitmaps,
  },
  {
    name: 'group-commits-early',
    what: 'a job of a group commits before the others have come so far',
    file: ANY_JOB,
    find: 'control.waitUntil(() => control.released || control.cancelled);',
    replace: ';',
    tests: bitmaps,
  },
  {
    name: 'changed-under-readers',
    what: 'what a disk lies on is changed while somebody reads it',
    file: DISK,
    find: 'this.#sequenced(() => load(arena, this.#control + USERS) === 0);',
    replace: '',
    tests: threads,
  },
  {
    name: 'read-during-change',
    what: 'a disk is read while what it lies on is changed',
    file: DISK,
    find: 'if (load(arena, this.#control + CHANGING) === 0) break;',
    replace: 'break;',
    tests: threads,
  },
  {
    name: 'two-changes',
    what: 'two threads change what a disk lies on at once',
    file: DISK,
    find: 'this.#sequenced(() => Atomics.compareExchange(arena.i32, changing, 0, 1) === 0);',
    replace: 'Atomics.store(arena.i32, changing, 1);',
    tests: threads,
  },
  {
    name: 'old-root',
    what: 'a thread goes on with what a disk lay on before',
    file: DISK,
    find: 'if (this.#node === undefined || generation !== this.#generation) {',
    replace: 'if (this.#node === undefined) {',
    tests: threads,
  },
  {
    name: 'commit-uncovers',
    what: 'what a short image cuts off of its base comes to light when it is committed',
    file: COMMIT_JOB,
    find: 'Math.max(this.#top.descriptor.length, Math.min(this.#shown, length))',
    replace: 'Math.max(this.#top.descriptor.length, Math.min(0, length))',
    tests: chainJobs,
  },
  {
    name: 'stream-disturbed',
    what: 'a guest may write to what is being streamed',
    file: STREAM_JOB,
    find: 'this.#disk.undisturbed(offset, length, (node) => {',
    replace: 'this.#disk.use((node) => {',
    tests: streams,
  },
  {
    name: 'mirror-unflushed',
    what: 'a mirror completes before what it copied is on the disk',
    file: MIRROR,
    find: '    this.count();\n    this.flush();',
    replace: '    this.count();',
  },
  {
    name: 'mirror-of-nothing-unflushed',
    what: 'what was written before a mirror of nothing is never flushed once its target is the drive',
    file: MIRROR_JOB,
    find: '      this.#disk.flush();\n      return;',
    replace: '      return;',
  },
  {
    name: 'mirror-taken-late',
    what: 'a mirror takes a range off its bitmap after it has read it',
    file: MIRROR,
    find: `    const taken = this.#bitmap.take(start, end - start);
    try {
      const isZero = zeroes > 0 && this.#zeroesAt(start, zeroes) === zeroes;
      const moved = isZero ? 0 : this.#copyData(start, end);`,
    replace: `    let taken = 0;
    try {
      const isZero = zeroes > 0 && this.#zeroesAt(start, zeroes) === zeroes;
      const moved = isZero ? 0 : this.#copyData(start, end);
      taken = this.#bitmap.take(start, end - start);`,
    tests: mirrors,
  },
  {
    name: 'mirror-side-by-side',
    what: 'two threads of a mirror copy the same range at once',
    file: MIRROR,
    find: 'this.#requests.run(from, to, () => this.#copyDirty(from, to, worker))',
    replace: 'this.#copyDirty(from, to, worker)',
    tests: mirrors,
  },
  {
    name: 'mirror-hole-stale',
    what: 'a mirror takes for a hole what was one before it took the range off its bitmap',
    file: MIRROR,
    find: 'const isZero = zeroes > 0 && this.#zeroesAt(start, zeroes) === zeroes;',
    replace: 'const isZero = zeroes > 0;',
    tests: mirrors,
  },
  {
    name: 'mirror-failure-clean',
    what: 'what a mirror could not copy is not dirty any more',
    file: MIRROR,
    find: '      this.#bitmap.set(start, end - start);\n      throw error;',
    replace: '      throw error;',
    tests: mirrorSessions,
  },
  {
    name: 'mirror-rest-left',
    what: 'a mirror completes without what was written at the end',
    file: MIRROR,
    find: '    while (this.copyNext(worker) !== undefined);\n',
    replace: '    void worker;\n',
    tests: mirrors,
  },
  {
    name: 'mirror-not-blocking',
    what: 'a guest is answered before its write is in the mirror',
    file: DISK,
    find: '      this.#activeMirror()?.afterWrite(offset, length);\n',
    replace: '',
    tests: mirrors,
  },
  {
    name: 'mirror-ready-early',
    what: 'a mirror is ready before everything was copied',
    file: MIRROR_JOB,
    find: 'this.#caughtUp = !left && !this.control.failed;',
    replace: 'this.#caughtUp = true;',
    tests: mirrorSessions,
  },
  {
    name: 'mirror-bitmap-left',
    what: 'the dirty bitmap of a mirror stays when the job is over',
    file: MIRROR_JOB,
    find: '    endMirror(this.#runtime, this.#disk.descriptor, this.#mirror.descriptor);\n    return failure;',
    replace: '    return failure;',
    tests: mirrors,
  },
  {
    name: 'late-given-back',
    what: 'a cluster whose copy a guest does not wait for any more is claimed by others while it is being copied',
    file: FRAME,
    find: 'else if (!desk.copy(place, cluster, count, deadline)) throw this.#late(cluster);',
    replace:
      'else if (!desk.copy(place, cluster, count, deadline)) { this.#release(cluster, count); throw this.#late(cluster); }',
    tests: hung,
  },
  {
    name: 'place-lost',
    what: 'a thread whose copy came too late for a guest copies for nobody any more',
    file: DESK,
    find: 'if (!this.#exchange(place, POSTED, outcome)) this.#free(place);',
    replace: 'this.#exchange(place, POSTED, outcome);',
    tests: hung,
  },
  {
    name: 'copy-failed-unheard',
    what: 'a guest goes on although the thread that was to copy for it could not',
    file: DESK,
    find: 'if (error !== undefined) throw StillframeError.fromPlain(error);',
    replace: 'if (error !== undefined) return true;',
    tests: hung,
  },
  {
    name: 'cancel-breaks-guest',
    what: "cancelling a job fails the guest's write that waits for its target",
    file: FRAME,
    find: 'const cancelled = isCancelled(cause);',
    replace: 'const cancelled = isCancelled(undefined);',
    tests: hung,
  },
  {
    name: 'parts-of-the-topmost',
    what: 'parts of a cluster are left out that the topmost image does not hold, though the cluster is copied',
    file: JOB,
    find: 'common.skipUnallocated ? common.clusterSize : holderClusterSize(',
    replace: 'holderClusterSize(',
    tests: fleece,
  },
  {
    name: 'stream-recorded',
    what: 'what is streamed into an image is taken for a change of it',
    file: STREAM_JOB,
    find: 'const target = node.unrecorded ?? node;',
    replace: 'const target = node;',
    tests: chainDevices,
  },
  {
    name: 'stream-error-forgotten',
    what: 'an image loses its backing file although an error was ignored',
    file: STREAM_JOB,
    find: 'if (this.#ignored !== undefined) throw this.#ignored;',
    replace: '',
    tests: streams,
  },
  {
    name: 'commit-without-zeroes',
    what: 'zeroes of an image are not committed',
    file: COMMIT_JOB,
    find: 'if ((extent.flags & STATUS_ZERO) === 0) this.#base.writeZeroes(at, extent.length, false);',
    replace: '',
    tests: commits,
  },
  {
    name: 'held-disk-waits-for-itself',
    what: 'whoever keeps others from a disk is kept from it as well',
    file: DISK,
    find: 'if (this.#held) return this.use(body);',
    replace: '',
    tests: ['test/block/disk.test.ts'],
  },
  {
    name: 'zeroes-before-counts',
    what: 'a downgraded image refers to a cluster of zeroes before the disk has how often it is counted',
    file: ALL_TABLES,
    find: '    this.#metadata.flush();\n    this.#file.write(offset',
    replace: '    this.#file.write(offset',
    tests: amended,
  },
  {
    name: 'zeroed-freed-early',
    what: 'what a downgraded image had beneath its zeroes is given up before its tables on the disk know',
    file: ALL_TABLES,
    find: '    this.#file.flush();\n    this.#locked(() => {\n      this.#metadata.l2.forget',
    replace: '    this.#locked(() => {\n      this.#metadata.l2.forget',
    tests: amended,
  },
  {
    name: 'parked-while-taken',
    what: 'an idle connection is left to the poller before others can read from it',
    file: 'src/nbd/server/connection-thread.ts',
    find: '          release();\n          this.#park(socket);',
    replace: '          this.#park(socket);',
    tests: ['test/nbd/connection-thread.test.ts'],
  },
  {
    name: 'writethrough-ignored',
    what: 'an export with writethrough answers before what was written is durable',
    file: 'src/nbd/server/session.ts',
    find: '(writes && this.#writethrough) || ',
    replace: '',
    tests: ['test/daemon/nbd-sessions.test.ts'],
  },
  {
    name: 'leaving-waits',
    what: 'a node that is closed waits for a server that hangs as long as a guest does',
    file: 'src/block/nbd/connections.ts',
    find: 'Math.min(timeoutMs, LEAVING_MS)',
    replace: 'timeoutMs',
    tests: ['test/daemon/nbd-target.test.ts'],
  },
  {
    name: 'given-up-unasked',
    what: 'what a client discards of an instant is held all the same',
    file: SNAPSHOT,
    find: 'if (end > first) this.#frame.forget(',
    replace: 'if (end < first) this.#frame.forget(',
    tests: ['test/daemon/filter-nodes.test.ts'],
  },
  {
    name: 'door-closed-early',
    what: 'listening sockets are said to be free while they are watched',
    file: 'src/nbd/server/listener.ts',
    find: '    this.#setAccepting(false);\n    if (!this.#isDoorClosed) this.#context.stoppedListening();',
    replace: '    if (!this.#isDoorClosed) this.#context.stoppedListening();\n    this.#setAccepting(false);',
    tests: ['test/nbd/connection-thread.test.ts'],
  },
];
