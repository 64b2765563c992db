import type { SnapshotInfo } from '../block/qcow2/index.js';
import type { DrainedSection } from '../engine/drained-section.js';
import type { Engine } from '../engine/engine.js';
import type { Task } from '../engine/tasks.js';
import { jobErrorText, QmpError } from '../qmp/errors.js';
import type { ArgumentsOf, ArgumentsOfAction } from '../qmp/schema.js';
import type { Graph } from './graph.js';
import type { GraphChanges } from './graph-changes.js';
import type { GraphNode } from './graph-node.js';
import { checkUnblocked } from './permissions.js';

/** A snapshot that is to be made. */
export interface InternalSnapshot {
  readonly node: GraphNode;
  readonly device: string;
  readonly name: string;
}

/** QMP `blockdev-snapshot-internal-sync` and `blockdev-snapshot-delete-internal-sync`: snapshots within an image. */
export class InternalSnapshots {
  readonly #engine: Engine;
  readonly #graph: Graph;
  readonly #changes: GraphChanges;

  constructor(engine: Engine, graph: Graph, changes: GraphChanges) {
    this.#engine = engine;
    this.#graph = graph;
    this.#changes = changes;
  }

  /** @throws QmpError where the snapshot cannot be made */
  async prepare({
    device,
    name,
  }: ArgumentsOfAction<'blockdev-snapshot-internal-sync'>): Promise<InternalSnapshot> {
    const node = this.#lookUp(device);
    if (node.descriptor.readOnly) throw new QmpError(`Device '${device}' is read only`);
    if (node.driver !== 'qcow2') {
      throw new QmpError(
        `Block format '${node.driver}' used by device '${device}' does not support internal snapshots`,
      );
    }
    if (name === '') throw new QmpError('Name is empty');
    const wanted = { node, device, name };
    await this.#checkName(wanted);
    return wanted;
  }

  /** Makes snapshots, which stay where `body` succeeds. Within a change of their nodes. */
  async during(
    section: DrainedSection,
    wanted: readonly InternalSnapshot[],
    body: () => Promise<void>,
  ): Promise<void> {
    const [first, ...rest] = wanted;
    if (first === undefined) {
      await body();
      return;
    }
    // What the same transaction has made so far counts as well.
    await this.#checkName(first, section);
    await this.#create(section, first);
    try {
      await this.during(section, rest, body);
    } catch (error) {
      const made = (await this.#list(first.node, section)).find(({ name }) => name === first.name);
      if (made !== undefined) await this.#remove(section, first.node, made.id);
      throw error;
    }
  }

  async #create(section: DrainedSection, { node, device, name }: InternalSnapshot): Promise<void> {
    // Microseconds. A daemon without a guest has that for the guest's clock as well.
    const now = Math.floor((performance.timeOrigin + performance.now()) * 1000);
    const create = {
      name,
      'date-sec': Math.floor(now / 1_000_000),
      'date-nsec': (now % 1_000_000) * 1000,
      'vm-clock-nsec': BigInt(now) * 1000n,
    };
    try {
      await section.run<void>({ kind: 'change-snapshots', node: node.descriptor, change: { create } });
    } catch (error) {
      throw new QmpError(`Failed to create snapshot '${name}' on device '${device}': ${jobErrorText(error)}`);
    }
  }

  /** QMP `blockdev-snapshot-delete-internal-sync` */
  async delete({
    device,
    id,
    name,
  }: ArgumentsOf<'blockdev-snapshot-delete-internal-sync'>): Promise<SnapshotInfo> {
    const node = this.#lookUp(device);
    if (id === undefined && name === undefined) throw new QmpError('Name or id must be provided');
    const found = (await this.#list(node)).find(
      (one) => (id === undefined || one.id === id) && (name === undefined || one.name === name),
    );
    if (found === undefined) {
      throw new QmpError(
        `Snapshot with id '${id ?? null}' and name '${name ?? null}' does not exist on device '${device}'`,
      );
    }
    if (node.descriptor.readOnly) {
      throw new QmpError('Failed to remove snapshot from snapshot list: Operation not permitted');
    }
    await this.#changes.change([node], (section) => this.#remove(section, node, found.id));
    return found;
  }

  async #remove(section: DrainedSection, node: GraphNode, id: string): Promise<void> {
    await section.run<void>({ kind: 'change-snapshots', node: node.descriptor, change: { delete: id } });
  }

  /** @throws QmpError where there is a snapshot of that name, or there can be none at all */
  async #checkName({ node, device, name }: InternalSnapshot, by: Runner = this.#engine): Promise<void> {
    if (!(await this.#list(node, by)).some((one) => one.name === name)) return;
    throw new QmpError(`Snapshot with name '${name}' already exists on device '${device}'`);
  }

  async #list({ descriptor }: GraphNode, by: Runner = this.#engine): Promise<readonly SnapshotInfo[]> {
    if (descriptor.driver !== 'qcow2' || descriptor.hasDataFile) {
      throw new QmpError('Failed to get a snapshot list: Operation not supported');
    }
    return await by.run<readonly SnapshotInfo[]>({ kind: 'snapshots', node: descriptor });
  }

  #lookUp(device: string): GraphNode {
    const node = this.#graph.lookUp(device);
    const isTarget = [...node.users].some(([{ job }, use]) => job === 'backup' && use === 'target');
    if (node.parents.size > 0 || isTarget) throw new QmpError('Need a root block node');
    checkUnblocked(node);
    return node;
  }
}

/** What carries a task out: any thread, or the one that keeps others away. */
interface Runner {
  run<T>(task: Task): Promise<T>;
}
