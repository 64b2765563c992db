import { parseNbdName } from '../block/nbd/uri.js';
import { StillframeError } from '../errors.js';

const URI = /^(nbds?(?:\+[a-z]+)?:\/\/[^/?#]*)(\/[^?#]*)?(?:\?([^#]*))?$/i;

/**
 * Name of an export of an NBD server.
 *
 * @param place where the server listens: `unix:PATH`, `HOST:PORT`, or an NBD URI without an export
 * @param bitmap the dirty bitmap that is to be had with it
 * @throws StillframeError ERR_STILLFRAME_INVALID_ARGUMENT
 */
export function exportAt(place: string, name: string, bitmap?: string): string {
  const [, server, path, query = ''] = URI.exec(uriOf(place)) ?? [];
  if (server === undefined || (path !== undefined && path !== '/')) {
    throw new StillframeError(
      'ERR_STILLFRAME_INVALID_ARGUMENT',
      `'${place}' does not say where an NBD server listens; give unix:PATH, HOST:PORT, or an NBD URI without an export`,
    );
  }
  // See NO_IOTHREADS_BEFORE in `backup-running.ts`.
  const more = ['x-cut=0', ...(bitmap === undefined ? [] : [`x-dirty-bitmap=${encodeURIComponent(bitmap)}`])];
  const parameters = [...(query === '' ? [] : [query]), ...more].join('&');
  const uri = `${server}/${encodeURIComponent(name)}?${parameters}`;
  parseNbdName(uri);
  return uri;
}

function uriOf(place: string): string {
  if (place.startsWith('unix:')) {
    return `nbd+unix:///?socket=${encodeURIComponent(place.slice('unix:'.length))}`;
  }
  return /^nbds?(\+[a-z]+)?:\/\//i.test(place) ? place : `nbd://${place}`;
}
