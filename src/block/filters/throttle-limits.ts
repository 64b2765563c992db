/** Limits of a throttle group: those of QAPI `ThrottleLimits`, all of them given. */

export const BUCKETS = [
  'bps-total',
  'bps-read',
  'bps-write',
  'iops-total',
  'iops-read',
  'iops-write',
] as const;
export type Bucket = (typeof BUCKETS)[number];

/** What goes through in a second, for one kind of requests. */
export interface BucketLimit {
  /** In the long run; 0 is no limit. */
  readonly average: number;
  /** In a burst; 0: no bursts. */
  readonly max: number;
  /** Seconds that a burst may take. */
  readonly maxLength: number;
}

export interface ThrottleLimits {
  readonly buckets: Readonly<Record<Bucket, BucketLimit>>;
  /** Bytes that count as one request; larger ones count as several. 0: whatever their size. */
  readonly iopsSize: number;
}

/** Largest rate. */
const MAX_RATE = 1_000_000_000_000_000;
const MAX_SECONDS = 2 ** 32 - 1;

export const UNLIMITED: ThrottleLimits = {
  buckets: Object.fromEntries(
    BUCKETS.map((bucket) => [bucket, { average: 0, max: 0, maxLength: 1 }]),
  ) as Record<Bucket, BucketLimit>,
  iopsSize: 0,
};

/** Limits as others, but for those that are named; names as QAPI has them. @throws RangeError with QEMU's words */
export function changeLimits(
  limits: ThrottleLimits,
  given: (name: string) => number | undefined,
): ThrottleLimits {
  const length = (name: string): number | undefined => {
    const value = given(name);
    if (value === undefined || value <= MAX_SECONDS) return value;
    throw new RangeError(`${name} value must be in the range [0, ${MAX_SECONDS}]`);
  };
  const changed = {
    buckets: Object.fromEntries(
      BUCKETS.map((bucket) => [
        bucket,
        {
          average: given(bucket) ?? limits.buckets[bucket].average,
          max: given(`${bucket}-max`) ?? limits.buckets[bucket].max,
          maxLength: length(`${bucket}-max-length`) ?? limits.buckets[bucket].maxLength,
        },
      ]),
    ) as Record<Bucket, BucketLimit>,
    iopsSize: given('iops-size') ?? limits.iopsSize,
  };
  const wrong = wrongLimits(changed);
  if (wrong !== undefined) throw new RangeError(wrong);
  return changed;
}

/** Limits by their names in QAPI. */
export function namedLimits({ buckets, iopsSize }: ThrottleLimits): Record<string, number> {
  return Object.fromEntries([
    ...BUCKETS.flatMap((bucket) => [
      [bucket, buckets[bucket].average],
      [`${bucket}-max`, buckets[bucket].max],
      [`${bucket}-max-length`, buckets[bucket].maxLength],
    ]),
    ['iops-size', iopsSize],
  ]);
}

/** What is wrong with limits, in QEMU's words and order. */
function wrongLimits({ buckets, iopsSize }: ThrottleLimits): string | undefined {
  for (const what of ['average', 'max'] as const) {
    for (const kind of ['bps', 'iops'] as const) {
      const directed = buckets[`${kind}-read`][what] !== 0 || buckets[`${kind}-write`][what] !== 0;
      if (buckets[`${kind}-total`][what] !== 0 && directed) {
        return 'bps/iops/max total values and read/write values cannot be used at the same time';
      }
    }
  }
  const hasIops = BUCKETS.some((bucket) => bucket.startsWith('iops') && buckets[bucket].average !== 0);
  if (iopsSize !== 0 && !hasIops) return 'iops size requires an iops value to be set';
  for (const bucket of BUCKETS) {
    const { average, max, maxLength } = buckets[bucket];
    const inRange = [average, max].every((rate) => rate >= 0 && rate <= MAX_RATE);
    if (!inRange) return `bps/iops/max values must be within [0, ${MAX_RATE}]`;
    if (maxLength === 0) return 'the burst length cannot be 0';
    const seconds = maxLength < 0 ? Number.POSITIVE_INFINITY : maxLength;
    if (seconds > 1 && max === 0) return 'burst length set without burst rate';
    if (max !== 0 && seconds > Math.floor(MAX_RATE / max)) return 'burst length too high for this burst rate';
    if (max !== 0 && average === 0) return 'bps_max/iops_max require corresponding bps/iops values';
    if (max !== 0 && max < average) return 'bps_max/iops_max cannot be lower than bps/iops';
  }
  return undefined;
}
