import { spawnSync } from 'node:child_process'
import { existsSync, readFileSync } from 'node:fs'
import { createRequire } from 'node:module'
import { availableParallelism, cpus, freemem, release, totalmem, type } from 'node:os'
import { join, relative } from 'node:path'
import { fileURLToPath } from 'node:url'
import type { Backend } from '../native.js'
import type { Args } from './args.js'
import { print, printJson } from './output.js'
import { packageFolder, packageJson } from './package.js'

const LIMIT_MS = 60_000

/** What cli/probe.ts tells. */
type Probe =
  | { error: string }
  | (Backend & {
      error?: undefined
      free: number[]
      ceilings: { gflops: number; gbps: number }
      ops: number
      works: boolean
    })

const require = createRequire(import.meta.url)

function probe(): Probe {
  const script = fileURLToPath(new URL('./probe.js', import.meta.url))
  const { stdout, stderr, signal, status, error } = spawnSync(process.execPath, [script], {
    encoding: 'utf8',
    timeout: LIMIT_MS,
  })
  if ((error as NodeJS.ErrnoException | undefined)?.code === 'ETIMEDOUT')
    return { error: `the addon did not answer within ${LIMIT_MS / 1000} s` }
  if (signal) return { error: `loading the addon crashed the process with ${signal}` }
  try {
    return JSON.parse(stdout) as Probe
  } catch {
    return { error: `exit code ${status}: ${(error?.message ?? stderr.trim()) || 'no output'}` }
  }
}

/** The file that loads, and whether it was built here or came with the package. */
function addon(): { path: string | null; origin: 'local build' | 'prebuild' | null } {
  try {
    const path = (require('node-gyp-build') as { resolve: (folder: string) => string }).resolve(packageFolder)
    return { path, origin: relative(packageFolder, path).startsWith('prebuilds') ? 'prebuild' : 'local build' }
  } catch {
    return { path: null, origin: null }
  }
}

function peers(): { name: string; wanted: string; found: string | null }[] {
  return Object.entries(packageJson().peerDependencies ?? {}).map(([name, wanted]) => {
    const file = (require.resolve.paths(name) ?? [])
      .map(folder => join(folder, name, 'package.json'))
      .find(path => existsSync(path))
    return {
      name,
      wanted,
      found: file ? (JSON.parse(readFileSync(file, 'utf8')) as { version: string }).version : null,
    }
  })
}

function systemName(): string {
  try {
    const text = readFileSync('/etc/os-release', 'utf8')
    return /^PRETTY_NAME="?(.*?)"?$/m.exec(text)?.[1] ?? type()
  } catch {
    return type()
  }
}

function collect(found: Probe) {
  const { header } = process.report.getReport() as { header: { glibcVersionRuntime?: string } }
  const cuda: Partial<Backend['cuda']> =
    found.error === undefined ? found.cuda : { usable: false, reason: 'the addon does not load' }
  const { HSTU_NUM_THREADS: threads } = process.env
  return {
    ok: found.error === undefined && found.works,
    version: packageJson().version,
    node: process.version,
    system: {
      ...{ name: systemName(), kernel: release(), platform: `${process.platform}-${process.arch}` },
      glibc: header.glibcVersionRuntime ?? null,
    },
    cpu: { model: cpus()[0]?.model ?? 'unknown', available: availableParallelism() },
    memory: { totalBytes: totalmem(), freeBytes: freemem() },
    addon: { ...addon(), ...found },
    threadsFrom: threads ? `HSTU_NUM_THREADS=${threads}` : 'the CPUs available',
    cuda,
    peers: peers(),
  }
}

export async function run(args: Args): Promise<number | undefined> {
  const found = probe()
  const report = collect(found)
  if (args.flag('json')) printJson(report)
  else printReport(report, found)
  return report.ok ? 0 : 1
}

function printReport(report: ReturnType<typeof collect>, found: Probe): void {
  const gib = (bytes: number) => `${(bytes / 2 ** 30).toFixed(1)} GiB`
  const { system, cpu, memory, addon: file } = report
  const rows: [string, string][] = [
    ['hstu', report.version],
    ['Node', report.node],
    ['system', `${system.name}, ${system.platform}, kernel ${system.kernel}, glibc ${system.glibc ?? 'not found'}`],
    ['CPU', `${cpu.model}, ${cpu.available} available`],
    ['memory', `${gib(memory.totalBytes)}, ${gib(memory.freeBytes)} free`],
    ['addon', file.path ? `${file.path} (${file.origin})` : 'no file for this host'],
  ]
  if (found.error !== undefined) rows.push(['', `does not load: ${found.error}`])
  else {
    rows.push(['', `loads${found.works ? '' : ' but gives wrong values'}; ${found.ops} ops`])
    rows.push(['instructions', found.instructionSet])
    rows.push(['threads', `${found.threads}, from ${report.threadsFrom}`])
    rows.push([
      'ceilings',
      `${found.ceilings.gflops.toFixed(0)} GFLOP/s (FMA), ${found.ceilings.gbps.toFixed(1)} GB/s (copy)`,
    ])
  }
  const { cuda } = report
  const version = (v = 0) => (v === 0 ? 'none' : `${Math.floor(v / 1000)}.${Math.floor((v % 1000) / 10)}`)
  const versions = cuda.compiled ? `; driver's CUDA ${version(cuda.driver)}, built with ${version(cuda.runtime)}` : ''
  rows.push(['CUDA', `${cuda.usable ? 'available' : `off: ${cuda.reason}`}${versions}`])
  for (const [i, device] of (cuda.devices ?? []).entries()) {
    const { name, computeCapability, multiprocessors, memory: bytes } = device
    const free = found.error === undefined && found.free[i] !== undefined ? `, ${gib(found.free[i])} free` : ''
    rows.push([`cuda:${i}`, `${name}, compute ${computeCapability}, ${multiprocessors} SMs, ${gib(bytes)}${free}`])
  }
  for (const { name, wanted, found: installed } of report.peers)
    rows.push([name, installed ?? `not installed (optional): npm i '${name}@${wanted}'`])
  const width = Math.max(...rows.map(([left]) => left.length))
  for (const [left, right] of rows)
    print(`${left.padEnd(width)}  ${right.split('\n').join(`\n${' '.repeat(width + 2)}`)}`)
}
