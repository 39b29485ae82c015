// npm run bench -- [--save] [--device cpu|cuda] [op ...]: runs every bench, or the named ones; --save writes
// bench/results/<device>/<op>.json and rewrites the tables of the README.
import { mkdirSync, readdirSync } from 'node:fs'
import { dirname, join } from 'node:path'
import { fileURLToPath, pathToFileURL } from 'node:url'
import { parseArgs } from 'node:util'
import { native, packageRoot } from '#lib/native.js'
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
const results = join(packageRoot, 'bench/results')
// 'NVIDIA H200' is h200, 'NVIDIA GeForce RTX 4090' is geforce-rtx-4090.
const gpu = (native.backend().cuda.devices[0]?.name ?? 'cuda').replace(/^NVIDIA /, '').toLowerCase()
const folder = values.folder ?? join(results, onCpu ? 'cpu' : gpu.replace(/\W+/g, '-'))
mkdirSync(folder, { recursive: true })
runBenches(positionals, { save: values.save, folder, device: onCpu ? 'cpu' : 'cuda:0' })
const folders = readdirSync(results)
  .sort()
  .map(name => join(results, name))
if (values.save && !values.folder) rewriteReadme(join(packageRoot, 'README.md'), folders)
