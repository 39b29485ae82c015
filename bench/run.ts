// npm run bench -- [--save] [--device cpu|cuda] [op ...]: runs every bench, or the named ones; --save writes
// bench/results/<cpu or h200>/<op>.json and rewrites the table of the README.
import { mkdirSync, readdirSync } from 'node:fs'
import { dirname, join } from 'node:path'
import { fileURLToPath, pathToFileURL } from 'node:url'
import { parseArgs } from 'node:util'
import { packageRoot } from '#lib/native.js'
import { runBenches } from './harness.js'
import { rewriteReadme } from './table.js'

const { values, positionals } = parseArgs({
  allowPositionals: true,
  options: {
    save: { type: 'boolean', default: false },
    device: { type: 'string', default: 'cpu' },
    folder: { type: 'string' },
  },
})
const here = dirname(fileURLToPath(import.meta.url))
for (const file of readdirSync(here).sort())
  if (/\.(bench|case)\.js$/.test(file)) await import(pathToFileURL(join(here, file)).href)
const onCpu = values.device === 'cpu'
const folder = values.folder ?? join(packageRoot, 'bench/results', onCpu ? 'cpu' : 'h200')
mkdirSync(folder, { recursive: true })
runBenches(positionals, { save: values.save, folder, device: onCpu ? 'cpu' : 'cuda:0' })
const folders = ['cpu', 'h200'].map(name => join(packageRoot, 'bench/results', name))
if (values.save && !values.folder) rewriteReadme(join(packageRoot, 'README.md'), folders)
