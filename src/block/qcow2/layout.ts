/** What a new image has from the start. */
export interface LayoutOptions {
  /** Virtual size in bytes. */
  readonly length: number;
  readonly clusterSize: number;
  readonly refcountBits: number;
  readonly extendedL2: boolean;
  /** L2 tables for the whole drive. */
  readonly tables: boolean;
  /** Clusters for the data of the whole drive, in the image's own file. */
  readonly data: boolean;
}

/**
 * Where everything is in a new image, in clusters:
 *
 *     | header | refcount table | refcount blocks | L1 table | L2 tables | data |
 */
export interface Layout {
  readonly refcountTableClusters: number;
  readonly refcountBlocks: number;
  readonly l1Entries: number;
  readonly l1Clusters: number;
  readonly l2Tables: number;
  readonly dataClusters: number;
  /** All of the above and the header. */
  readonly clusters: number;
}

export function l2EntryBytes(extendedL2: boolean): number {
  return extendedL2 ? 16 : 8;
}

/** The smallest layout whose refcounts count every cluster, their own included. */
export function planLayout(options: LayoutOptions): Layout {
  const { length, clusterSize, refcountBits } = options;
  const guestClusters = Math.ceil(length / clusterSize);
  const l1Entries = Math.ceil(guestClusters / (clusterSize / l2EntryBytes(options.extendedL2)));
  const l1Clusters = Math.ceil((l1Entries * 8) / clusterSize);
  const l2Tables = options.tables ? l1Entries : 0;
  const dataClusters = options.data ? guestClusters : 0;
  const counted = 1 + l1Clusters + l2Tables + dataClusters;
  const perBlock = (clusterSize * 8) / refcountBits;
  let refcountBlocks = 1;
  let refcountTableClusters = 1;
  for (;;) {
    const clusters = counted + refcountTableClusters + refcountBlocks;
    const blocks = Math.ceil(clusters / perBlock);
    const table = Math.ceil((blocks * 8) / clusterSize);
    if (blocks <= refcountBlocks && table <= refcountTableClusters) {
      return {
        refcountTableClusters,
        refcountBlocks,
        l1Entries,
        l1Clusters,
        l2Tables,
        dataClusters,
        clusters,
      };
    }
    refcountBlocks = Math.max(blocks, refcountBlocks);
    refcountTableClusters = Math.max(table, refcountTableClusters);
  }
}
