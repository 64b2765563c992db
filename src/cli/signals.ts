/** Cancels on the first signal; the second one ends the process at once. */
export function cancelOnSignal(cancel: () => void): {
  readonly interrupted: () => boolean;
  readonly stop: () => void;
} {
  let interrupted = false;
  const onSignal = (): void => {
    if (interrupted) process.exit(130);
    interrupted = true;
    process.stderr.write('\nCancelling; once more to end at once.\n');
    try {
      cancel();
    } catch {
      // At its commit point already: it ends by itself.
    }
  };
  const signals = ['SIGINT', 'SIGTERM'] as const;
  for (const signal of signals) process.on(signal, onSignal);
  return {
    interrupted: () => interrupted,
    stop: () => {
      for (const signal of signals) process.off(signal, onSignal);
    },
  };
}

/** What a command that was interrupted ends with. @param json print the error to stdout as well */
export function tellInterrupted(json: boolean): number {
  const code = 'ERR_STILLFRAME_JOB_CANCELLED';
  if (json) console.log(JSON.stringify({ type: 'error', code, message: 'interrupted' }));
  process.stderr.write(`stillframe: interrupted; nothing was left behind [${code}]\n`);
  return 130;
}
