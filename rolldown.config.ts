import { dirname, relative } from 'node:path';
import { fileURLToPath } from 'node:url';
import { defineConfig, type RolldownOptions } from 'rolldown';

/*
 * Every command and every thread begins with loading its modules; one file loads several times faster than a hundred.
 * The compiler's output is bundled in place: what is imported as a library stays as it is.
 */

const URL_OF_MODULE = 'import.meta.url';
const dist = fileURLToPath(new URL('dist', import.meta.url));
const entries = ['cli/main', 'engine/worker', 'nbd/server/thread'];

export default defineConfig(
  entries.map((entry): RolldownOptions => {
    const file = `${dist}/${entry}.js`;
    const folder = dirname(file);
    return {
      input: file,
      platform: 'node',
      external: ['@foxglove/wasm-zstd', 'koffi', 'piscina'],
      plugins: [
        {
          name: 'urls-of-modules',
          // Modules find files beside their own.
          transform: (code, id) =>
            code.includes(URL_OF_MODULE)
              ? code.replaceAll(URL_OF_MODULE, `new URL('${relative(folder, id)}', ${URL_OF_MODULE}).href`)
              : null,
        },
      ],
      output: {
        dir: folder,
        format: 'esm',
        entryFileNames: '[name].js',
        chunkFileNames: `${entry.slice(entry.lastIndexOf('/') + 1)}-[name].js`,
      },
    };
  }),
);
