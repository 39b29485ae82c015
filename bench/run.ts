// npm run bench -- [--save] [op ...]: runs every bench, or the named ones; --save writes bench/results/<device>/<op>.json
// and rewrites the table of the README.
import { readdirSync } from 'node:fs'
import { dirname, join } from 'node:path'
import { fileURLToPath, pathToFileURL } from 'node:url'
import { parseArgs } from 'node:util'
import { packageRoot } from '#lib/native.js'
import { runBenches } from './harness.js'
import { rewriteReadme } from './table.js'

const { values, positionals } = parseArgs({
  allowPositionals: true,
  options: { save: { type: 'boolean', default: false } },
})
const here = dirname(fileURLToPath(import.meta.url))
for (const file of readdirSync(here).sort())
  if (/\.(bench|case)\.js$/.test(file)) await import(pathToFileURL(join(here, file)).href)
const folder = join(packageRoot, 'bench/results/cpu')
runBenches(positionals, { save: values.save, folder })
if (values.save) rewriteReadme(join(packageRoot, 'README.md'), folder)
