/**
 * What calls the platform through the FFI, loaded when it is first needed.
 *
 * @param isTold which failures of loading it are thrown; default: none
 * @returns gives undefined where the FFI has no binary for the platform, or `STILLFRAME_NO_FFI=1` says to do without
 */
export function throughFfi<T>(load: () => T, isTold = (_: unknown): boolean => false): () => T | undefined {
  let loaded: T | undefined;
  return () => {
    if (process.platform !== 'linux' || process.env['STILLFRAME_NO_FFI'] === '1') return undefined;
    try {
      loaded ??= load();
      return loaded;
    } catch (error) {
      if (isTold(error)) throw error;
      return undefined;
    }
  };
}
