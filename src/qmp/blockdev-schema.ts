/** Options of nodes and objects. Source: QAPI `BlockdevOptions` and its drivers (qapi/block-core.json), qapi/qom.json. */
import { BLKDEBUG_EVENTS } from '../block/filters/blkdebug-events.js';
import type { Kind, Members, UnionKind } from './types.js';

const optional = <K extends Kind>(kind: K): { readonly kind: K; readonly optional: true } => ({
  kind,
  optional: true,
});
const required = <K extends Kind>(kind: K): { readonly kind: K } => ({ kind });

/** A node by its name, or the options of one that is made here. */
const ref: Kind = { lazy: () => ({ alternate: ['str', BLOCKDEV], name: 'BlockdevRef' }) };
/** Likewise; `null` is none. */
const refOrNull: Kind = { lazy: () => ({ alternate: ['str', 'null', BLOCKDEV], name: 'BlockdevRefOrNull' }) };

export const SOCKET_ADDRESS: UnionKind = {
  union: 'type',
  members: { type: required(['inet', 'unix', 'vsock', 'fd']) },
  variants: {
    inet: {
      host: required('str'),
      port: required('str'),
      numeric: optional('bool'),
      to: optional('uint32'),
      ipv4: optional('bool'),
      ipv6: optional('bool'),
      'keep-alive': optional('bool'),
      mptcp: optional('bool'),
    },
    unix: { path: required('str'), abstract: optional('bool'), tight: optional('bool') },
    vsock: { cid: required('str'), port: required('str') },
    fd: { str: required('str') },
  },
};

/** The same with its members in `data` (QAPI `SocketAddressLegacy`). */
export const SOCKET_ADDRESS_LEGACY: UnionKind = {
  union: 'type',
  members: SOCKET_ADDRESS.members,
  variants: Object.fromEntries(
    Object.entries(SOCKET_ADDRESS.variants).map(([type, members]) => [
      type,
      { data: required({ struct: members }) },
    ]),
  ),
};

const IOTYPES = ['read', 'write', 'write-zeroes', 'discard', 'flush', 'block-status'] as const;

const PERMISSIONS = ['consistent-read', 'write', 'write-unchanged', 'resize'] as const;

const OVERLAP_MODES = ['none', 'constant', 'cached', 'all'] as const;

/** Parts of the metadata of an image that writes are kept off: by name, or each on its own. */
const OVERLAP_CHECKS: Kind = {
  alternate: [
    OVERLAP_MODES,
    {
      struct: {
        template: optional(OVERLAP_MODES),
        'main-header': optional('bool'),
        'active-l1': optional('bool'),
        'active-l2': optional('bool'),
        'refcount-table': optional('bool'),
        'refcount-block': optional('bool'),
        'snapshot-table': optional('bool'),
        'inactive-l1': optional('bool'),
        'inactive-l2': optional('bool'),
        'bitmap-directory': optional('bool'),
      },
    },
  ],
  name: 'Qcow2OverlapChecks',
};

const DRIVERS: Readonly<Record<string, Members>> = {
  file: {
    filename: required('str'),
    'pr-manager': optional('str'),
    locking: optional(['auto', 'on', 'off']),
    aio: optional(['threads', 'native', 'io_uring']),
    'aio-max-batch': optional('int'),
    'drop-cache': optional('bool'),
    'x-check-cache-dropped': optional('bool'),
  },
  raw: { file: required(ref), offset: optional('uint'), size: optional('uint') },
  qcow2: {
    file: required(ref),
    backing: optional(refOrNull),
    'lazy-refcounts': optional('bool'),
    'pass-discard-request': optional('bool'),
    'pass-discard-snapshot': optional('bool'),
    'pass-discard-other': optional('bool'),
    'overlap-check': optional(OVERLAP_CHECKS),
    'cache-size': optional('int'),
    'l2-cache-size': optional('int'),
    'l2-cache-entry-size': optional('int'),
    'refcount-cache-size': optional('int'),
    'cache-clean-interval': optional('int'),
    'data-file': optional(ref),
  },
  nbd: {
    server: required(SOCKET_ADDRESS),
    export: optional('str'),
    'tls-creds': optional('str'),
    'tls-hostname': optional('str'),
    'x-dirty-bitmap': optional('str'),
    'reconnect-delay': optional('uint32'),
    'open-timeout': optional('uint32'),
  },
  'null-co': { size: optional('int'), 'latency-ns': optional('uint'), 'read-zeroes': optional('bool') },
  'null-aio': { size: optional('int'), 'latency-ns': optional('uint'), 'read-zeroes': optional('bool') },
  throttle: { 'throttle-group': required('str'), file: required(ref) },
  compress: { file: required(ref) },
  preallocate: { file: required(ref), 'prealloc-align': optional('int'), 'prealloc-size': optional('int') },
  'copy-on-read': { file: required(ref), bottom: optional('str') },
  'copy-before-write': {
    file: required(ref),
    target: required(ref),
    bitmap: optional({ struct: { node: required('str'), name: required('str') } }),
    'on-cbw-error': optional(['break-guest-write', 'break-snapshot']),
    'cbw-timeout': optional('uint32'),
    'min-cluster-size': optional('uint'),
  },
  'snapshot-access': { file: required(ref) },
  blkdebug: {
    image: required(ref),
    config: optional('str'),
    align: optional('int'),
    'max-transfer': optional('uint32'),
    'opt-write-zero': optional('uint32'),
    'max-write-zero': optional('uint32'),
    'opt-discard': optional('uint32'),
    'max-discard': optional('uint32'),
    'inject-error': optional({
      list: {
        struct: {
          event: required(BLKDEBUG_EVENTS),
          state: optional('int'),
          iotype: optional(IOTYPES),
          errno: optional('int'),
          sector: optional('int'),
          once: optional('bool'),
          immediately: optional('bool'),
        },
      },
    }),
    'set-state': optional({
      list: {
        struct: { event: required(BLKDEBUG_EVENTS), state: optional('int'), new_state: required('int') },
      },
    }),
    'take-child-perms': optional({ list: PERMISSIONS }),
    'unshare-child-perms': optional({ list: PERMISSIONS }),
  },
  vmdk: { file: required(ref), backing: optional(refOrNull) },
  vhdx: { file: required(ref) },
  vpc: { file: required(ref) },
  vdi: { file: required(ref) },
};

/** Options of a node (QMP `blockdev-add`). `x-device` is ours: a name by which jobs know it. */
export const BLOCKDEV: UnionKind = {
  union: 'driver',
  members: {
    driver: required([...Object.keys(DRIVERS), 'host_device']),
    'node-name': optional('str'),
    discard: optional(['ignore', 'unmap']),
    cache: optional({ struct: { direct: optional('bool'), 'no-flush': optional('bool') } }),
    'read-only': optional('bool'),
    'auto-read-only': optional('bool'),
    'force-share': optional('bool'),
    'detect-zeroes': optional(['off', 'on', 'unmap']),
    'x-device': optional('str'),
  },
  variants: { ...DRIVERS, ['host_device']: DRIVERS['file'] ?? {} },
};

const LIMITS = ['bps-total', 'bps-read', 'bps-write', 'iops-total', 'iops-read', 'iops-write'];

const limits: Kind = {
  struct: Object.fromEntries([
    ...LIMITS.flatMap((limit) => [
      [limit, optional('int')],
      [`${limit}-max`, optional('int')],
      [`${limit}-max-length`, optional('int')],
    ]),
    ['iops-size', optional('int')],
  ]),
};

const tls: Members = {
  'verify-peer': optional('bool'),
  dir: optional('str'),
  endpoint: optional(['client', 'server']),
  priority: optional('str'),
};

/** Options of an object (QMP `object-add`). */
export const OBJECT: UnionKind = {
  union: 'qom-type',
  members: {
    'qom-type': required(['iothread', 'secret', 'throttle-group', 'tls-creds-psk', 'tls-creds-x509']),
    id: required('str'),
  },
  variants: {
    iothread: {
      'poll-max-ns': optional('int'),
      'poll-grow': optional('int'),
      'poll-shrink': optional('int'),
      'aio-max-batch': optional('int'),
    },
    secret: {
      data: optional('str'),
      file: optional('str'),
      format: optional(['raw', 'base64']),
      keyid: optional('str'),
      iv: optional('str'),
    },
    'throttle-group': {
      limits: optional(limits),
      ...Object.fromEntries(
        LIMITS.flatMap((limit) => [
          [`x-${limit}`, optional('int')],
          [`x-${limit}-max`, optional('int')],
          [`x-${limit}-max-length`, optional('int')],
        ]),
      ),
      'x-iops-size': optional('int'),
    },
    'tls-creds-psk': { ...tls, username: optional('str') },
    'tls-creds-x509': { ...tls, 'sanity-check': optional('bool'), passwordid: optional('str') },
  },
};

/** What is exported, and how (QMP `block-export-add`). */
export const EXPORT: UnionKind = {
  union: 'type',
  members: {
    type: required(['nbd']),
    id: required('str'),
    'node-name': required('str'),
    writable: optional('bool'),
    writethrough: optional('bool'),
    iothread: optional('str'),
    'fixed-iothread': optional('bool'),
  },
  variants: {
    nbd: {
      name: optional('str'),
      description: optional('str'),
      bitmaps: optional({
        list: {
          alternate: ['str', { struct: { node: required('str'), name: required('str') } }],
          name: 'BlockDirtyBitmapOrStr',
        },
      }),
      'allocation-depth': optional('bool'),
    },
  },
};

const PREALLOCATION = ['off', 'metadata', 'falloc', 'full'] as const;

const MADE = [...Object.keys(DRIVERS), 'host_device'];
/** Formats that a backing file may have, and we know only the names of. */
const OTHER_FORMATS = ['bochs', 'cloop', 'dmg', 'luks', 'parallels', 'qcow', 'qed'] as const;

/** How an image is made (QMP `blockdev-create`). */
export const CREATE: UnionKind = {
  union: 'driver',
  // Only some of them can be made.
  members: { driver: required(MADE) },
  variants: {
    file: {
      filename: required('str'),
      size: required('uint'),
      preallocation: optional(PREALLOCATION),
      nocow: optional('bool'),
      'extent-size-hint': optional('uint'),
    },
    qcow2: {
      file: required(ref),
      'data-file': optional(ref),
      'data-file-raw': optional('bool'),
      'extended-l2': optional('bool'),
      size: required('uint'),
      version: optional(['v2', 'v3']),
      'backing-file': optional('str'),
      'backing-fmt': optional([...MADE, ...OTHER_FORMATS]),
      'cluster-size': optional('uint'),
      preallocation: optional(PREALLOCATION),
      'lazy-refcounts': optional('bool'),
      'refcount-bits': optional('int'),
      'compression-type': optional(['zlib', 'zstd']),
    },
  },
};
