import type { BackupResult } from '../index.js';
import { formatBytes } from './units.js';

/** A result as people read it. */
export function describeResult({
  target,
  sync,
  virtualSize,
  clusterSize,
  clusters,
  bytes,
  durationMs,
  checksum,
}: BackupResult): string {
  const seconds = durationMs / 1000;
  const rate = durationMs > 0 ? ` (${formatBytes(bytes.read / seconds)}/s)` : '';
  return [
    `target:    ${target}`,
    `sync:      ${sync}`,
    `size:      ${formatBytes(virtualSize)} (${virtualSize} bytes)`,
    `clusters:  ${clusters.planned} of ${clusters.total} planned, ${clusters.copied} copied, ${clusters.zero} zero, ` +
      `${clusters.cbw} by copy-before-write (${formatBytes(clusterSize)} each)`,
    `data:      ${formatBytes(bytes.read)} read, ${formatBytes(bytes.written)} written in ${seconds.toFixed(2)} s${rate}`,
    `checksum:  ${checksum.algorithm} ${checksum.root}`,
  ].join('\n');
}
