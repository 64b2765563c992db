import type { Graph } from './graph.js';
import type { GraphNode } from './graph-node.js';
import type { QemuIo } from './qemu-io.js';

const HELP = 'Try "help qemu-io" for more information';
const ESCAPES: Readonly<Record<string, string>> = { n: '\n', r: '\r' };

/**
 * QEMU's monitor for people, as far as QMP `human-monitor-command` needs it: `qemu-io [-d] NODE "COMMAND"`.
 *
 * @returns what the monitor answers
 */
export async function humanMonitorCommand(graph: Graph, io: QemuIo, line: string): Promise<string> {
  const [, name = '', given = ''] = /^\s*(\S*)\s*(.*)$/s.exec(line) ?? [];
  if (name === '') return '';
  if (name !== 'qemu-io') return answer(`unknown command: '${name}'`);
  const wrong = (what: string): string => answer(`qemu-io: ${what}\n${HELP}`);
  let rest = given;
  let byDevice = false;
  const [flag] = /^-\S*/.exec(rest) ?? [];
  if (flag !== undefined) {
    if (flag !== '-d') return wrong(`unsupported option ${flag}`);
    byDevice = true;
    rest = rest.slice(flag.length);
  }
  const device = nextWord(rest);
  if (device === undefined) return wrong('block device name expected');
  const command = nextWord(device.rest);
  if (command === undefined) return wrong('string expected');
  if (command.rest.trim() !== '') return wrong('extraneous characters at the end of line');
  const node = byDevice ? deviceOf(graph, device.word) : graph.find(device.word);
  if (node === undefined) {
    return answer(
      byDevice
        ? `Error: Device '${device.word}' not found`
        : `Error: Cannot find device='' nor node-name='${device.word}'`,
    );
  }
  return answer(await io.run(node, command.word));
}

/** A device, or a node whose name somebody takes for one. */
function deviceOf(graph: Graph, name: string): GraphNode | undefined {
  return graph.find(name);
}

/** Lines as the monitor ends them. */
function answer(text: string): string {
  return text === '' ? '' : `${text.trimEnd().replaceAll('\n', '\r\n')}\r\n`;
}

/** The first word, which may be in double quotes; undefined where there is none, or its quotes do not end. */
function nextWord(text: string): { readonly word: string; readonly rest: string } | undefined {
  const start = text.trimStart();
  const [quoted] = /^"(?:[^"\\]|\\.)*"/s.exec(start) ?? [];
  if (quoted !== undefined) {
    const word = quoted.slice(1, -1).replaceAll(/\\(.)/gs, (_, letter: string) => ESCAPES[letter] ?? letter);
    return { word, rest: start.slice(quoted.length) };
  }
  const [word] = /^[^\s"]\S*/.exec(start) ?? [];
  return word === undefined ? undefined : { word, rest: start.slice(word.length) };
}
