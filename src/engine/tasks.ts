import type { MessagePort } from 'node:worker_threads';
import { BackupJob, type BegunBackup, helpCopying } from '../backup/backup-job.js';
import { CommitJob } from '../backup/commit-job.js';
import { type Conversion, type ConversionListener, copyPart } from '../backup/conversion.js';
import { type ConvertOptions, type ConvertSource, convertImages } from '../backup/convert.js';
import { endFrozen, type FrozenDescriptor, freeze, type HoldOptions, thaw } from '../backup/freeze.js';
import {
  type BegunMirror,
  beginMirror,
  finishMirror,
  helpMirroring,
  MirrorJob,
  type MirrorJobOptions,
} from '../backup/mirror-job.js';
import { StreamJob } from '../backup/stream-job.js';
import { type TransactionAction, transact } from '../backup/transaction.js';
import { type AmendOptions, amendImage } from '../block/amend.js';
import { checkImage, type ImageCheck } from '../block/check.js';
import { type Checksummed, checksumPart } from '../block/checksum.js';
import { type CommitOptions, commitImage } from '../block/commit.js';
import { comparePart } from '../block/compare.js';
import { type Comparison, type Finding, lengthOf } from '../block/comparison.js';
import { type CreateImageOptions, createImage, formatNode } from '../block/create.js';
import {
  DISK_CONTROL_BYTES,
  type Disk,
  type DiskDescriptor,
  type DiskRoot,
  freeRoot,
} from '../block/disk.js';
import { bitmapSha256, bitmapStatuses, closeDiskBitmaps, openDiskBitmaps } from '../block/disk-bitmaps.js';
import { drainOrder } from '../block/drain-order.js';
import { type BitmapAction, editBitmap } from '../block/edit-bitmap.js';
import { editSnapshots, type SnapshotAction } from '../block/edit-snapshots.js';
import { isStorage } from '../block/files.js';
import type { CopyBuffer, Frame, FrameDescriptor } from '../block/filters/copy-before-write.js';
import { CopyDesk } from '../block/filters/copy-desk.js';
import type { MirrorDescriptor } from '../block/filters/mirror.js';
import {
  attachNode,
  closeLayer,
  closeNode,
  copyBufferOf,
  forgetDisk,
  liveDisk,
  type OpenImageOptions,
  openImage,
} from '../block/graph.js';
import { chainInfo, type ImageInfo, imageInfo, nodeInfo } from '../block/info.js';
import { type HeaderOptions, type Layer, openNodeLayer, readLayerHeader } from '../block/layers.js';
import {
  changeSnapshots,
  listSnapshots,
  reopenImage,
  resizeNode,
  type SnapshotChange,
  swapBitmaps,
} from '../block/live-changes.js';
import { mapFiles, mapNode } from '../block/map.js';
import type { MapRange } from '../block/map-batch.js';
import { type Measured, type MeasureOptions, measureImage } from '../block/measure.js';
import { workingFor } from '../block/nbd/index.js';
import type { FileDescriptor, NodeDescriptor, Qcow2Descriptor, StorageDescriptor } from '../block/node.js';
import { changeBacking, type Preallocation, type RepairMode } from '../block/qcow2/index.js';
import { closeDescriptor, reopenFile } from '../block/raw/file.js';
import { openRaw } from '../block/raw/raw.js';
import { type RebaseOptions, rebaseImage } from '../block/rebase.js';
import { type Links, relinkNode } from '../block/relink.js';
import { type ResizeOptions, resizeImage } from '../block/resize.js';
import { type PlainError, StillframeError, toStillframeError } from '../errors.js';
import { JobControl } from '../job/control.js';
import { Team, type TeamMemory } from '../job/team.js';
import type { Runtime } from '../kernels/runtime.js';
import type { ExportDescriptor } from '../nbd/server/exports.js';
import { type ExportOptions, freeExport, makeExport } from '../nbd/server/offer.js';
import type { ChainWork } from './chain-job.js';
import { holdDisks, type SectionChannel } from './drained-section.js';

/** Work the host thread hands to a thread of the engine, as plain data. */
export type Task =
  /** Nothing; shows that a thread has started. */
  | { readonly kind: 'ready' }
  | { readonly kind: 'open'; readonly path: string; readonly options: OpenDiskTask; readonly id: number }
  | { readonly kind: 'close'; readonly disk: DiskDescriptor }
  | { readonly kind: 'open-layer'; readonly layer: Layer }
  | { readonly kind: 'close-layer'; readonly node: NodeDescriptor }
  | { readonly kind: 'header'; readonly node: NodeDescriptor; readonly options: HeaderOptions }
  | {
      readonly kind: 'format';
      readonly node: NodeDescriptor;
      /** Of an image whose options name one. */
      readonly dataFile: NodeDescriptor | undefined;
      readonly length: number;
      readonly options: CreateImageOptions;
    }
  | { readonly kind: 'node-info'; readonly node: NodeDescriptor; readonly filename: string }
  | { readonly kind: 'bitmap-sha256'; readonly disk: DiskDescriptor; readonly name: string }
  | {
      readonly kind: 'open-on';
      readonly node: NodeDescriptor;
      readonly id: number;
      readonly options: Pick<DiskDescriptor, 'discard'>;
    }
  | {
      readonly kind: 'export';
      readonly disk: DiskDescriptor;
      readonly frozen: FrozenDescriptor | undefined;
      readonly options: ExportOptions;
    }
  | {
      readonly kind: 'freeze';
      readonly disk: DiskDescriptor;
      readonly options: HoldOptions;
      readonly id: number;
    }
  | { readonly kind: 'end-frozen' | 'thaw'; readonly disk: DiskDescriptor; readonly frozen: FrozenDescriptor }
  | { readonly kind: 'end-export'; readonly exported: ExportDescriptor }
  | {
      readonly kind: 'disk-status';
      readonly disk: DiskDescriptor;
      readonly offset: number;
      readonly length: number;
    }
  | { readonly kind: 'request'; readonly disk: DiskDescriptor; readonly request: GuestRequest }
  | {
      readonly kind: 'backup';
      readonly disk: DiskDescriptor;
      readonly control: number;
      readonly port: MessagePort;
      readonly begun: BegunBackup;
    }
  | { readonly kind: 'transact'; readonly actions: readonly TransactionAction[] }
  | { readonly kind: 'bitmaps'; readonly disk: DiskDescriptor }
  /** Keeps others away from disks, and carries tasks out meanwhile: see `DrainedSection`. */
  | {
      readonly kind: 'hold';
      readonly disks: readonly DiskDescriptor[];
      readonly exclusive: boolean;
      readonly channel: SectionChannel;
    }
  /** From now on the disk lies on something else. Within an exclusive section, as are the next ones. */
  | { readonly kind: 'change-root'; readonly disk: DiskDescriptor; readonly root: DiskRoot }
  /** A node as what a disk lies on. */
  | { readonly kind: 'as-drive'; readonly node: NodeDescriptor }
  /** Bytes of a node. */
  | { readonly kind: 'length'; readonly node: NodeDescriptor }
  | { readonly kind: 'relink'; readonly node: NodeDescriptor; readonly links: Links }
  | { readonly kind: 'reopen-file'; readonly node: FileDescriptor; readonly readOnly: boolean }
  /** A descriptor that {@link reopenFile} has left. */
  | { readonly kind: 'close-descriptor'; readonly fd: number }
  | {
      readonly kind: 'reopen-image';
      readonly disk: DiskDescriptor;
      readonly node: Qcow2Descriptor;
      readonly options: Links & { readonly readOnly: boolean };
    }
  | {
      readonly kind: 'resize-node';
      readonly disk: DiskDescriptor;
      readonly node: NodeDescriptor;
      readonly length: number;
      readonly preallocation: Preallocation;
    }
  | { readonly kind: 'swap-bitmaps'; readonly one: DiskDescriptor; readonly other: DiskDescriptor }
  | { readonly kind: 'snapshots'; readonly node: NodeDescriptor }
  /** While nobody uses the image. */
  | { readonly kind: 'change-snapshots'; readonly node: NodeDescriptor; readonly change: SnapshotChange }
  /** Makes the header of a writable image name another backing file, or none. */
  | {
      readonly kind: 'change-backing';
      readonly node: Qcow2Descriptor;
      readonly backing: { readonly name: string; readonly format: string | undefined } | undefined;
    }
  | {
      readonly kind: 'copy';
      readonly disk: DiskDescriptor;
      readonly frame: FrameDescriptor;
      readonly control: number;
    }
  | {
      readonly kind: 'begin-mirror';
      readonly disk: DiskDescriptor;
      readonly target: DiskDescriptor;
      readonly options: MirrorJobOptions;
      readonly id: number;
    }
  | {
      readonly kind: 'mirror';
      readonly disk: DiskDescriptor;
      readonly target: DiskDescriptor;
      readonly control: number;
      readonly port: MessagePort;
      readonly begun: BegunMirror;
    }
  | {
      readonly kind: 'help-mirror';
      readonly disk: DiskDescriptor;
      readonly mirror: MirrorDescriptor;
      readonly control: number;
    }
  /** The last part of a mirror; nobody uses the disk meanwhile. */
  | { readonly kind: 'finish-mirror'; readonly disk: DiskDescriptor; readonly mirror: MirrorDescriptor }
  | {
      readonly kind: 'copy-for-guests';
      readonly disk: DiskDescriptor;
      readonly frame: FrameDescriptor;
      readonly index: number;
      /** The job that it is for, where cancelling that may give up what is under way. */
      readonly control: number | undefined;
    }
  | {
      readonly kind: 'chain-job';
      readonly work: ChainWork;
      readonly control: number;
      readonly port: MessagePort;
    }
  | {
      readonly kind: 'convert';
      readonly sources: readonly ConvertSource[];
      readonly target: string;
      readonly options: ConvertOptions;
      readonly team: TeamMemory;
      readonly port: MessagePort;
    }
  | {
      readonly kind: 'help-convert';
      readonly conversion: Conversion;
      readonly team: TeamMemory;
      readonly port: MessagePort;
    }
  | { readonly kind: 'create'; readonly path: string; readonly options: CreateImageOptions }
  | { readonly kind: 'resize'; readonly path: string; readonly options: ResizeOptions }
  | {
      readonly kind: 'rebase';
      readonly path: string;
      readonly options: RebaseOptions;
      readonly port: MessagePort;
    }
  | {
      readonly kind: 'commit';
      readonly path: string;
      readonly options: CommitOptions;
      readonly port: MessagePort;
    }
  | {
      readonly kind: 'amend';
      readonly path: string;
      readonly options: AmendOptions;
      readonly port: MessagePort;
    }
  | {
      readonly kind: 'bitmap';
      readonly path: string;
      readonly name: string;
      readonly actions: readonly BitmapAction[];
      readonly options: Pick<ImageTask, 'format'>;
    }
  | {
      readonly kind: 'edit-snapshots';
      readonly path: string;
      readonly action: SnapshotAction;
      readonly options: Pick<ImageTask, 'format'>;
    }
  | { readonly kind: 'measure'; readonly measured: Measured; readonly options: MeasureOptions }
  | { readonly kind: 'info' | 'chain-info'; readonly path: string; readonly options: ImageTask }
  | {
      readonly kind: 'map';
      readonly path: string;
      readonly options: ImageTask;
      readonly range: MapRange;
      readonly port: MessagePort;
      /** Batches that the host has taken; it notifies. */
      readonly taken: Int32Array;
    }
  | {
      readonly kind: 'check';
      readonly path: string;
      readonly options: ImageTask;
      readonly repair: RepairMode | undefined;
      readonly port: MessagePort;
    }
  | {
      readonly kind: 'compare';
      readonly paths: readonly [string, string];
      readonly options: readonly [ImageTask, ImageTask];
      readonly strict: boolean;
      readonly team: TeamMemory;
      readonly port: MessagePort;
    }
  | {
      readonly kind: 'checksum';
      readonly path: string;
      readonly options: ImageTask;
      readonly clusterSize: number;
      readonly team: TeamMemory;
      readonly port: MessagePort;
    }
  | {
      readonly kind: 'help-checksum';
      readonly checksummed: Checksummed;
      readonly team: TeamMemory;
      readonly port: MessagePort;
    }
  | {
      readonly kind: 'help-compare';
      readonly comparison: Comparison;
      readonly team: TeamMemory;
      readonly port: MessagePort;
    };

/** How a tool opens an image it only looks at. */
export type ImageTask = Omit<OpenImageOptions, 'readOnly'>;

export interface OpenDiskTask extends OpenImageOptions {
  readonly discard: DiskDescriptor['discard'];
}

/** A request on a live disk; `pointer` is the buffer in the arena, offsets and lengths are bytes. */
export type GuestRequest =
  | {
      readonly op: 'read' | 'write' | 'write-compressed';
      readonly offset: number;
      readonly pointer: number;
      readonly length: number;
    }
  | {
      readonly op: 'zeroes';
      readonly offset: number;
      readonly length: number;
      readonly unmap: boolean;
      /** Only where no data has to be written. */
      readonly fast?: boolean;
    }
  | { readonly op: 'discard'; readonly offset: number; readonly length: number }
  | { readonly op: 'flush' };

/** Tells the host thread how far a tool is, in bytes. */
export interface ToolProgress {
  readonly done: number;
  readonly total: number;
}

function progressTo(port: MessagePort): (done: number, total: number) => void {
  let told = Number.NEGATIVE_INFINITY;
  return (done, total) => {
    const now = performance.now();
    if (now - told < PROGRESS_MS && done < total) return;
    told = now;
    port.postMessage({ done, total } satisfies ToolProgress);
  };
}

function listenerOf(port: MessagePort): ConversionListener {
  const progress = progressTo(port);
  return { progress, message: (line) => port.postMessage({ line } satisfies TeamMessage) };
}

/** What the threads of a team tell the host thread. `started`: others may help from now on. */
export type TeamMessage =
  | ToolProgress
  | { readonly started: Conversion | Comparison | Checksummed }
  | { readonly line: string };

/** What the thread that leads a comparison answers. */
export interface Compared {
  readonly comparison: Comparison;
  readonly finding: Finding | undefined;
}

/** How often a tool says how far it is, in milliseconds. */
const PROGRESS_MS = 50;
/** Lines of a check go to the host thread in batches of this many. */
const BATCH = 1024;
/** Batches of a map that may wait for the host to take them. */
const BATCHES_AHEAD = 16;

/** What a thread of the engine answers: errors travel as plain data. */
export type Answer = { readonly value: unknown } | { readonly error: PlainError };

export function answerTo(runner: TaskRunner, task: Task): Answer {
  try {
    return { value: runner.run(task) };
  } catch (error) {
    return { error: toStillframeError(error).toPlain() };
  }
}

/** Runs tasks on one thread of the engine. */
export class TaskRunner {
  readonly #runtime: Runtime;

  constructor(runtime: Runtime) {
    this.#runtime = runtime;
  }

  run(task: Task): unknown {
    switch (task.kind) {
      case 'ready':
        return undefined;
      case 'open':
        return this.#open(task.path, task.options, task.id);
      case 'close':
        return this.#close(task.disk);
      case 'open-layer':
        return openNodeLayer(this.#runtime, task.layer);
      case 'close-layer':
        return closeLayer(this.#runtime, task.node);
      case 'header':
        return readLayerHeader(this.#runtime, task.node, task.options);
      case 'format':
        return formatNode(this.#runtime, task.node, task.dataFile, task.length, task.options);
      case 'node-info':
        return nodeInfo(this.#runtime, task.node, task.filename);
      case 'bitmap-sha256':
        return bitmapSha256(this.#runtime, task.disk, task.name);
      case 'open-on':
        return this.#diskOn(task.node, { ...task.options, borrowed: true }, task.id);
      case 'export':
        return makeExport(this.#runtime, task.disk, task.frozen, task.options);
      case 'freeze':
        return freeze(this.#runtime, this.#disk(task.disk), task.options, task.id);
      case 'end-frozen':
        return endFrozen(this.#runtime, this.#disk(task.disk), task.frozen);
      case 'thaw':
        return thaw(this.#runtime, this.#disk(task.disk), task.frozen);
      case 'end-export':
        return freeExport(this.#runtime, task.exported);
      case 'disk-status':
        return this.#disk(task.disk).node.status(task.offset, task.length);
      case 'request':
        return this.#request(this.#disk(task.disk), task.request);
      case 'backup':
        // Sync mode `none` ends by being cancelled, and its target is committed then.
        return this.#forJob(
          task.control,
          (control) => BackupJob.run(this.#runtime, this.#disk(task.disk), control, task.port, task.begun),
          task.begun.sync !== 'none',
        );
      case 'transact':
        return transact(this.#runtime, task.actions, (disk) => this.#disk(disk));
      case 'hold':
        return holdDisks(
          drainOrder(
            this.#runtime,
            task.disks.map((disk) => this.#disk(disk)),
          ),
          task.exclusive,
          task.channel,
          (next) => answerTo(this, next),
        );
      case 'change-root':
        return this.#disk(task.disk).changeRoot(task.root);
      case 'as-drive':
        return this.#asDrive(task.node);
      case 'length':
        return attachNode(this.#runtime, task.node).length;
      case 'relink':
        return relinkNode(this.#runtime, task.node, task.links);
      case 'reopen-file':
        return reopenFile(task.node, task.readOnly);
      case 'close-descriptor':
        return closeDescriptor(task.fd);
      case 'reopen-image':
        return reopenImage(this.#runtime, task.disk, task.node, task.options);
      case 'resize-node':
        return resizeNode(this.#runtime, task.disk, task.node, task.length, task.preallocation);
      case 'swap-bitmaps':
        return swapBitmaps(this.#runtime, task.one, task.other);
      case 'snapshots':
        return listSnapshots(this.#runtime, task.node);
      case 'change-snapshots':
        return changeSnapshots(this.#runtime, task.node, task.change);
      case 'change-backing':
        return changeBacking(this.#runtime, task.node, task.backing);
      case 'bitmaps':
        return bitmapStatuses(this.#runtime, task.disk);
      case 'copy':
        return this.#forJob(task.control, (control) =>
          helpCopying(this.#disk(task.disk), task.frame, control),
        );
      case 'begin-mirror':
        return beginMirror(
          this.#runtime,
          this.#disk(task.disk),
          this.#disk(task.target),
          task.options,
          task.id,
        );
      case 'mirror':
        return this.#forJob(task.control, (control) =>
          MirrorJob.run(
            this.#runtime,
            this.#disk(task.disk),
            this.#disk(task.target),
            control,
            task.port,
            task.begun,
          ),
        );
      case 'help-mirror':
        return this.#forJob(task.control, (control) =>
          helpMirroring(this.#disk(task.disk), task.mirror, control),
        );
      case 'finish-mirror':
        return finishMirror(this.#runtime, this.#disk(task.disk), task.mirror);
      case 'copy-for-guests':
        return this.#copyForGuests(task);
      case 'chain-job':
        return this.#forJob(task.control, (control) => this.#chainJob(task.work, control, task.port));
      case 'create':
        return createImage(this.#runtime, task.path, task.options);
      case 'convert':
        return this.#convert(task);
      case 'help-convert':
        return this.#helpConvert(task);
      case 'resize':
        return resizeImage(this.#runtime, task.path, task.options);
      case 'rebase':
        return rebaseImage(this.#runtime, task.path, task.options, progressTo(task.port));
      case 'commit':
        return commitImage(this.#runtime, task.path, task.options, progressTo(task.port));
      case 'amend':
        return amendImage(this.#runtime, task.path, task.options, progressTo(task.port));
      case 'bitmap':
        return editBitmap(this.#runtime, task.path, task.name, task.actions, task.options);
      case 'edit-snapshots':
        return editSnapshots(this.#runtime, task.path, task.action, task.options);
      case 'measure':
        return measureImage(this.#runtime, task.measured, task.options);
      case 'info':
        return this.#info(task.path, task.options);
      case 'chain-info':
        return this.#chainInfo(task.path, task.options);
      case 'map':
        return this.#map(task);
      case 'check':
        return this.#check(task);
      case 'compare':
        return this.#compare(task);
      case 'checksum':
        return this.#checksum(task);
      case 'help-checksum':
        return new Team(task.team).help(() => this.#checksumPart(task));
      case 'help-compare':
        return new Team(task.team).help(() => this.#comparePart(task));
    }
  }

  /** Runs `body` so that cancelling the job ends what it waits for on a server, unless it is to go on then. */
  #forJob<T>(pointer: number, body: (control: JobControl) => T, ends = true): T {
    const control = new JobControl(this.#runtime.arena, pointer);
    const cancelled = (): boolean => ends && control.cancelled;
    return workingFor({ mark: pointer, cancelled }, () => body(control));
  }

  #copyForGuests({ disk, frame, index, control }: Extract<Task, { kind: 'copy-for-guests' }>): void {
    if (frame.desk === undefined) throw new Error('invariant: guests without a time-out copy themselves');
    const desk = new CopyDesk(this.#runtime.arena, frame.desk);
    // Not before there is something to copy: the frame may have ended by now.
    let attached: Frame | undefined;
    const serve = (): void =>
      desk.serve(index, (first, count) => {
        attached ??= this.#disk(disk).attachFrame(frame);
        attached.copyForGuest(first, count);
      });
    if (control === undefined) serve();
    else this.#forJob(control, serve);
  }

  #chainJob(work: ChainWork, control: JobControl, port: MessagePort): void {
    if (work.type === 'stream') {
      StreamJob.run(this.#runtime, this.#disk(work.disk), control, port, work.options);
      return;
    }
    const [top, base] = [this.#disk(work.top), this.#disk(work.base)];
    CommitJob.run(this.#runtime, top, base, control, port, work.options);
  }

  readonly #copyBuffer = (): CopyBuffer => copyBufferOf(this.#runtime);

  #disk(descriptor: DiskDescriptor): Disk {
    return liveDisk(this.#runtime, descriptor);
  }

  #open(path: string, options: OpenDiskTask, id: number): DiskDescriptor {
    const node = openImage(this.#runtime, path, options);
    try {
      return this.#diskOn(node, { discard: options.discard }, id);
    } catch (error) {
      closeNode(this.#runtime, node);
      throw error;
    }
  }

  /** The bytes of a file are those of a drive, up to a whole sector. */
  #asDrive(node: NodeDescriptor): Exclude<NodeDescriptor, StorageDescriptor> {
    return isStorage(node) ? openRaw(this.#runtime, node) : node;
  }

  #diskOn(
    node: NodeDescriptor,
    options: Pick<DiskDescriptor, 'discard' | 'borrowed'>,
    id: number,
  ): DiskDescriptor {
    const { arena } = this.#runtime;
    const image = this.#asDrive(node);
    const control = arena.alloc(DISK_CONTROL_BYTES, 'disk control block');
    try {
      const disk = {
        id,
        control,
        node: image,
        length: image.length,
        readOnly: image.readOnly,
        ...options,
      };
      openDiskBitmaps(this.#runtime, disk);
      return disk;
    } catch (error) {
      arena.free(control);
      throw error;
    }
  }

  #close(descriptor: DiskDescriptor): void {
    forgetDisk(this.#runtime, descriptor.id);
    try {
      if (!descriptor.readOnly) attachNode(this.#runtime, descriptor.node).flush();
    } finally {
      closeDiskBitmaps(this.#runtime, descriptor);
      freeRoot(this.#runtime, descriptor.control);
      this.#runtime.arena.free(descriptor.control);
      if (descriptor.borrowed !== true) closeNode(this.#runtime, descriptor.node);
    }
  }

  #request(disk: Disk, request: GuestRequest): void {
    switch (request.op) {
      case 'read':
        disk.read(request.offset, request.pointer, request.length);
        break;
      case 'write':
        disk.write(request.offset, request.pointer, request.length);
        break;
      case 'zeroes':
        zeroes(disk, request);
        break;
      case 'write-compressed':
        disk.writeCompressed(request.offset, request.pointer, request.length);
        break;
      case 'discard':
        disk.discard(request.offset, request.length);
        break;
      case 'flush':
        disk.flush();
        break;
    }
  }

  #convert({ sources, target, options, team, port }: Extract<Task, { kind: 'convert' }>): boolean {
    return convertImages(this.#runtime, sources, target, options, team, this.#copyBuffer(), {
      started: (conversion) => port.postMessage({ started: conversion } satisfies TeamMessage),
      ...listenerOf(port),
    });
  }

  #helpConvert({ conversion, team: memory, port }: Extract<Task, { kind: 'help-convert' }>): void {
    const team = new Team(memory);
    team.help(() => {
      try {
        copyPart(this.#runtime, conversion, team, this.#copyBuffer(), listenerOf(port));
      } catch (error) {
        team.stop();
        throw error;
      }
    });
  }

  #info(path: string, options: ImageTask): ImageInfo {
    const node = openImage(this.#runtime, path, { ...options, readOnly: true, backing: false });
    try {
      return imageInfo(this.#runtime, node, path);
    } finally {
      closeNode(this.#runtime, node);
    }
  }

  #chainInfo(path: string, options: ImageTask): ImageInfo[] {
    const node = openImage(this.#runtime, path, { ...options, readOnly: true });
    try {
      return chainInfo(this.#runtime, node, path);
    } finally {
      closeNode(this.#runtime, node);
    }
  }

  #map({ path, options, range, port, taken }: Extract<Task, { kind: 'map' }>): void {
    const descriptor = openImage(this.#runtime, path, { ...options, readOnly: true });
    try {
      const node = attachNode(this.#runtime, descriptor);
      port.postMessage(mapFiles(node, path, options.layers));
      let posted = 0;
      mapNode(node, range, (batch) => {
        port.postMessage(batch, [batch.buffer]);
        posted++;
        for (let got = Atomics.load(taken, 0); posted - got > BATCHES_AHEAD; got = Atomics.load(taken, 0)) {
          Atomics.wait(taken, 0, got);
        }
      });
    } finally {
      closeNode(this.#runtime, descriptor);
      // Not by closing the port: the thread goes to sleep without a turn of its event loop.
      port.postMessage(null);
    }
  }

  #check(task: Extract<Task, { kind: 'check' }>): ImageCheck {
    const { path, options, repair, port } = task;
    let batch: string[] = [];
    const flush = () => {
      port.postMessage(batch);
      batch = [];
    };
    try {
      return checkImage(this.#runtime, path, {
        format: options.format,
        lock: options.lock,
        repair,
        onMessage: (line) => {
          if (batch.push(line) === BATCH) flush();
        },
        onRepaired: (repaired) => {
          flush();
          port.postMessage(repaired);
        },
      });
    } finally {
      flush();
      port.postMessage(null);
    }
  }

  /** What the lead found of a comparison; the images themselves are closed again. */
  #compare({ paths, options, strict, team: memory, port }: Extract<Task, { kind: 'compare' }>): Compared {
    const opened: NodeDescriptor[] = [];
    const team = new Team(memory);
    try {
      const [first, second] = [0, 1].map((index) => {
        const node = openImage(this.#runtime, paths[index] ?? '', { ...options[index], readOnly: true });
        opened.push(node);
        return node;
      });
      if (first === undefined || second === undefined) throw new TypeError('two images are compared');
      const comparison = { first, second, strict };
      if (strict && lengthOf(first) !== lengthOf(second)) return { comparison, finding: undefined };
      try {
        port.postMessage({ started: comparison } satisfies TeamMessage);
        return { comparison, finding: this.#comparePart({ comparison, team: memory, port }) };
      } finally {
        team.close();
      }
    } finally {
      for (const node of opened) closeNode(this.#runtime, node);
    }
  }

  /** The part of the lead, and what the others have no way to know. */
  #checksum({ path, options, clusterSize, team: memory, port }: Extract<Task, { kind: 'checksum' }>): {
    readonly sum: bigint;
    readonly virtualSize: number;
  } {
    const image = openImage(this.#runtime, path, { ...options, readOnly: true });
    const team = new Team(memory);
    try {
      const checksummed = { image, clusterSize };
      try {
        port.postMessage({ started: checksummed } satisfies TeamMessage);
        return {
          sum: this.#checksumPart({ checksummed, team: memory, port }),
          virtualSize: lengthOf(image),
        };
      } finally {
        team.close();
      }
    } finally {
      closeNode(this.#runtime, image);
    }
  }

  #checksumPart(task: Omit<Extract<Task, { kind: 'help-checksum' }>, 'kind'>): bigint {
    const team = new Team(task.team);
    try {
      return checksumPart(this.#runtime, task.checksummed, team, this.#copyBuffer(), progressTo(task.port));
    } catch (error) {
      // What one cannot read the others need not go on for.
      team.stop();
      throw error;
    }
  }

  #comparePart(task: Omit<Extract<Task, { kind: 'help-compare' }>, 'kind'>): Finding | undefined {
    const team = new Team(task.team);
    return comparePart(this.#runtime, task.comparison, team, this.#copyBuffer().data, progressTo(task.port));
  }
}

function zeroes(
  disk: Disk,
  { offset, length, unmap, fast }: Extract<GuestRequest, { readonly op: 'zeroes' }>,
): void {
  if (fast !== true) disk.writeZeroes(offset, length, unmap);
  else if (!disk.writeZeroesFast(offset, length, unmap)) {
    throw new StillframeError(
      'ERR_STILLFRAME_UNSUPPORTED_FEATURE',
      `${length} bytes at ${offset} of '${disk.descriptor.node.path}' cannot be made zeroes without writing data`,
      { errno: 'ENOTSUP' },
    );
  }
}
