import { noticeGrowth } from '../block/raw/file.js';
import type { Arena } from '../kernels/arena.js';
import {
  ALL_PERMISSIONS,
  copyLock,
  extendLock,
  type ImageLock,
  RESIZE,
  shrinkLock,
  UNLOCKED,
  WRITE,
} from '../os/image-lock.js';
import { openErrorText, QmpError } from '../qmp/errors.js';
import { type GraphUser, needsBy, type Taker, usesOf } from './block-graph.js';
import type { Child, GraphNode } from './graph-node.js';

/** A file cannot be locked for what it is wanted for. */
export class LockError extends QmpError {
  /** What people are told beside that. */
  readonly hint: string;

  constructor(message: string, filename: string) {
    super(message);
    this.hint = `Is another process using the image [${filename}]?`;
  }
}

/** Gives up what was claimed. */
export type Release = () => void;

/**
 * The locks of the files of a graph. A `file` node is locked for what those that lie on it, directly or not, need of it and
 * do not share: nobody's file is not locked at all. Whoever is about to use a node claims that first, and gives the claim up
 * once the graph itself says so; nobody writes to a file before it is locked for it.
 */
export class FileLocks {
  readonly #arena: Arena;
  readonly #nodes: () => readonly GraphNode[];
  readonly #users: () => readonly GraphUser[];
  readonly #claims = new Set<GraphUser>();
  readonly #held = new WeakMap<GraphNode, ImageLock>();

  /** @param users of nodes, beside other nodes */
  constructor(arena: Arena, nodes: () => readonly GraphNode[], users: () => readonly GraphUser[]) {
    this.#arena = arena;
    this.#nodes = nodes;
    this.#users = users;
  }

  /**
   * Locks files for uses of nodes that are still to come, beside all that there are.
   *
   * @throws LockError with every lock as it was
   */
  claim(uses: GraphUser['uses']): Release {
    const user: GraphUser = { type: 'block-backend', name: '', uses };
    this.#claims.add(user);
    try {
      this.#extend();
    } catch (error) {
      this.#claims.delete(user);
      throw error;
    }
    return () => {
      this.#claims.delete(user);
      this.#shrink();
    };
  }

  /** The same for one thing and then for another one, which takes its place. @throws LockError */
  claimInTurn(first: GraphUser['uses'], then: GraphUser['uses']): Release {
    const release = this.claim(first);
    try {
      return this.claim(then);
    } finally {
      release();
    }
  }

  /** The same for what a node that is still to be needs of one of its children. @throws LockError */
  claimChild(node: Taker, child: Child): Release {
    return this.claim(usesOf(node, undefined, [child]));
  }

  /** The same for what a node needs of its children once it has changed. @throws LockError */
  claimChange(node: GraphNode, changes: Partial<Taker>): Release {
    const above = needsBy([...this.#users(), ...this.#claims])(node);
    return this.claim(usesOf({ ...node, ...changes }, above));
  }

  /**
   * The same for all that is on one node, on another one. Jobs know what they need themselves.
   *
   * @throws LockError
   */
  claimMoved(from: GraphNode, to: GraphNode): Release {
    const users = this.#users().filter(({ ofJob }) => ofJob !== true);
    const { needed, shared } = needsBy(users)(from);
    return this.claim([{ node: to, role: 'root', needed, shared }]);
  }

  /** Locks files for what the graph says, and no more. @throws LockError with every lock as it was */
  settle(): void {
    this.#extend();
    this.#shrink();
  }

  /** The node has another descriptor from now on. */
  move(node: GraphNode, fd: number): void {
    copyLock(fd, node.descriptor.path, this.#held.get(node) ?? UNLOCKED);
  }

  #extend(): void {
    const before: (readonly [node: GraphNode, fd: number, has: ImageLock])[] = [];
    try {
      for (const [node, wanted] of this.#wanted()) {
        const { descriptor } = node;
        if (descriptor.driver !== 'file') continue;
        const has = this.#held.get(node) ?? UNLOCKED;
        if (isWithin(wanted, has)) continue;
        const { fd, path } = descriptor;
        try {
          this.#held.set(node, extendLock(fd, path, has, wanted));
        } catch (error) {
          const filename = String(node.options['filename'] ?? path);
          throw new LockError(openErrorText(error, filename), filename);
        }
        before.push([node, fd, has]);
        noticeGrowth(this.#arena, descriptor);
      }
    } catch (error) {
      for (const [node, fd, has] of before) {
        shrinkLock(fd, has);
        this.#held.set(node, has);
      }
      throw error;
    }
  }

  #shrink(): void {
    for (const [node, wanted] of this.#wanted()) {
      const { descriptor } = node;
      const has = this.#held.get(node) ?? UNLOCKED;
      if (descriptor.driver !== 'file' || isWithin(has, wanted) || isLengthened(node)) continue;
      const left = { used: has.used & wanted.used, unshared: has.unshared & wanted.unshared };
      shrinkLock(descriptor.fd, left);
      this.#held.set(node, left);
    }
  }

  #wanted(): (readonly [node: GraphNode, wanted: ImageLock])[] {
    const nodes = this.#nodes();
    const files = nodes.filter((node) => node.isLocked === true);
    if (files.length === 0) return [];
    const needsOf = needsBy([...this.#users(), ...this.#claims, ...instantsOf(nodes)]);
    return files.map((node) => {
      const { needed, shared } = needsOf(node);
      // Whoever writes would not be seen by the bitmaps and instants of another node of the file.
      const others = (needed & WRITE) === 0 ? shared : shared & ~WRITE;
      return [node, { used: needed, unshared: ALL_PERMISSIONS & ~others }] as const;
    });
  }
}

/** Runs `body`, and gives up what was claimed for it. */
export async function whileClaimed<T>(release: Release, body: () => Promise<T>): Promise<T> {
  try {
    return await body();
  } finally {
    release();
  }
}

/** An instant is none any more once somebody has written past the node that holds it. */
function instantsOf(nodes: readonly GraphNode[]): GraphUser[] {
  return nodes.flatMap(({ frozen, children }) => {
    const node = children.find(({ role }) => role === 'file')?.node;
    if (frozen === undefined || node === undefined) return [];
    const use = { node, role: 'file', needed: 0, shared: ALL_PERMISSIONS & ~(WRITE | RESIZE) };
    return { type: 'block-backend', name: '', uses: [use] } as const;
  });
}

/** Whether space that was taken ahead in a file may still have to be given back. */
function isLengthened(node: GraphNode): boolean {
  return [...node.parents].some((parent) => parent.driver === 'preallocate' || isLengthened(parent));
}

function isWithin(one: ImageLock, other: ImageLock): boolean {
  return (one.used & ~other.used) === 0 && (one.unshared & ~other.unshared) === 0;
}
