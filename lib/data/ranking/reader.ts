import { Worker } from 'node:worker_threads'
import { check, HstuError } from '../../errors.js'
import { throwIfAborted } from '../files.js'
import { concatBatches, sliceBatch } from './batches.js'
import { type RequestManifest, readManifest } from './manifest.js'
import type { ReadJob, ReadMessage } from './read_worker.js'
import type { RequestBatch } from './schema.js'

export interface ReadRequestsOptions {
  /** Requests a batch; the last one may have fewer. */
  batchSize: number
  /** First request read: the cursor of a run that goes on. Default 0. */
  first?: number
  /** One past the last request read; default all of them. */
  end?: number
  /** Chunks of up to 2,048 records that are read ahead; default 2. */
  prefetch?: number
  /** What the reading thread's database may hold; default `512MB`. */
  memoryLimit?: string
  signal?: AbortSignal
}

/** Prepared request records, read as a stream. */
export class RequestReader {
  private constructor(
    readonly folder: string,
    readonly manifest: RequestManifest,
  ) {}

  /**
   * Opens a folder that `prepareRequests` wrote, or another engine to the same schema.
   * @throws HstuError ERR_HSTU_DATA; see `readManifest`.
   */
  static async open(folder: string): Promise<RequestReader> {
    return new RequestReader(folder, await readManifest(folder))
  }

  /** Number of the request at `share` of them: where the last 20 % begin is `at(0.8)`. */
  at(share: number): number {
    return Math.floor(this.manifest.requests * share)
  }

  /**
   * Batches in order of time. A thread reads ahead by `prefetch` chunks and no more, so memory does not grow with the
   * number of records; leaving the loop ends the thread.
   *
   * @throws HstuError ERR_HSTU_DATA naming shard and record; ERR_HSTU_ABORTED; ERR_HSTU_INVALID_ARGUMENT
   */
  async *batches(options: ReadRequestsOptions): AsyncGenerator<RequestBatch> {
    const { batchSize, first = 0, end = this.manifest.requests, prefetch = 2, memoryLimit = '512MB', signal } = options
    const whole = (name: string, value: number, least: number) =>
      check(Number.isInteger(value) && value >= least, 'ERR_HSTU_INVALID_ARGUMENT', () => {
        return `${name} must be an integer of at least ${least}, got ${value}`
      })
    whole('batchSize', batchSize, 1)
    whole('prefetch', prefetch, 1)
    whole('first', first, 0)
    whole('end', end, first)
    throwIfAborted(signal)
    let kept: RequestBatch[] = []
    let size = 0
    for await (const chunk of chunks({ folder: this.folder, ...this.manifest, first, end, memoryLimit }, prefetch)) {
      throwIfAborted(signal)
      const length = chunk.requests.length
      let at = 0
      if (size > 0) {
        at = Math.min(batchSize - size, length)
        kept.push(sliceBatch(chunk, 0, at))
        size += at
        if (size === batchSize) {
          yield concatBatches(kept)
          kept = []
          size = 0
        }
      }
      for (; at + batchSize <= length; at += batchSize) yield sliceBatch(chunk, at, at + batchSize)
      if (at < length) {
        kept.push(sliceBatch(chunk, at, length))
        size += length - at
      }
    }
    throwIfAborted(signal)
    if (size > 0) yield concatBatches(kept)
  }
}

/** The same path from the sources and from what is built of them: a thread runs what is built. */
const WORKER = new URL('../../../dist/data/ranking/read_worker.js', import.meta.url)

async function* chunks(
  { folder, schema, shards, first, end, memoryLimit }: ReadJob,
  prefetch: number,
): AsyncGenerator<RequestBatch> {
  const job: ReadJob = { folder, schema, shards, first, end, memoryLimit }
  const worker = new Worker(WORKER, { workerData: job, execArgv: [] }) // flags such as --input-type are for the program's own file
  const messages: ReadMessage[] = []
  let failure: Error | null = null
  let wake = () => {}
  worker.on('message', (message: ReadMessage) => {
    messages.push(message)
    wake()
  })
  worker.on('error', error => {
    failure = error
    wake()
  })
  const exited = new Promise<void>(resolve => {
    worker.on('exit', () => {
      failure ??= new Error('the reading thread ended before the data')
      wake()
      resolve()
    })
  })
  worker.postMessage(prefetch)
  try {
    for (;;) {
      while (messages.length === 0) {
        if (failure) throw new HstuError('ERR_HSTU_DATA', `${folder}: reading failed: ${failure}`, { cause: failure })
        await new Promise<void>(resolve => {
          wake = resolve
        })
      }
      const message = messages.shift()!
      if ('end' in message) return
      if ('error' in message) throw new HstuError(message.error.code ?? 'ERR_HSTU_DATA', message.error.message)
      worker.postMessage(1)
      yield message.batch
    }
  } finally {
    // It closes its database before it goes; terminating it would cut that short.
    worker.postMessage(0)
    await exited
  }
}
