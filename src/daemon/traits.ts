import type { NodeTraits } from '../block/traits.js';
import { QmpError } from '../qmp/errors.js';
import { isObject, type JsonObject } from '../qmp/types.js';

/** What the options of a node say of it, whatever its driver. */
export function traitsOf({
  discard,
  'detect-zeroes': detect,
}: JsonObject): Pick<NodeTraits, 'discard' | 'detectZeroes'> {
  return {
    discard: discard === 'unmap' ? 'unmap' : 'ignore',
    detectZeroes: detect === 'on' || detect === 'unmap' ? detect : undefined,
  };
}

/** @throws QmpError where options of a node do not go together */
export function checkTraits(options: JsonObject): void {
  if (options['detect-zeroes'] !== 'unmap' || options['discard'] === 'unmap') return;
  throw new QmpError(
    'setting detect-zeroes to unmap is not allowed without setting discard operation to unmap',
  );
}

/** How a node made for its parent is cached: as that, but for what its own options say. Undefined: nobody says anything. */
export function inheritedCache(parent: JsonObject, own: JsonObject): JsonObject | undefined {
  const [above, given] = [parent['cache'], own['cache']];
  if (!isObject(above)) return isObject(given) ? given : undefined;
  return isObject(given) ? { ...above, ...given } : above;
}
