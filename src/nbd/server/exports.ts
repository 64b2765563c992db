import type { FrozenDescriptor } from '../../backup/freeze.js';
import type { DiskDescriptor } from '../../block/disk.js';
import type { Offer } from '../protocol/server-handshake.js';

/** What a metadata context says. */
export type ContextKind =
  | { readonly kind: 'allocation' }
  | { readonly kind: 'depth' }
  /** `pointer` is that of the dirty bitmap in the arena. */
  | { readonly kind: 'bitmap'; readonly pointer: number };

/** A drive under a name; plain data. */
export interface ExportDescriptor {
  readonly offer: Offer;
  readonly disk: DiskDescriptor;
  /** The instant of the disk that it is; undefined: the live disk. */
  readonly frozen: FrozenDescriptor | undefined;
  /** In the order of the offer's contexts. */
  readonly contexts: readonly ContextKind[];
  /** What is written is durable before that is answered. */
  readonly writethrough: boolean;
  /** Its dirty bitmaps are kept for it. */
  readonly holdsBitmaps: boolean;
}
