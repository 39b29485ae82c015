// npm run bench -- [--save] [--device cpu|cuda] [op ...]: runs every bench, or the named ones (soak, quality, ranking and data_prepare only
// by name); --save
// writes bench/results/<device>/<op>.json and rewrites the tables of the README. --table rewrites them from the results there are.
import { existsSync, readdirSync } from 'node:fs'
import { dirname, join } from 'node:path'
import { fileURLToPath, pathToFileURL } from 'node:url'
import { parseArgs } from 'node:util'
import { packageRoot } from '#lib/native.js'
import { runBenches } from './harness.js'
import { gpuName } from './peers.js'
import { rewriteReadme } from './table.js'

const { values, positionals } = parseArgs({
  allowPositionals: true,
  options: {
    save: { type: 'boolean', default: false },
    table: { type: 'boolean', default: false },
    device: { type: 'string', default: 'cpu' },
    folder: { type: 'string' },
    steps: { type: 'string', default: '2000' },
    only: { type: 'string', default: '' },
  },
})
const results = join(packageRoot, 'bench/results')
const here = dirname(fileURLToPath(import.meta.url))
if (!values.table) {
  for (const file of readdirSync(here).sort()) // a folder built earlier may hold a bench whose source is gone
    if (/\.(bench|case)\.js$/.test(file) && existsSync(join(packageRoot, 'bench', file.replace(/js$/, 'ts'))))
      await import(pathToFileURL(join(here, file)).href)
  const onCpu = values.device === 'cpu'
  const start = performance.now()
  await runBenches(positionals, {
    save: values.save,
    folder: values.folder ?? join(results, onCpu ? 'cpu' : gpuName()),
    device: onCpu ? 'cpu' : 'cuda:0',
    steps: Number(values.steps),
    only: new RegExp(values.only),
  })
  process.stdout.write(`done in ${Math.round((performance.now() - start) / 1e3)} s\n`)
}
if (values.table || (values.save && !values.folder)) rewriteReadme(join(packageRoot, 'README.md'), results)
