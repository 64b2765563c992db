import type { HeldCounts } from '../block/filters/copy-before-write.js';
import type { NodeDescriptor } from '../block/node.js';
import type { WriteMarks } from '../block/write-marks.js';
import type { DiskHandle } from '../engine/disk.js';
import type { FrozenDisk } from '../engine/frozen-disk.js';
import type { JobType } from '../engine/job.js';
import type { JsonObject } from '../qmp/types.js';
import type { Breakpoints } from './breakpoints.js';
import type { DaemonObject } from './objects.js';

/** A node of a daemon's graph. */
export interface GraphNode {
  /** Nodes that nobody gave a name have one that begins with `#`. */
  readonly name: string;
  readonly driver: string;
  options: JsonObject;
  /** With the traits that its options say, whatever it is set to. */
  descriptor: NodeDescriptor;
  /** What it keeps of the writes that came to it; undefined where it does not see them. */
  readonly marks?: WriteMarks | undefined;
  children: readonly Child[];
  /** Nodes that lie on it. */
  readonly parents: Set<GraphNode>;
  /** It was made by its name, and goes by it; the others go with their parents. */
  readonly owned: boolean;
  /** Name of the device that it is, if any. */
  device: string | undefined;
  /** Of a filter that a job has put there. */
  readonly job?: JobFilter | undefined;
  /** Of a filter that holds an instant: what it has to say of itself in queries. */
  readonly held?: Held | undefined;
  /** Of the filter of a job: what it has been put on, below overlays that came later. */
  readonly origin?: GraphNode | undefined;
  /** Who else relies on it: exports and jobs, with what it is to them. */
  readonly users: Map<User, Use>;
  /** Nodes are listed by it. */
  readonly sequence: number;
  /** Of a `copy-before-write` node: the instant it holds. */
  readonly frozen?: FrozenDisk | undefined;
  group?: DaemonObject | undefined;
  /** Of a `blkdebug` node. */
  readonly breakpoints?: Breakpoints | undefined;
  disk?: Promise<DiskHandle> | undefined;
  /** Somebody else has opened it and will close it. */
  readonly adopted?: true;
  /** Of a file: it is locked for what it is used for. */
  readonly isLocked?: boolean;
}

/** What a node is to somebody else; `chain`: one of those that a job within a backing chain rests on. */
export type Use = 'export' | 'source' | 'target' | 'chain' | 'intermediate';

/** The filter node of a job, as QEMU has it. */
export interface JobFilter {
  readonly type: JobType;
  readonly driver: 'copy-before-write' | 'mirror_top' | 'copy-on-read' | 'commit_top';
  /** Nobody has given it a name: it goes by that of the file below it. */
  readonly isUnnamed?: boolean | undefined;
  /** It goes by what the node below it has itself, and not by what that shows (a backup with sync mode `top`). */
  readonly isTop?: boolean | undefined;
}

/** What a filter that holds an instant has to tell (QEMU's `copy-before-write`). */
export interface Held {
  /** Bytes of one cluster. */
  readonly granularity: number;
  /** Bytes of the drive in whole clusters. */
  readonly length: number;
  readonly counts: () => HeldCounts;
}

/** An export, or a job of a type. */
export interface User {
  /** Clients of the export can write. */
  readonly writable?: boolean | undefined;
  readonly job?: JobType | undefined;
  readonly id?: string | undefined;
  /** Name of the filter of a backup, once that is there. */
  readonly filter?: () => string | undefined;
  /** It changes the length of its target. */
  readonly resizes?: boolean | undefined;
  /** The image that it commits. */
  readonly top?: GraphNode | undefined;
}

export interface Child {
  readonly role: 'file' | 'backing' | 'data-file' | 'image' | 'target';
  readonly node: GraphNode;
}

/** Drivers that pass requests on to a node that others use as well, with all that its jobs and bitmaps want to see. */
export const PASSING: ReadonlySet<string> = new Set([
  'throttle',
  'compress',
  'preallocate',
  'copy-on-read',
  'copy-before-write',
]);
