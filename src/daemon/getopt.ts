/** Options and other words of a command, told apart as the C library's `getopt` does. */
export interface Words {
  /** In the order in which they were given; the value is '' for those that take none. */
  readonly options: readonly (readonly [letter: string, value: string])[];
  readonly rest: readonly string[];
}

/**
 * @param name of the command, for texts
 * @param letters of the options; those that take a value are followed by `:`
 * @returns the words, or what is wrong with them
 */
export function getopt(name: string, letters: string, words: readonly string[]): Words | string {
  const options: [string, string][] = [];
  const rest: string[] = [];
  for (let index = 0; index < words.length; index++) {
    const word = words[index] ?? '';
    if (word === '--') {
      rest.push(...words.slice(index + 1));
      break;
    }
    if (!word.startsWith('-') || word === '-') {
      rest.push(word);
      continue;
    }
    for (let at = 1; at < word.length; at++) {
      const letter = word.charAt(at);
      const place = letter === ':' ? -1 : letters.indexOf(letter);
      if (place < 0) return `${name}: invalid option -- '${letter}'`;
      if (letters[place + 1] !== ':') {
        options.push([letter, '']);
        continue;
      }
      const value = at + 1 < word.length ? word.slice(at + 1) : words[++index];
      if (value === undefined) return `${name}: option requires an argument -- '${letter}'`;
      options.push([letter, value]);
      break;
    }
  }
  return { options, rest };
}
