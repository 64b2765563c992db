/**
 * For whom this thread works at the moment. A connection that is in use bears its user's mark, so that cancelling a job
 * can end what the job waits for without touching what others wait for.
 */
export interface Owner {
  /** Not 0, and different for each owner. */
  readonly mark: number;
  readonly cancelled: () => boolean;
}

let current: Owner | undefined;

export function currentOwner(): Owner | undefined {
  return current;
}

/** Runs `body` in the name of `owner`. */
export function workingFor<T>(owner: Owner, body: () => T): T {
  const before = current;
  current = owner;
  try {
    return body();
  } finally {
    current = before;
  }
}
