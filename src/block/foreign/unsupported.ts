/** Headers of formats that are not supported, so that such an image is never taken for a raw one unasked. */
const MAGICS: readonly (readonly [format: string, starts: readonly Uint8Array[]])[] = [
  ['qcow', [magic('QFI\u{fb}\0\0\0\u{1}')]],
  ['qed', [magic('QED\0')]],
  ['luks', [magic('LUKS\u{ba}\u{be}')]],
  ['parallels', [magic('WithoutFreeSpace'), magic('WithouFreSpacExt')]],
  ['bochs', [magic('Bochs Virtual HD Image')]],
  ['cloop', [magic('#!/bin/sh\n#V2.0 Format\nmodprobe cloop')]],
];

function magic(bytes: string): Uint8Array {
  return Buffer.from(bytes, 'latin1');
}

/** Which of the formats without support a file is of by its first bytes. */
export function probeUnsupported(head: Uint8Array): string | undefined {
  const is = (start: Uint8Array): boolean => start.every((byte, index) => head[index] === byte);
  return MAGICS.find(([, starts]) => starts.some(is))?.[0];
}
