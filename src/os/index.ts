import { throughFfi } from './ffi.js';
import { loadSyscalls, type Syscalls } from './syscalls.js';

/**
 * The one place where the system calls are chosen. They are undefined where the FFI has no binary for the
 * platform, or where `STILLFRAME_NO_FFI=1` says to do without: then holes are not seen (everything is data, found
 * to be zero by looking), zeroes are written, and image locks are not taken. Results stay right.
 */
export const syscalls: Syscalls | undefined = throughFfi(loadSyscalls)();
