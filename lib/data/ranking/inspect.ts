import { stat } from 'node:fs/promises'
import { join } from 'node:path'
import type { PrepareCounts } from './entries.js'
import type { RequestReader } from './reader.js'
import { parseTasks, taskTargets } from './tasks.js'

/** Facts about prepared request records as plain JSON. */
export interface RequestReport {
  name: string
  requests: number
  candidates: number
  users: number
  items: number
  /** Entries of the histories, over all records. */
  historyEntries: number
  /** Seconds; null without requests. */
  time: { first: number; last: number; days: number } | null
  /** Requests by the length of their history, in bins `from .. to` of powers of two, both ends included. */
  historyHistogram: { from: number; to: number; requests: number }[]
  candidatesPerRequest: { min: number; mean: number; max: number }
  /** Share of candidates that have the action, and of history entries. */
  actions: { name: string; candidates: number; history: number }[]
  /** Candidates with a label, and the mean label: of all and of the last fifth of the requests. */
  tasks: { name: string; kind: string; labelled: number; rate: number; lastRate: number }[]
  /** Entries whose actions were not all known at the request's time. */
  pending: number
  /** sum K / B: how often a request's part would be repeated in a log of impressions. */
  dedupFactor: number
  bytes: {
    /** Of the shards, compressed. */
    stored: number
    /** Of the records' numbers as they are, and of the same with one row an impression. */
    records: number
    impressionRows: number
  }
  counts: PrepareCounts
}

/**
 * Reads all records once, in bounded memory, and with that checks them.
 * @throws HstuError ERR_HSTU_DATA naming shard and record; ERR_HSTU_ABORTED
 */
export async function inspectRequests(
  reader: RequestReader,
  options: { signal?: AbortSignal; onProgress?: (requests: number, total: number) => void } = {},
): Promise<RequestReport> {
  const { manifest } = reader
  const { schema } = manifest
  const tasks = parseTasks(manifest.tasks, schema)
  const [K, V, C] = [tasks.length, schema.values.length, schema.contextual.length]
  const lastFrom = reader.at(0.8)
  const sums = tasks.map(() => ({ labels: 0, weights: 0, lastLabels: 0, lastWeights: 0 }))
  const actions = schema.actions.map(() => ({ candidates: 0, history: 0 }))
  const bins = new Map<number, number>()
  let [entries, mainEntries, pending, records, impressionRows] = [0, 0, 0, 0, 0]
  let [least, most] = [Number.POSITIVE_INFINITY, 0]
  let [first, last] = [null as bigint | null, 0n]
  // Bytes of the fixed columns, of a history entry and of a candidate.
  const [fixed, entry, candidate] = [4 + 8 + 8 + 4 + 4 + 8 * C, 8 + 1 + 8 + 4 * 4 + 4 * V, 8 + 4 + 4 + 4 * V]
  let done = 0
  for await (const batch of reader.batches({
    batchSize: 1024,
    ...(options.signal ? { signal: options.signal } : {}),
  })) {
    const { labels, weights } = taskTargets(batch, tasks)
    const { history, candidates } = batch
    first ??= batch.times[0]!
    last = batch.times.at(-1)!
    entries += history.items.length
    for (let t = 0; t < history.items.length; t++) {
      if (history.series[t] === 0) mainEntries++
      if (history.pending[t] !== 0) pending++
      for (let bit = 0; bit < actions.length; bit++) actions[bit]!.history += (history.actions[t]! >> bit) & 1
    }
    for (let b = 0; b < batch.requests.length; b++) {
      const length = Number(history.offsets[b + 1]! - history.offsets[b]!)
      const count = Number(candidates.offsets[b + 1]! - candidates.offsets[b]!)
      const own = fixed + batch.requestIds[b]!.length + length * entry
      records += own + count * candidate
      impressionRows += count * (own + candidate)
      least = Math.min(least, count)
      most = Math.max(most, count)
      const from = length < 1 ? 0 : 2 ** Math.floor(Math.log2(length))
      bins.set(from, (bins.get(from) ?? 0) + 1)
    }
    for (let m = 0; m < candidates.items.length; m++) {
      for (let bit = 0; bit < actions.length; bit++) actions[bit]!.candidates += (candidates.actions[m]! >> bit) & 1
      const isLast = batch.requests[Number(candidates.requestIndex[m]!)]! >= lastFrom
      for (let k = 0; k < K; k++) {
        const weight = weights[m * K + k]!
        const sum = sums[k]!
        sum.weights += weight
        sum.labels += weight * labels[m * K + k]!
        if (!isLast) continue
        sum.lastWeights += weight
        sum.lastLabels += weight * labels[m * K + k]!
      }
    }
    done += batch.requests.length
    options.onProgress?.(done, manifest.requests)
  }
  const sizes = await Promise.all(manifest.shards.map(({ file }) => stat(join(reader.folder, file))))
  return {
    name: manifest.name,
    requests: manifest.requests,
    candidates: manifest.candidates,
    users: manifest.sizes.users,
    items: manifest.sizes.items,
    historyEntries: entries,
    time: first === null ? null : { first: Number(first), last: Number(last), days: Number(last - first) / 86_400 },
    historyHistogram: [...bins]
      .sort(([a], [b]) => a - b)
      .map(([from, requests]) => ({ from, to: Math.max(0, 2 * from - 1), requests })),
    candidatesPerRequest: { min: least, mean: manifest.candidates / manifest.requests, max: most },
    actions: schema.actions.map((name, bit) => ({
      name,
      candidates: actions[bit]!.candidates / manifest.candidates,
      history: mainEntries === 0 ? 0 : actions[bit]!.history / mainEntries,
    })),
    tasks: tasks.map(({ name, kind }, k) => {
      const { labels, weights, lastLabels, lastWeights } = sums[k]!
      return { name, kind, labelled: weights, rate: labels / weights, lastRate: lastLabels / lastWeights }
    }),
    pending,
    dedupFactor: manifest.candidates / manifest.requests,
    bytes: { stored: sizes.reduce((sum, { size }) => sum + size, 0), records, impressionRows },
    counts: manifest.counts,
  }
}
