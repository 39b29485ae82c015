import { fileURLToPath } from 'node:url'
import { defineConfig } from 'vitest/config'

const lib = fileURLToPath(new URL('./lib', import.meta.url))

export default defineConfig({
  resolve: { alias: [{ find: /^#lib\/(.*)\.js$/, replacement: `${lib}/$1.ts` }] },
  test: { globals: true, pool: 'forks', include: ['test/**/*.test.ts'], testTimeout: 120_000, hookTimeout: 120_000 },
})
