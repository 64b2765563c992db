/**
 * The commands of a monitor with their arguments: what validation, types, `query-commands` and `query-qmp-schema` rest
 * on. Source: QEMU's QAPI schema (qapi/job.json, qapi/block-core.json, qapi/block-export.json, qapi/transaction.json,
 * qapi/control.json); commands and arguments that begin with `x-` and are not there are ours.
 */
import { BLOCKDEV, CREATE, EXPORT, OBJECT, SOCKET_ADDRESS_LEGACY } from './blockdev-schema.js';
import {
  type JsonObject,
  type Kind,
  type Members,
  type ObjectOf,
  type UnionKind,
  wrongMembers,
  wrongValue,
} from './types.js';

const optional = <const K extends Kind>(kind: K): { readonly kind: K; readonly optional: true } => ({
  kind,
  optional: true,
});
const required = <const K extends Kind>(kind: K): { readonly kind: K } => ({ kind });

const ON_ERROR = ['report', 'ignore', 'enospc', 'stop', 'auto'] as const;
const SYNC = ['top', 'full', 'none', 'incremental', 'bitmap'] as const;
const id = { id: { kind: 'str' } } as const;
const device = { device: { kind: 'str' } } as const;
const bitmap = { node: { kind: 'str' }, name: { kind: 'str' } } as const;

/** What `drive-backup` and `blockdev-backup` have in common (QAPI `BackupCommon`). */
const BACKUP_COMMON = {
  'job-id': optional('str'),
  device: required('str'),
  sync: required(SYNC),
  speed: optional('int'),
  bitmap: optional('str'),
  'bitmap-mode': optional(['on-success', 'never', 'always']),
  compress: optional('bool'),
  'on-source-error': optional(ON_ERROR),
  'on-target-error': optional(ON_ERROR),
  /** With `break-snapshot` old data may be lost, and the job fails then: a daemon with `--x-qemu-compat` lets it complete. */
  'on-cbw-error': optional(['break-guest-write', 'break-snapshot']),
  'auto-finalize': optional('bool'),
  'auto-dismiss': optional('bool'),
  'filter-node-name': optional('str'),
  'discard-source': optional('bool'),
  'x-perf': optional({
    struct: {
      'use-copy-range': optional('bool'),
      'max-workers': optional('int'),
      'max-chunk': optional('int'),
      'min-cluster-size': optional('uint'),
    },
  }),
  'x-cbw-timeout': optional('uint32'),
  'x-fleece': optional('bool'),
  'x-scratch': optional('str'),
} as const;

const DRIVE_BACKUP = {
  ...BACKUP_COMMON,
  target: required('str'),
  format: optional('str'),
  mode: optional(['existing', 'absolute-paths']),
} as const;
const BLOCKDEV_BACKUP = { ...BACKUP_COMMON, target: required('str') } as const;

/** What `drive-mirror` and `blockdev-mirror` have in common. */
const MIRROR_COMMON = {
  'job-id': optional('str'),
  device: required('str'),
  target: required('str'),
  replaces: optional('str'),
  sync: required(SYNC),
  speed: optional('int'),
  granularity: optional('uint32'),
  'buf-size': optional('int'),
  'on-source-error': optional(ON_ERROR),
  'on-target-error': optional(ON_ERROR),
  'copy-mode': optional(['background', 'write-blocking']),
  'auto-finalize': optional('bool'),
  'auto-dismiss': optional('bool'),
} as const;

/** What `block-stream` and `block-commit` have in common. */
const CHAIN_COMMON = {
  'job-id': optional('str'),
  device: required('str'),
  'backing-file': optional('str'),
  speed: optional('int'),
  'on-error': optional(ON_ERROR),
  'filter-node-name': optional('str'),
  'auto-finalize': optional('bool'),
  'auto-dismiss': optional('bool'),
} as const;

const BITMAP_ADD = {
  ...bitmap,
  granularity: optional('uint32'),
  persistent: optional('bool'),
  disabled: optional('bool'),
} as const;
const BITMAP_MERGE = {
  node: required('str'),
  target: required('str'),
  bitmaps: required({ list: { alternate: ['str', { struct: bitmap }], name: 'BlockDirtyBitmapOrStr' } }),
} as const;

const SNAPSHOT = { node: required('str'), overlay: required('str') } as const;
const SNAPSHOT_SYNC = {
  device: optional('str'),
  'node-name': optional('str'),
  'snapshot-file': required('str'),
  'snapshot-node-name': optional('str'),
  format: optional('str'),
  mode: optional(['existing', 'absolute-paths']),
} as const;

const SNAPSHOT_INTERNAL = { device: required('str'), name: required('str') } as const;

/** What a transaction can do, with the arguments of each. */
export const ACTIONS = {
  abort: {},
  'block-dirty-bitmap-add': BITMAP_ADD,
  'block-dirty-bitmap-remove': bitmap,
  'block-dirty-bitmap-clear': bitmap,
  'block-dirty-bitmap-enable': bitmap,
  'block-dirty-bitmap-disable': bitmap,
  'block-dirty-bitmap-merge': BITMAP_MERGE,
  'blockdev-backup': BLOCKDEV_BACKUP,
  'blockdev-snapshot': SNAPSHOT,
  'blockdev-snapshot-internal-sync': SNAPSHOT_INTERNAL,
  'blockdev-snapshot-sync': SNAPSHOT_SYNC,
  'drive-backup': DRIVE_BACKUP,
} as const satisfies Readonly<Record<string, Members>>;

export type ActionName = keyof typeof ACTIONS;
export type ArgumentsOfAction<A extends ActionName> = ObjectOf<(typeof ACTIONS)[A]>;

const TRANSACTION_ACTION: UnionKind = {
  union: 'type',
  members: { type: required(Object.keys(ACTIONS)) },
  variants: Object.fromEntries(
    Object.entries(ACTIONS).map(([name, members]) => [name, { data: required({ struct: members }) }]),
  ),
};

/** Character devices that monitors can make: those on the command line are of other kinds as well. */
const CHARDEV_BACKEND: UnionKind = {
  union: 'type',
  members: { type: required(['null', 'ringbuf', 'memory']) },
  variants: {
    null: { data: required({ struct: {} }) },
    ringbuf: { data: required({ struct: { size: optional('int') } }) },
    memory: { data: required({ struct: { size: optional('int') } }) },
  },
};
const DATA_FORMAT = ['utf8', 'base64'] as const;

export const COMMANDS = {
  qmp_capabilities: { enable: optional({ list: ['oob'] }) },
  'query-version': {},
  'query-commands': {},
  'query-qmp-schema': {},
  'query-status': {},
  'query-jobs': {},
  'query-block-jobs': {},
  'query-block': {},
  'query-blockstats': { 'query-nodes': optional('bool') },
  'query-named-block-nodes': { flat: optional('bool') },
  'query-block-exports': {},
  stop: {},
  cont: {},
  quit: {},
  'blockdev-add': BLOCKDEV,
  'blockdev-del': { 'node-name': required('str') },
  'blockdev-reopen': { options: required({ list: BLOCKDEV }) },
  'blockdev-snapshot': SNAPSHOT,
  'blockdev-snapshot-sync': SNAPSHOT_SYNC,
  'blockdev-snapshot-internal-sync': SNAPSHOT_INTERNAL,
  'blockdev-snapshot-delete-internal-sync': {
    device: required('str'),
    id: optional('str'),
    name: optional('str'),
  },
  'blockdev-create': { 'job-id': required('str'), options: required(CREATE) },
  'block-set-write-threshold': { 'node-name': required('str'), 'write-threshold': required('uint') },
  'x-debug-query-block-graph': {},
  block_resize: { device: optional('str'), 'node-name': optional('str'), size: required('int') },
  'chardev-add': { id: required('str'), backend: required(CHARDEV_BACKEND) },
  'chardev-change': { id: required('str'), backend: required(CHARDEV_BACKEND) },
  'chardev-remove': id,
  'chardev-send-break': id,
  'query-chardev': {},
  'query-chardev-backends': {},
  'ringbuf-write': { ...device, data: required('str'), format: optional(DATA_FORMAT) },
  'ringbuf-read': { ...device, size: required('int'), format: optional(DATA_FORMAT) },
  'x-blockdev-set-iothread': {
    'node-name': required('str'),
    iothread: required({ alternate: ['str', 'null'], name: 'StrOrNull' }),
    force: optional('bool'),
  },
  'object-add': OBJECT,
  'object-del': id,
  'qom-list': { path: required('str') },
  'qom-get': { path: required('str'), property: required('str') },
  'qom-set': { path: required('str'), property: required('str'), value: required('any') },
  'qom-list-types': { implements: optional('str'), abstract: optional('bool') },
  'qom-list-properties': { typename: required('str') },
  'nbd-server-start': {
    addr: required(SOCKET_ADDRESS_LEGACY),
    'tls-creds': optional('str'),
    'tls-authz': optional('str'),
    'max-connections': optional('uint32'),
  },
  'nbd-server-stop': {},
  'nbd-server-add': {
    device: required('str'),
    name: optional('str'),
    description: optional('str'),
    writable: optional('bool'),
    bitmap: optional('str'),
  },
  'nbd-server-remove': { name: required('str'), mode: optional(['safe', 'hard']) },
  'block-export-add': EXPORT,
  'block-export-del': { id: required('str'), mode: optional(['safe', 'hard']) },
  'block-dirty-bitmap-add': BITMAP_ADD,
  'block-dirty-bitmap-remove': bitmap,
  'block-dirty-bitmap-clear': bitmap,
  'block-dirty-bitmap-enable': bitmap,
  'block-dirty-bitmap-disable': bitmap,
  'block-dirty-bitmap-merge': BITMAP_MERGE,
  'x-debug-block-dirty-bitmap-sha256': bitmap,
  transaction: {
    actions: required({ list: TRANSACTION_ACTION }),
    properties: optional({ struct: { 'completion-mode': optional(['individual', 'grouped']) } }),
  },
  'drive-backup': DRIVE_BACKUP,
  'blockdev-backup': BLOCKDEV_BACKUP,
  'drive-mirror': {
    ...MIRROR_COMMON,
    format: optional('str'),
    'node-name': optional('str'),
    mode: optional(['existing', 'absolute-paths']),
    unmap: optional('bool'),
  },
  'blockdev-mirror': { ...MIRROR_COMMON, 'filter-node-name': optional('str') },
  'block-stream': {
    ...CHAIN_COMMON,
    base: optional('str'),
    'base-node': optional('str'),
    bottom: optional('str'),
  },
  'block-commit': {
    ...CHAIN_COMMON,
    'base-node': optional('str'),
    base: optional('str'),
    'top-node': optional('str'),
    top: optional('str'),
  },
  'change-backing-file': {
    device: required('str'),
    'image-node-name': required('str'),
    'backing-file': required('str'),
  },
  'job-pause': id,
  'job-resume': id,
  'job-cancel': id,
  'job-complete': id,
  'job-finalize': id,
  'job-dismiss': id,
  'block-job-pause': device,
  'block-job-resume': device,
  'block-job-cancel': { ...device, force: optional('bool') },
  'block-job-complete': device,
  'block-job-set-speed': { ...device, speed: required('int') },
  'block-job-finalize': id,
  'block-job-dismiss': id,
  'human-monitor-command': { 'command-line': required('str'), 'cpu-index': optional('int') },
  'x-freeze': {
    ...device,
    export: required('str'),
    scratch: optional('str'),
    'on-cbw-error': optional(['break-guest-write', 'break-snapshot']),
    'cbw-timeout': optional('uint32'),
  },
  'x-thaw': { export: required('str') },
} as const satisfies Readonly<Record<string, Members | UnionKind>>;

export type CommandName = keyof typeof COMMANDS;

/** The arguments of a command, as the schema has them. */
export type ArgumentsOf<C extends CommandName> = (typeof COMMANDS)[C] extends UnionKind
  ? JsonObject
  : ObjectOf<(typeof COMMANDS)[C]>;

export function isCommand(name: string): name is CommandName {
  return Object.hasOwn(COMMANDS, name);
}

function isUnion(of: Members | UnionKind): of is UnionKind {
  return 'variants' in of;
}

/** What is wrong with the arguments of a command; undefined where nothing is. */
export function wrongArguments(name: CommandName, given: JsonObject): string | undefined {
  const wanted: Members | UnionKind = COMMANDS[name];
  return isUnion(wanted) ? wrongValue(wanted, given, '') : wrongMembers(wanted, given, '');
}
