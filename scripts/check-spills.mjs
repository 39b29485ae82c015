// Registers that ptxas spilled to local memory, against cuda/spills.json: by kernel (source/name, all its instances) and architecture, the bytes
// allowed; a kernel that is not listed may spill none. `--build FOLDER` is where CMake built (default build); `--update` writes the file anew.
// Serialised wgmma, which ptxas calls a performance loss, has no allowance.
import { execFileSync } from 'node:child_process'
import { existsSync, readdirSync, readFileSync, writeFileSync } from 'node:fs'
import { basename, dirname, join, resolve } from 'node:path'
import { fileURLToPath } from 'node:url'
import { parseArgs } from 'node:util'

const root = join(dirname(fileURLToPath(import.meta.url)), '..')
const { values: options } = parseArgs({
  options: {
    build: { type: 'string', default: join(root, 'build') },
    budget: { type: 'string', default: join(root, 'cuda/spills.json') },
    update: { type: 'boolean', default: false },
  },
})
const logs = join(resolve(options.build), 'CMakeFiles/hstu.dir/cuda')

function fail(message) {
  console.error(`check-spills: ${message}`)
  process.exit(1)
}

/** `void hstu::cuda::f<float, (int)64>(float*)` is f. */
function nameOf(demangled) {
  let text = demangled.replaceAll('(anonymous namespace)::', '')
  for (let shorter; (shorter = text.replace(/<[^<>]*>/g, '')) !== text; ) text = shorter
  return text.split('(')[0].split(/::| /).at(-1)
}

function demangle(symbols) {
  return execFileSync('c++filt', { input: symbols.join('\n'), encoding: 'utf8', maxBuffer: 1 << 28 }).split('\n')
}

/** What ptxas said of every function of one source: { symbol, architecture, bytes }. */
function parse(log) {
  const found = []
  let architecture
  let symbol
  for (const line of log.split('\n')) {
    const entry = /Compiling entry function '(\S+)' for '(\S+)'/.exec(line)
    const spill = /(\d+) bytes spill stores, (\d+) bytes spill loads/.exec(line)
    if (entry) [, symbol, architecture] = entry
    if (spill) found.push({ symbol, architecture, bytes: Math.max(Number(spill[1]), Number(spill[2])) })
  }
  return found
}

const sources = readdirSync(join(root, 'cuda')).filter(name => name.endsWith('.cu'))
const missing = sources.filter(name => !existsSync(join(logs, `${name}.o.ptxas`)))
if (missing.length > 0) fail(`${logs} holds nothing of ${missing.join(', ')}: npm run build:cuda, or --build FOLDER`)

/** kernel -> architecture -> the instance that spills most. */
const measured = {}
const texts = sources.map(source => [source, readFileSync(join(logs, `${source}.o.ptxas`), 'utf8')])
const functions = texts.flatMap(([source, log]) => parse(log).map(item => ({ ...item, source })))
const names = demangle(functions.map(({ symbol }) => symbol))
functions.forEach(({ source, architecture, bytes }, i) => {
  const worst = (measured[`${basename(source, '.cu')}/${nameOf(names[i])}`] ??= {})
  if (!(worst[architecture]?.bytes >= bytes)) worst[architecture] = { bytes, instance: names[i] }
})
const architectures = [...new Set(functions.map(({ architecture }) => architecture))].sort()
if (functions.length === 0) fail(`${logs}: ptxas said nothing of any kernel`)

const budget = existsSync(options.budget) ? JSON.parse(readFileSync(options.budget, 'utf8')) : {}
if (options.update) {
  // What was not compiled this time keeps its budget: an architecture, but no kernel that is gone.
  const updated = {}
  for (const kernel of Object.keys(measured).sort()) {
    const kept = Object.entries(budget[kernel] ?? {}).filter(([architecture]) => !architectures.includes(architecture))
    const spilled = Object.entries(measured[kernel]).filter(([, { bytes }]) => bytes > 0)
    const all = [...kept, ...spilled.map(([architecture, { bytes }]) => [architecture, bytes])].sort()
    if (all.length > 0) updated[kernel] = Object.fromEntries(all)
  }
  writeFileSync(options.budget, `${JSON.stringify(updated, null, 2)}\n`)
  console.log(
    `check-spills: cuda/spills.json written for ${architectures.join(', ')}: ${Object.keys(updated).length} kernels spill`,
  )
  process.exit(0)
}

const losses = texts.flatMap(([source, log]) =>
  [...log.matchAll(/Potential Performance Loss: .*/g)].map(([loss]) => `cuda/${source}: ${loss}`),
)
if (losses.length > 0)
  fail(
    `ptxas could not keep wgmma asynchronous: see its reason, and the accumulators between fence and wait\n  ${losses.join('\n  ')}`,
  )

const over = []
const under = []
for (const [kernel, worst] of Object.entries(measured))
  for (const [architecture, { bytes, instance }] of Object.entries(worst)) {
    const allowed = budget[kernel]?.[architecture] ?? 0
    if (bytes > allowed)
      over.push(`${kernel} on ${architecture} spills ${bytes} bytes, ${allowed} allowed: ${instance}`)
    if (bytes < allowed) under.push(`${kernel} on ${architecture} spills ${bytes} bytes, ${allowed} allowed`)
  }
const gone = Object.keys(budget).filter(kernel => !measured[kernel])
const count = `${Object.keys(measured).length} kernels (${functions.length} instances) on ${architectures.join(', ')}`
if (over.length > 0)
  fail(
    `of ${count}, these spill more than cuda/spills.json allows:\n  ${over.join('\n  ')}\n` +
      'Use fewer registers (a smaller tile, fewer values alive at once) or let a thread have more (fewer threads or blocks in __launch_bounds__);\n' +
      `where the spill is worth it by a measurement, allow it: node scripts/check-spills.mjs --build ${options.build} --update`,
  )
console.log(`check-spills: ${count} stay within cuda/spills.json`)
for (const line of [...under, ...gone.map(kernel => `${kernel} is gone`)])
  console.log(`  could be tightened with --update: ${line}`)
