// The thread behind `readRequests`: reads shards in order, a chunk of records ahead of every one that was asked for.
import { join } from 'node:path'
import { parentPort, workerData } from 'node:worker_threads'
import { HstuError } from '../../errors.js'
import { sqlName, sqlPath, withDatabase } from '../duckdb.js'
import { decodeChunk, shardColumns } from './decode.js'
import type { ShardFile } from './manifest.js'
import type { HistoryRows, RequestBatch, RequestSchema } from './schema.js'

/** What the reader starts the thread with. */
export interface ReadJob {
  folder: string
  schema: RequestSchema
  shards: ShardFile[]
  /** Requests `first .. end - 1` are read. */
  first: number
  end: number
  memoryLimit: string
}

/** What the thread posts: a chunk of records, the end, or what went wrong. */
export type ReadMessage =
  | { batch: RequestBatch }
  | { end: true }
  | { error: { code: HstuError['code'] | null; message: string } }

const port = parentPort!
const job = workerData as ReadJob
/** Chunks that may still be sent; the reader adds one for each that it takes, and 0 to say that it wants no more. */
let credit = 0
let wake = () => {}
const stop = new AbortController()
port.on('message', (more: number) => {
  credit += more
  if (more === 0) stop.abort()
  wake()
})

/** Every array of a batch: they change hands rather than being copied. */
function buffersOf(batch: RequestBatch): ArrayBuffer[] {
  const { history, candidates } = batch
  const rows = (of: HistoryRows | RequestBatch['candidates']) => [
    ...Object.values(of).filter(ArrayBuffer.isView),
    ...Object.values(of.values),
  ]
  const all = [...Object.values(batch).filter(ArrayBuffer.isView), ...rows(history), ...rows(candidates)]
  return [...new Set(all.map(array => array.buffer as ArrayBuffer))]
}

async function read(): Promise<void> {
  let after = -(2n ** 63n)
  for (const { file, first, requests } of job.shards) {
    const [from, to] = [Math.max(first, job.first), Math.min(first + requests, job.end)]
    if (from >= to) continue
    const path = join(job.folder, file)
    await withDatabase(path, stop.signal, async database => {
      await database.run(`SET memory_limit = '${job.memoryLimit}'; SET threads = 1`)
      const columns = shardColumns(job.schema)
      const described = await database.column(`SELECT column_name || ' ' || column_type FROM
        (DESCRIBE SELECT * FROM read_parquet(${sqlPath(path)}))`)
      for (const [name, type] of columns)
        if (!described.includes(`${name} ${type}`))
          throw new HstuError('ERR_HSTU_DATA', `${path}: expected a column ${name} of type ${type}`)
      let next = from
      const names = columns.map(([name]) => sqlName(name)).join(', ')
      const sql = `SELECT ${names} FROM read_parquet(${sqlPath(path)}) WHERE request >= ${from} AND request < ${to}`
      await database.chunks(sql, async chunk => {
        const batch = decodeChunk(chunk, job.schema, path, next, after)
        next += batch.requests.length
        after = batch.times.at(-1) ?? after
        while (credit === 0 && !stop.signal.aborted)
          await new Promise<void>(resolve => {
            wake = resolve
          })
        credit--
        port.postMessage({ batch } satisfies ReadMessage, buffersOf(batch))
      })
      if (next !== to)
        throw new HstuError('ERR_HSTU_DATA', `${path}: ends after record ${next - 1}, expected ${to - 1}`)
    })
  }
}

read().then(
  () => {
    port.postMessage({ end: true } satisfies ReadMessage)
    port.close()
  },
  (error: unknown) => {
    const code = error instanceof HstuError ? error.code : null
    const message = error instanceof Error ? error.message : String(error)
    port.postMessage({ error: { code, message } } satisfies ReadMessage)
    port.close()
  },
)
