import { randomBytes } from 'node:crypto'
import { mkdir, readdir, rename, rm, stat, writeFile } from 'node:fs/promises'
import { availableParallelism, hostname } from 'node:os'
import { basename, dirname, join, resolve } from 'node:path'
import { HstuError } from '../../errors.js'
import { type Database, sqlString, withDatabase } from '../duckdb.js'
import { buildEntries, type PrepareCounts, type VocabularySizes, validateLog } from './entries.js'
import { appendFile, createLog, type LoggedFile } from './log.js'
import { MANIFEST, newManifest, type RequestManifest, type ShardFile } from './manifest.js'
import { checkMapping, DEFAULT_MAX_HISTORY, type RequestMapping, schemaOf } from './mapping.js'
import { buildSeries, writeShard } from './shards.js'

/** How far `prepareRequests` has come. */
export interface PrepareProgress {
  phase: 'read' | 'join' | 'sequences' | 'write'
  done: number
  /** null while that is not known */
  total: number | null
}

/** Each thread has its own buffers beside what the database counts. */
const MAX_THREADS = 4

export interface PrepareOptions {
  /** Folder of the shards; it must not exist yet. */
  out: string
  /** Replaces a prepared folder that is there. */
  replace?: boolean
  /** What the database may hold in memory before it spills; default `800MB`, with which the process has up to 1.6 GB. */
  memoryLimit?: string
  signal?: AbortSignal
  onProgress?: (progress: PrepareProgress) => void
}

/**
 * Turns logs of events into Parquet shards of request records (`REQUEST_COLUMNS`) with vocabularies and a manifest,
 * out of core. The folder appears whole or not at all.
 *
 * Rows of one user, request id and item become one entry with several actions; what came before the item was shown is
 * an entry of its own. A request's time is that of its first impression; its history is what the user did before, with
 * the actions known then.
 *
 * @throws HstuError ERR_HSTU_DATA naming file, line and what was expected; ERR_HSTU_ABORTED when `signal` fires.
 */
export async function prepareRequests(mapping: RequestMapping, options: PrepareOptions): Promise<RequestManifest> {
  const { signal, memoryLimit = '800MB', onProgress = () => {} } = options
  checkMapping(mapping, mapping?.name ?? 'mapping')
  const out = resolve(options.out)
  await checkTarget(out, options.replace === true)
  await removeLeftovers(out)
  const folder = `${out}.${hostname()}.${process.pid}.${randomBytes(6).toString('hex')}.tmp`
  await mkdir(folder, { recursive: true })
  try {
    const manifest = await withDatabase(
      mapping.name,
      signal,
      async database => {
        // The allocator otherwise keeps half a gigabyte that it has freed.
        await database.run(`SET memory_limit = ${sqlString(memoryLimit)}; SET threads = ${Math.min(MAX_THREADS, availableParallelism())}; SET allocator_flush_threshold = '16MB';
        SET allocator_bulk_deallocation_flush_threshold = '16MB'`)
        // Tables in a file are compressed, and leave memory without being written anew.
        await database.run(`ATTACH ${sqlString(join(database.scratch, 'work.db'))} AS work; USE work`)
        return writeFolder(database, mapping, folder, onProgress)
      },
      folder,
    )
    await writeFile(join(folder, MANIFEST), `${JSON.stringify(manifest, null, 2)}\n`)
    const old = `${folder}.old`
    const replaces = await rename(out, old).then(
      () => true,
      () => false,
    )
    await rename(folder, out)
    if (replaces) await rm(old, { recursive: true, force: true })
    return manifest
  } finally {
    await rm(folder, { recursive: true, force: true })
  }
}

async function checkTarget(out: string, replace: boolean): Promise<void> {
  const parent = await stat(dirname(out)).catch(() => null)
  if (parent && !parent.isDirectory()) throw new HstuError('ERR_HSTU_DATA', `${dirname(out)}: expected a folder`)
  const files = await readdir(out).catch((error: NodeJS.ErrnoException) => (error.code === 'ENOENT' ? null : ['?']))
  if (files === null || files.length === 0) return
  // Only what this function made is ever deleted.
  if (!replace || !files.includes(MANIFEST))
    throw new HstuError(
      'ERR_HSTU_DATA',
      files.includes(MANIFEST) ? `${out}: exists; replace it explicitly` : `${out}: exists and holds other files`,
    )
}

/** What runs that were killed left beside `out`: gigabytes that nothing reads. Those of this host alone can be told. */
async function removeLeftovers(out: string): Promise<void> {
  const begin = `${basename(out)}.${hostname()}.`
  const alive = (pid: number) => {
    try {
      return process.kill(pid, 0)
    } catch (error) {
      return (error as NodeJS.ErrnoException).code === 'EPERM'
    }
  }
  for (const name of await readdir(dirname(out)).catch(() => [])) {
    const pid = name.startsWith(begin) && /^(\d+)\.[0-9a-f]{12}\.tmp$/.exec(name.slice(begin.length))?.[1]
    if (!pid || alive(Number(pid))) continue
    const left = join(dirname(out), name)
    if (!(await readdir(left)).includes(MANIFEST)) await rm(left, { recursive: true, force: true })
  }
}

async function writeFolder(
  database: Database,
  mapping: RequestMapping,
  folder: string,
  onProgress: (progress: PrepareProgress) => void,
): Promise<RequestManifest> {
  const schema = schemaOf(mapping)
  const maxHistory = mapping.maxHistory ?? DEFAULT_MAX_HISTORY
  await createLog(database, schema)
  const files: LoggedFile[] = []
  const sources = mapping.sources.flatMap(source =>
    [source.path].flat().map(path => ({ path: path as string, source })),
  )
  for (const [k, { path, source }] of sources.entries()) {
    onProgress({ phase: 'read', done: k, total: sources.length })
    const last = files.at(-1)
    files.push(await appendFile(database, path, source, schema, last ? last.start + last.rows : 0))
  }
  const counts: PrepareCounts = {
    ...(await validateLog(database, files, schema)),
    ...{ duplicates: 0, unknownRequests: 0, withoutCandidates: 0, overflow: 0 },
  }
  onProgress({ phase: 'join', done: 0, total: null })
  let statements = 0
  const counting: Database = {
    ...database,
    run: async sql => {
      await database.run(sql)
      onProgress({ phase: 'join', done: ++statements, total: null })
    },
  }
  const sizes = await buildEntries(counting, mapping, schema, counts)
  onProgress({ phase: 'sequences', done: 0, total: null })
  const plans = await buildSeries(database, schema, maxHistory, (done, total) =>
    onProgress({ phase: 'sequences', done, total }),
  )
  const shards: ShardFile[] = []
  for (const [k, plan] of plans.entries()) {
    onProgress({ phase: 'write', done: k, total: plans.length })
    const file = `requests-${String(k).padStart(5, '0')}.parquet`
    await writeShard(database, folder, file, plan, schema, maxHistory)
    const { size } = await stat(join(folder, file))
    shards.push({ file, bytes: size, first: plan.first, requests: plan.requests })
  }
  onProgress({ phase: 'write', done: plans.length, total: plans.length })
  await writeVocabularies(database, folder, schema, sizes)
  const totals = await database.row('SELECT count(*) AS requests, sum(candidates)::BIGINT AS candidates FROM requests')
  const { name, tasks } = mapping
  const [requests, candidates] = [Number(totals!.requests), Number(totals!.candidates)]
  return newManifest({ name, schema, tasks, maxHistory, sizes, counts, requests, candidates, shards })
}

/** `vocabulary-<what>.parquet`: number and external id. */
async function writeVocabularies(
  database: Database,
  folder: string,
  schema: RequestManifest['schema'],
  sizes: VocabularySizes,
): Promise<void> {
  const tables: [string, string][] = [
    ['users', 'users'],
    ['items', 'items'],
    ...sizes.contextual.map((_, k): [string, string] => [`contextual-${schema.contextual[k]}`, `feature_c${k}`]),
    ...sizes.series.map((_, k): [string, string] => [`series-${schema.series[k]}`, `feature_s${k}`]),
  ]
  for (const [name, table] of tables)
    await database.run(`COPY (SELECT n AS number, id FROM ${table} ORDER BY n)
      TO ${sqlString(join(folder, `vocabulary-${name}.parquet`))} (FORMAT parquet, COMPRESSION zstd)`)
}
