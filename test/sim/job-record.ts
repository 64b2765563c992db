import type { FrameDescriptor } from '#src/block/filters/copy-before-write.js';

const TEXT_BYTES = 65536;
const Word = {
  Active: 0,
  States: 1,
  ClusterSize: 2,
  Control: 3,
  Frozen: 4,
  Thawed: 5,
  FrameText: 6,
  EndedText: 7,
  FrozenAt: 8,
  Begun: 9,
  Moved: 10,
  Blocks: 11,
} as const;
const TEXTS_AT = 64;
const FROZEN_AT = TEXTS_AT + 2 * TEXT_BYTES;

/** Bytes of a record for drives of `driveBytes` bytes and a flag for each of `sectors` sectors. */
export function jobRecordBytes(driveBytes: number, sectors: number): number {
  return FROZEN_AT + driveBytes + sectors;
}

/** What the oracle knows of one job: its frame, the drive at its instant, what it said at its end. */
export class JobRecord {
  /** The drive at the instant. */
  readonly frozen: Uint8Array;
  /** Sectors whose content at the instant is not known. */
  readonly unknown: Uint8Array;
  readonly #words: Int32Array;
  readonly #bytes: Uint8Array;

  constructor(memory: SharedArrayBuffer, at: number, driveBytes: number, sectors: number) {
    this.#words = new Int32Array(memory, at, TEXTS_AT / 4);
    this.#bytes = new Uint8Array(memory, at, jobRecordBytes(driveBytes, sectors));
    this.frozen = this.#bytes.subarray(FROZEN_AT, FROZEN_AT + driveBytes);
    this.unknown = this.#bytes.subarray(FROZEN_AT + driveBytes);
  }

  begin(): void {
    this.#words.fill(0);
  }

  /** The frame is on the disk. */
  get active(): boolean {
    return this.#words[Word.Active] === 1;
  }

  get hasInstant(): boolean {
    return this.#words[Word.Frozen] === 1;
  }

  /** Pointer to the frame's control block; 0 before the instant. */
  get control(): number {
    return this.#words[Word.Control] ?? 0;
  }

  get clusterSize(): number {
    return this.#words[Word.ClusterSize] ?? 0;
  }

  /** The state of a cluster of the frame. */
  state(words: BigUint64Array, cluster: number): number {
    const word = words[((this.#words[Word.States] ?? 0) >> 3) + (cluster >> 5)] ?? 0n;
    return Number((word >> BigInt(2 * (cluster & 31))) & 3n);
  }

  /** Pointer to the word with the state of a cluster. */
  stateWord(cluster: number): number {
    return (this.#words[Word.States] ?? 0) + (cluster >> 5) * 8;
  }

  /** Keeps the drive as it is. @param stamp the moment */
  snapshot(drive: Uint8Array, unknown: Uint8Array, stamp: number): void {
    this.#words[Word.FrozenAt] = stamp;
    this.frozen.set(drive);
    this.unknown.set(unknown);
    this.#words[Word.Frozen] = 1;
  }

  /** @param stamp the moment */
  freeze(
    drive: Uint8Array,
    unknown: Uint8Array,
    { states, clusterSize, control }: Pick<FrameDescriptor, 'states' | 'clusterSize' | 'control'>,
    stamp: number,
  ): void {
    this.snapshot(drive, unknown, stamp);
    this.#words[Word.States] = states;
    this.#words[Word.ClusterSize] = clusterSize;
    this.#words[Word.Control] = control;
    this.#words[Word.Active] = 1;
  }

  /** The frame is about to be taken off the disk. */
  thaw(stamp: number): void {
    this.#words[Word.Active] = 0;
    this.#words[Word.Thawed] = stamp;
  }

  /** The moment of {@link freeze}; 0 before it. */
  get frozenAt(): number {
    return this.#words[Word.FrozenAt] ?? 0;
  }

  /** The moment of {@link thaw}; 0 before it. */
  get thawed(): number {
    return this.#words[Word.Thawed] ?? 0;
  }

  /** The moment from which on a mirror knows what is written; 0 before it. */
  get begunAt(): number {
    return this.#words[Word.Begun] ?? 0;
  }

  set begunAt(stamp: number) {
    this.#words[Word.Begun] = stamp;
  }

  /** The moment at which the target of a mirror took the place of the drive; 0 before it. */
  get movedAt(): number {
    return this.#words[Word.Moved] ?? 0;
  }

  set movedAt(stamp: number) {
    this.#words[Word.Moved] = stamp;
  }

  /** What guests change is in the mirror before they are answered. */
  get blocks(): boolean {
    return this.#words[Word.Blocks] === 1;
  }

  set blocks(value: boolean) {
    this.#words[Word.Blocks] = value ? 1 : 0;
  }

  /** The descriptor of the frame, or of the mirror; empty before the job is about to take its instant. */
  get frameText(): string {
    return this.#text(Word.FrameText, 0);
  }

  set frameText(text: string) {
    this.#setText(Word.FrameText, 0, text);
  }

  /** What the job said at its end; empty until then. */
  get endedText(): string {
    return this.#text(Word.EndedText, 1);
  }

  set endedText(text: string) {
    this.#setText(Word.EndedText, 1, text);
  }

  #text(word: number, slot: number): string {
    const at = TEXTS_AT + slot * TEXT_BYTES;
    return new TextDecoder().decode(this.#bytes.slice(at, at + (this.#words[word] ?? 0)));
  }

  #setText(word: number, slot: number, text: string): void {
    const bytes = new TextEncoder().encode(text);
    this.#bytes.set(bytes, TEXTS_AT + slot * TEXT_BYTES);
    this.#words[word] = bytes.length;
  }
}
