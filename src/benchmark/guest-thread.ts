/** One half of a guest: the thread that makes its requests, or the one that takes the answers. */
import { readSync, writeSync } from 'node:fs';
import { parentPort, workerData } from 'node:worker_threads';
import {
  COMMAND,
  REQUEST_BYTES,
  REQUEST_MAGIC,
  SIMPLE_REPLY_BYTES,
  SIMPLE_REPLY_MAGIC,
} from '../nbd/protocol/numbers.js';
import { clockMs, DEPTH, GuestMemory, type Pattern } from './guest-memory.js';

export interface GuestThreadData {
  readonly role: 'sender' | 'receiver';
  /** Of a blocking socket, where requests can be made. */
  readonly fd: number;
  readonly memory: SharedArrayBuffer;
  readonly load: Load;
}

/** Requests come at random times, whether those before them were answered or not. */
export interface Load {
  readonly pattern: Pattern;
  /** Requests per second. */
  readonly rate: number;
  /** Bytes of a request. */
  readonly blockBytes: number;
  /** Bytes of the drive. */
  readonly length: number;
}

/** A part of the drive that is written again and again. */
const HOT_PART = 64;

function* offsets({ pattern, blockBytes, length }: Load): Generator<number, never> {
  const blocks = Math.max(1, Math.floor(length / blockBytes));
  const hot = Math.max(1, Math.floor(blocks / HOT_PART));
  for (let index = 0; ; index++) {
    const random = Math.floor(Math.random() * (pattern === 'hot' ? hot : blocks));
    yield (pattern === 'sequential' ? index % blocks : random) * blockBytes;
  }
}

/** Calls again what was interrupted. */
function whole(fd: number, bytes: Uint8Array): void {
  for (let done = 0; done < bytes.length; ) {
    try {
      done += writeSync(fd, bytes, done, bytes.length - done);
    } catch (error) {
      if (!(error instanceof Error && 'code' in error && error.code === 'EINTR')) throw error;
    }
  }
}

function some(fd: number, bytes: Uint8Array, from: number): number {
  for (;;) {
    try {
      return readSync(fd, bytes, from, bytes.length - from, null);
    } catch (error) {
      if (!(error instanceof Error && 'code' in error && error.code === 'EINTR')) throw error;
    }
  }
}

function request(blockBytes: number): Buffer {
  const bytes = Buffer.alloc(REQUEST_BYTES + blockBytes);
  for (let at = REQUEST_BYTES; at < bytes.length; at++) bytes[at] = Math.random() * 256;
  bytes.writeUInt32BE(REQUEST_MAGIC, 0);
  return bytes;
}

function send(fd: number, memory: GuestMemory, load: Load): void {
  const bytes = request(load.blockBytes);
  const where = offsets(load);
  let due = clockMs();
  // How late a timer wakes us is not the drive's doing; how late we are because it did not take requests is.
  let woken = due;
  for (let cookie = 0; ; cookie = (cookie + 1) % DEPTH) {
    due -= (Math.log(1 - Math.random()) / load.rate) * 1000;
    if (due > clockMs()) {
      memory.sleepUntil(due);
      woken = clockMs();
    }
    if (memory.stopped || !memory.take(cookie, Math.max(due, woken))) break;
    bytes.writeUInt16BE(COMMAND.write, 6);
    bytes.writeBigUInt64BE(BigInt(cookie), 8);
    bytes.writeBigUInt64BE(BigInt(where.next().value), 16);
    bytes.writeUInt32BE(load.blockBytes, 24);
    whole(fd, bytes);
  }
  // Answers to what is under way come before the connection ends.
  const end = bytes.subarray(0, REQUEST_BYTES);
  end.writeUInt16BE(COMMAND.disconnect, 6);
  end.fill(0, 8);
  whole(fd, end);
}

function receive(fd: number, memory: GuestMemory): void {
  const bytes = Buffer.alloc(SIMPLE_REPLY_BYTES * DEPTH);
  for (let held = 0; ; ) {
    const got = some(fd, bytes, held);
    if (got === 0) return;
    const now = clockMs();
    const end = held + got;
    let at = 0;
    for (; at + SIMPLE_REPLY_BYTES <= end; at += SIMPLE_REPLY_BYTES) {
      const error = bytes.readUInt32BE(at + 4);
      if (bytes.readUInt32BE(at) !== SIMPLE_REPLY_MAGIC) throw new Error('the server breaks the protocol');
      if (error !== 0) throw new Error(`a write failed with the error ${error}`);
      if (!memory.give(Number(bytes.readBigUInt64BE(at + 8)), now))
        throw new Error('an answer to a request that was not made');
    }
    bytes.copyWithin(0, at, end);
    held = end - at;
  }
}

const { role, fd, memory, load }: GuestThreadData = workerData;
try {
  const shared = new GuestMemory(memory);
  if (role === 'sender') send(fd, shared, load);
  else receive(fd, shared);
} catch (error) {
  parentPort?.postMessage(error instanceof Error ? error.message : String(error));
}
