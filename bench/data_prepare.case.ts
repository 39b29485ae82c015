import { spawn } from 'node:child_process'
import { readFileSync } from 'node:fs'
import { mkdtemp, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { pathToFileURL } from 'node:url'
import { sqlString, withDatabase } from '#lib/data/duckdb.js'
import type { RequestManifest } from '#lib/data/ranking/manifest.js'
import type { RequestMapping } from '#lib/data/ranking/mapping.js'
import { syntheticMapping, writeSyntheticLog } from '#lib/data/ranking/synthetic.js'
import { packageRoot } from '#lib/native.js'
import { benchCase, type Row, round } from './harness.js'

/** About 10 million events; histories grow to some 500 entries. */
const SIZES = { users: 20_000, items: 100_000, days: 85 }
const DAY = 86_400

interface Usage {
  seconds: number
  /** Of all threads. */
  cpuSeconds: number
  /** Most that was resident at once. */
  peakMiB: number
  stdout: string
}

/** Runs Node, and reads from /proc what the process used; it starts no others. */
function measured(args: readonly string[]): Promise<Usage> {
  return new Promise((resolve, reject) => {
    const start = performance.now()
    const child = spawn(process.execPath, args, { stdio: ['ignore', 'pipe', 'inherit'] })
    const used = { cpuSeconds: 0, peakMiB: 0 }
    const read = () => {
      try {
        const [, high] = /^VmHWM:\s+(\d+) kB/m.exec(readFileSync(`/proc/${child.pid}/status`, 'utf8'))!
        const fields = readFileSync(`/proc/${child.pid}/stat`, 'utf8').split(') ')[1]!.split(' ')
        used.peakMiB = Math.round(Number(high) / 1024)
        used.cpuSeconds = (Number(fields[11]) + Number(fields[12])) / 100
      } catch {} // it has ended
    }
    const timer = setInterval(read, 20)
    let stdout = ''
    child.stdout.setEncoding('utf8').on('data', text => {
      stdout += text
      read()
    })
    child.on('error', reject)
    child.on('close', code => {
      clearInterval(timer)
      if (code !== 0) reject(new Error(`node ${args.join(' ')} ended with ${code}`))
      else resolve({ seconds: (performance.now() - start) / 1e3, ...used, stdout })
    })
  })
}

const reader = pathToFileURL(join(packageRoot, 'dist/data/ranking/reader.js')).href
/** Reads all batches, and prints how many entries they had. */
const readScript = `import { RequestReader } from '${reader}'
  let entries = 0
  for await (const batch of (await RequestReader.open(process.argv[2])).batches({ batchSize: 256 })) entries += batch.history.items.length
  console.log(entries)`

/** The likes of the log as one of their own: request and item alone, up to two days later. */
async function splitLikes(log: string, likes: string): Promise<RequestMapping> {
  await withDatabase(log, undefined, database =>
    database.run(`COPY (SELECT request, item, time + 1 + (hash(request, item) % ${2 * DAY})::BIGINT AS time
      FROM read_csv(${sqlString(log)}) WHERE "like" = 1) TO ${sqlString(likes)} (HEADER)`),
  )
  const { sources, ...mapping } = syntheticMapping(log)
  const { LIKE: _, ...actions } = sources[0]!.actions!
  const late = {
    path: likes,
    item: 'item',
    time: 'time',
    request: 'request',
    impression: false,
    actions: { LIKE: true },
  }
  return { ...mapping, sources: [{ ...sources[0]!, actions }, late] }
}

async function rowsOf(name: string, mapping: RequestMapping, folder: string): Promise<Row[]> {
  const [file, out] = [join(folder, 'mapping.json'), join(folder, 'out')]
  await writeFile(file, JSON.stringify(mapping))
  const cli = join(packageRoot, 'dist/cli.js')
  const prepare = await measured([cli, 'data', 'prepare', '--mapping', file, '--out', out, '--replace', '--json'])
  const { requests, counts, shards } = JSON.parse(prepare.stdout) as RequestManifest
  const script = join(folder, 'read.mjs')
  await writeFile(script, readScript)
  const read = await measured([script, out])
  const entries = Number(read.stdout)
  const storedMB = Math.round(shards.reduce((sum, { bytes }) => sum + bytes, 0) / 1e6)
  const row = (label: string, count: number, unit: string, { seconds, cpuSeconds, peakMiB }: Usage): Row => ({
    ...{ case: `${label} ${name}`, events: counts.rows, requests, entries, storedMB, dtype: 'parquet', unit },
    ...{ seconds: round(seconds), cpuSeconds: round(cpuSeconds), peakMiB, hstu: Math.round(count / seconds) },
  })
  return [row('prepare', counts.rows, 'events/s', prepare), row('read', requests, 'requests/s', read)]
}

/** What `hstu data prepare` and the reader take for 10 million events, each in a process of its own. */
benchCase('data_prepare', {
  dtypes: ['float32'],
  byName: true,
  run: async ({ keep, options }) => {
    const folder = await mkdtemp(join(tmpdir(), 'hstu-bench-'))
    const rows: Row[] = []
    try {
      const [log, likes] = [join(folder, 'log.csv'), join(folder, 'likes.csv')]
      await writeSyntheticLog(log, SIZES)
      if (options.only.test('impressions')) rows.push(...(await rowsOf('impressions', syntheticMapping(log), folder)))
      keep(rows)
      if (options.only.test('late labels'))
        rows.push(...(await rowsOf('late labels', await splitLikes(log, likes), folder)))
    } finally {
      await rm(folder, { recursive: true, force: true })
    }
    return rows
  },
})
