// prepack: a tarball without the built library or without a prebuilt addon would install and then not load.
import { existsSync } from 'node:fs'
import { dirname, join } from 'node:path'
import { fileURLToPath } from 'node:url'

const root = join(dirname(fileURLToPath(import.meta.url)), '..')
const wanted = ['dist/index.js', 'dist/cjs/index.js', 'dist/cli.js', 'prebuilds/linux-x64/hstu.glibc.node']
const missing = wanted.filter(file => !existsSync(join(root, file)))
if (missing.length > 0) {
  console.error(`hstu: ${missing.join(', ')} missing: run \`npm run prebuild\` first`)
  process.exit(1)
}
