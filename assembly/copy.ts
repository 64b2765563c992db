/**
 * Moves the units whose bit in `skip` is clear to the front of the buffer, in order.
 * Returns the bytes they take.
 */
export function compactUnits(pointer: usize, length: usize, unit: usize, skip: usize): usize {
  let target = pointer;
  let index: u32 = 0;
  for (let done: usize = 0; done < length; done += unit, index++) {
    if ((load<u32>(skip + ((index >> 5) << 2)) >> (index & 31)) & 1) continue;
    const bytes = min(unit, length - done);
    if (target != pointer + done) memory.copy(target, pointer + done, bytes);
    target += bytes;
  }
  return target - pointer;
}
