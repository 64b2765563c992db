import binaryen from 'binaryen';
import { READ, WRITE } from './world.js';

const ACCESS =
  /\((i32|i64)\.atomic\.(load|store|rmw\.cmpxchg|rmw\.add|rmw\.and|rmw\.or|rmw\.sub)(?:(8|16|32)_u)?((?: offset=\d+)?)(?: align=\d+)?/g;

/** The kernels as they ship, with a call before every atomic access. */
export function instrumentKernels(bytes: Uint8Array): Uint8Array {
  const module = binaryen.readBinary(bytes);
  let text = module.emitText();
  module.dispose();
  const places = [...text.matchAll(ACCESS)];
  if (places.length === 0) throw new Error('the kernels have no atomic access');
  // From the end, so that the places before stay where they are.
  for (const match of places.reverse()) {
    const [whole, type = '', operation = '', narrow = '', offset = ''] = match;
    const start = (match.index ?? 0) + whole.length;
    const end = endOfExpression(text, start);
    const width = narrow === '' ? (type === 'i64' ? 8 : 4) : Number(narrow) / 8;
    const kind = operation === 'load' ? READ : WRITE;
    const pointer = text.slice(start, end);
    const bias = offset === '' ? 0 : Number(offset.slice(offset.indexOf('=') + 1));
    const call = ` (call $simulated_step ${pointer} (i32.const ${bias}) (i32.const ${kind}) (i32.const ${width}))`;
    text = text.slice(0, start) + call + text.slice(end);
  }
  const firstImport = text.indexOf('(import ');
  text = `${text.slice(0, firstImport)}(import "env" "step" (func $simulated_step (param i32 i32 i32 i32) (result i32)))\n ${text.slice(firstImport)}`;
  const instrumented = binaryen.parseText(text);
  instrumented.setFeatures(binaryen.Features.All);
  const binary = instrumented.emitBinary();
  instrumented.dispose();
  return binary;
}

/** Where the S-expression ends that starts at or after `from`. */
function endOfExpression(text: string, from: number): number {
  let depth = 0;
  for (let at = from; at < text.length; at++) {
    if (text[at] === '(') depth++;
    else if (text[at] === ')' && --depth === 0) return at + 1;
  }
  throw new Error('an expression without end');
}
