import { readFileSync } from 'node:fs';

/** The package's version. */
export function version(): string {
  const path = new URL('../../package.json', import.meta.url);
  const { version: text }: { version: string } = JSON.parse(readFileSync(path, 'utf8'));
  return text;
}
