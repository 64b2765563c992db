import { statfs } from 'node:fs/promises';
import { StillframeError } from '../errors.js';

/** Space in bytes that is kept free for what a guest overwrites before we have ended its need for space. */
const MOST_RESERVED = 256 * 1024 * 1024;
const POLL_MS = 100;

/** A folder where old data goes. */
export interface ScratchFolder {
  readonly path: string;
  /** Bytes of the drives whose old data goes there. */
  readonly length: number;
}

/** @throws StillframeError ERR_STILLFRAME_NO_SPACE where there is little left, or what looking at the folder throws */
export async function checkSpace({ path, length }: ScratchFolder): Promise<void> {
  const { bavail, bsize } = await statfs(path);
  const reserve = Math.min(MOST_RESERVED, length / 4);
  if (bavail * bsize >= reserve) return;
  throw new StillframeError(
    'ERR_STILLFRAME_NO_SPACE',
    `the scratch folder '${path}' has less than ${reserve} bytes left, and writes of the guest would fail without any; ` +
      'free some space on that file system, or choose another one with --scratch (option scratch)',
  );
}

/**
 * Looks after the space for old data: a guest whose old data finds none has its write failed, so the backup is to be given
 * up before.
 *
 * @param onShort is called once with an error that says so
 * @returns what ends that
 */
export function watchSpace(
  folders: readonly ScratchFolder[],
  onShort: (error: StillframeError) => void,
): () => void {
  let over = false;
  let timer: NodeJS.Timeout | undefined;
  const look = async (): Promise<void> => {
    for (const folder of folders) {
      await checkSpace(folder).catch((error: unknown) => {
        // A folder that cannot be looked at any more says nothing of the space under an open file.
        if (over || !(error instanceof StillframeError)) return;
        over = true;
        onShort(error);
      });
    }
    if (!over) timer = setTimeout(look, POLL_MS);
  };
  timer = setTimeout(look, POLL_MS);
  return () => {
    over = true;
    clearTimeout(timer);
  };
}
