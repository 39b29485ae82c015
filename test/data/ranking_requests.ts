import { mkdtempSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import type { RequestReader } from '#lib/data/ranking/reader.js'
import { batchSize, type RequestBatch } from '#lib/data/ranking/schema.js'
import { buildIfMissing } from '../cli/process.js'

/** A folder of the test file's own, and what writes a file into it. The reader's thread is the built one. */
export function scratch(): { at: (name: string) => string; write: (name: string, text: string) => string } {
  let folder = ''
  beforeAll(() => {
    buildIfMissing()
    folder = mkdtempSync(join(tmpdir(), 'hstu-ranking-'))
  })
  afterAll(() => rmSync(folder, { recursive: true, force: true }))
  const at = (name: string) => join(folder, name)
  return {
    at,
    write: (name, text) => {
      writeFileSync(at(name), text)
      return at(name)
    },
  }
}

export async function readAll(reader: RequestReader, batchSize = 1000): Promise<RequestBatch[]> {
  const batches: RequestBatch[] = []
  for await (const batch of reader.batches({ batchSize })) batches.push(batch)
  return batches
}

/** A request as plain values: history rows and candidates one line each. */
export function plain(batch: RequestBatch) {
  const { history, candidates } = batch
  const within = (offsets: BigInt64Array, b: number) =>
    Array.from({ length: Number(offsets[b + 1]! - offsets[b]!) }, (_, k) => Number(offsets[b]!) + k)
  return Array.from({ length: batchSize(batch) }, (_, b) => ({
    request: batch.requests[b]!,
    id: batch.requestIds[b]!,
    user: Number(batch.users[b]!),
    time: Number(batch.times[b]!),
    contextual: Array.from(
      batch.contextual.subarray(b * batch.schema.contextual.length).subarray(0, batch.schema.contextual.length),
      Number,
    ),
    start: batch.historyStart[b]!,
    supervisedFrom: batch.supervisedFrom[b]!,
    history: within(history.offsets, b).map(t => ({
      item: Number(history.items[t]!),
      series: history.series[t]!,
      time: Number(history.times[t]!),
      actions: history.actions[t]!,
      taken: history.taken[t]!,
      pending: history.pending[t]!,
      request: history.requests[t]!,
      values: Object.values(history.values).map(values => values[t]!),
    })),
    candidates: within(candidates.offsets, b).map(m => ({
      item: Number(candidates.items[m]!),
      actions: candidates.actions[m]!,
      taken: candidates.taken[m]!,
      values: Object.values(candidates.values).map(values => values[m]!),
    })),
  }))
}
