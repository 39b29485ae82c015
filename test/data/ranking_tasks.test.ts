import { concatBatches, expandBatch, selectHistory, sliceBatch, truncateHistory } from '#lib/data/ranking/batches.js'
import type { RequestBatch, RequestSchema } from '#lib/data/ranking/schema.js'
import { tokenLayout } from '#lib/data/ranking/sequence.js'
import { parseTask, parseTasks, taskTargets } from '#lib/data/ranking/tasks.js'
import { HstuError } from '#lib/errors.js'
import { Random } from '#lib/random.js'
import { plain } from './ranking_requests.js'

const schema: RequestSchema = {
  actions: ['LIKE', 'BOOK MARK', 'HATE'],
  values: ['watch'],
  contextual: ['country', 'page'],
  series: ['lang'],
}

/** Requests with `lengths` history rows and `counts` candidates, of random content. */
function batchOf(lengths: number[], counts: number[], seed = 'batch'): RequestBatch {
  const random = new Random(seed)
  const offsetsOf = (sizes: number[]) => {
    const offsets = new BigInt64Array(sizes.length + 1)
    sizes.forEach((size, b) => {
      offsets[b + 1] = offsets[b]! + BigInt(size)
    })
    return offsets
  }
  const [B, T, M] = [lengths.length, lengths.reduce((a, b) => a + b, 0), counts.reduce((a, b) => a + b, 0)]
  const ints = (n: number, bound: number) => Int32Array.from({ length: n }, () => random.int(bound))
  const ids = (n: number) => BigInt64Array.from({ length: n }, () => BigInt(1 + random.int(99)))
  const watch = (n: number) =>
    Float32Array.from({ length: n }, () => (random.int(3) === 0 ? Number.NaN : random.int(60)))
  return {
    schema,
    requests: Int32Array.from({ length: B }, (_, b) => 10 + b),
    requestIds: Array.from({ length: B }, (_, b) => `r${b}`),
    users: ids(B),
    times: BigInt64Array.from({ length: B }, (_, b) => BigInt(1000 + b)),
    contextual: ids(2 * B),
    history: {
      offsets: offsetsOf(lengths),
      items: ids(T),
      series: Uint8Array.from({ length: T }, () => Number(random.int(4) === 0)),
      times: BigInt64Array.from({ length: T }, (_, t) => BigInt(t)),
      actions: ints(T, 8),
      taken: ints(T, 8),
      pending: Int32Array.from({ length: T }, () => Number(random.int(5) === 0)),
      requests: Int32Array.from({ length: T }, () => random.int(10) - 1),
      values: { watch: watch(T) },
    },
    historyStart: ints(B, 5),
    supervisedFrom: Int32Array.from(lengths, length => random.int(length + 1)),
    candidates: {
      offsets: offsetsOf(counts),
      items: ids(M),
      requestIndex: BigInt64Array.from(counts.flatMap((count, b) => Array(count).fill(BigInt(b)) as bigint[])),
      actions: ints(M, 8),
      taken: ints(M, 8),
      values: { watch: watch(M) },
    },
  }
}

describe('tasks', () => {
  it('reads definitions', () => {
    const base = { kind: 'binary', actions: 0, value: null, atLeast: null, once: false }
    expect(parseTask('like = LIKE or BOOK MARK', schema)).toEqual({ ...base, name: 'like', actions: 3 })
    expect(parseTask(' hate=HATE once ', schema)).toEqual({ ...base, name: 'hate', actions: 4, once: true })
    expect(parseTask('long = watch >= 30 s', schema)).toEqual({ ...base, name: 'long', value: 'watch', atLeast: 30 })
    expect(parseTask('long = watch>=1.5min', schema)).toMatchObject({ atLeast: 90 })
    expect(parseTask('good = watch >= -4', schema)).toMatchObject({ atLeast: -4 })
    expect(parseTask('t = watch', schema)).toEqual({ ...base, name: 't', kind: 'regression', value: 'watch' })
    for (const [text, part] of [
      ['like', 'expected "name = '],
      ['like == LIKE', 'expected "name = '],
      ['like = LUKE', 'no action "LUKE"; actions are "LIKE", "BOOK MARK", "HATE"'],
      ['long = wach >= 3', 'no value "wach"'],
      ['long = watch >= 3 days', 'unit "days"'],
      ['long = watch >= 3-4', '"3-4" is no number'],
    ] as const)
      expect(() => parseTask(text, schema)).toThrow(
        expect.objectContaining({ code: 'ERR_HSTU_DATA', message: expect.stringContaining(part) }),
      )
    expect(() => parseTasks(['a = LIKE', 'a = HATE'], schema)).toThrow(HstuError)
  })

  const texts = ['like = LIKE or HATE once', 'long = watch >= 30 s', 'watch_time = watch', 'book = BOOK MARK']
  const tasks = parseTasks(texts, schema)
  /** Label and weight of one row by the definition. */
  const expected = (actions: number, taken: number, watch: number) => [
    [Number((actions & 5) > 0), Number((taken & 5) === 0)],
    Number.isNaN(watch) ? [0, 0] : [Number(watch >= 30), 1],
    Number.isNaN(watch) ? [0, 0] : [watch, 1],
    [Number((actions & 2) > 0), 1],
  ]
  const batch = batchOf([0, 7, 30, 1], [3, 1, 20, 2])

  it('gives labels and weights of candidates', () => {
    const { labels, weights, historyWeights } = taskTargets(batch, tasks)
    const { actions, taken, values } = batch.candidates
    const want = Array.from(actions, (_, m) => expected(actions[m]!, taken[m]!, values.watch![m]!)).flat()
    expect(Array.from(labels)).toEqual(want.map(([label]) => label))
    expect(Array.from(weights)).toEqual(want.map(([, weight]) => weight))
    expect(historyWeights.every(weight => weight === 0)).toBe(true)
  })

  it('supervises the rows of a history that it is asked to', () => {
    const after = Int32Array.of(0, 3, -1, 8)
    const rules = {
      history: (b: number, k: number, request: number) => k >= batch.supervisedFrom[b]! && request >= 0,
      new: (b: number, _: number, request: number) => request > after[b]!,
      all: (_: number, __: number, request: number) => request >= 0,
    }
    const { offsets, series, pending, requests, actions, taken, values } = batch.history
    for (const supervise of ['history', 'new', 'all'] as const) {
      const found = taskTargets(batch, tasks, supervise === 'new' ? { supervise, after } : { supervise })
      const total = (array: Float32Array) => array.reduce((sum, x) => sum + x, 0)
      expect(total(found.weights) > 0).toBe(supervise !== 'history')
      for (let b = 0; b < 4; b++)
        for (let t = Number(offsets[b]!); t < Number(offsets[b + 1]!); t++) {
          const on = series[t] === 0 && pending[t] === 0 && rules[supervise](b, t - Number(offsets[b]!), requests[t]!)
          // Auxiliary rows are nobody's candidate.
          if (series[t] !== 0) continue
          expected(actions[t]!, taken[t]!, values.watch![t]!).forEach(([label, weight], k) => {
            expect(found.historyWeights[t * 4 + k]).toBe(on ? weight : 0)
            if (on) expect(found.historyLabels[t * 4 + k]).toBe(label)
          })
        }
      expect(total(found.historyWeights)).toBeGreaterThan(0)
    }
    expect(() => taskTargets(batch, tasks, { supervise: 'new' })).toThrow(/after goes with/)
    expect(() => taskTargets(batch, tasks, { after })).toThrow(/after goes with/)
  })
})

describe('batches', () => {
  const batch = batchOf([3, 0, 5, 2], [1, 4, 2, 1])
  it('cuts and joins', () => {
    const all = plain(batch)
    expect(plain(sliceBatch(batch, 1, 3))).toEqual(all.slice(1, 3))
    expect(plain(sliceBatch(batch, 2, 2))).toEqual([])
    const again = concatBatches([sliceBatch(batch, 0, 1), sliceBatch(batch, 1, 1), sliceBatch(batch, 1, 4)])
    expect(again).toEqual(batch)
    expect(() => sliceBatch(batch, 3, 5)).toThrow(/3 \.\. 5/)
  })
  it('expands to one row an impression', () => {
    const { batch: rows, historyWeight } = expandBatch(batch)
    const want = plain(batch).flatMap(request => request.candidates.map(one => ({ ...request, candidates: [one] })))
    expect(plain(rows)).toEqual(want)
    expect(Array.from(historyWeight)).toEqual([1, ...Array(4).fill(0.25), 0.5, 0.5, 1])
    expect(Array.from(rows.candidates.requestIndex, Number)).toEqual(want.map((_, m) => m))
  })
  it('keeps the latest rows of histories, or any', () => {
    for (const most of [0, 1, 3, 9]) {
      const want = plain(batch).map(request => {
        const dropped = Math.max(0, request.history.length - most)
        return {
          ...request,
          history: request.history.slice(dropped),
          start: request.start + (dropped === request.history.length ? 0 : dropped),
          supervisedFrom: Math.max(0, request.supervisedFrom - dropped),
        }
      })
      expect(plain(truncateHistory(batch, most))).toEqual(want)
    }
    const keep = Uint8Array.of(1, 0, 1, 0, 1, 1, 0, 1, 0, 0)
    const supervised = { ...batch, supervisedFrom: Int32Array.of(2, 0, 3, 1) }
    const kept = plain(selectHistory(supervised, keep))
    let row = 0
    plain(supervised).forEach((request, b) => {
      const marks = request.history.map(() => keep[row++] === 1)
      expect(kept[b]!.history).toEqual(request.history.filter((_, k) => marks[k]))
      expect(kept[b]!.supervisedFrom).toBe(marks.slice(0, request.supervisedFrom).filter(Boolean).length)
    })
  })
})

describe('token layout', () => {
  it.each(['interleave', 'add'] as const)('%s', fusion => {
    const batch = batchOf([3, 0, 6], [2, 1, 4], 'tokens')
    const { history, candidates } = batch
    const layout = tokenLayout(batch, fusion, 3)
    // The rows by name: what a token shows is read off the list.
    const T = history.items.length
    const rows = [
      ...Array.from({ length: 9 }, (_, k) => `context ${Math.floor(k / 3)}.${k % 3}`),
      ...Array.from({ length: T }, (_, t) => `item ${t}`),
      ...(fusion === 'interleave' ? Array.from({ length: T }, (_, t) => `actions ${t}`) : []),
      ...Array.from({ length: 7 }, (_, m) => `candidate ${m}`),
    ]
    const want: [string, bigint][] = []
    const offsets = [0]
    for (let b = 0; b < 3; b++) {
      for (let c = 0; c < 3; c++) want.push([`context ${b}.${c}`, batch.times[b]!])
      for (let t = Number(history.offsets[b]!); t < Number(history.offsets[b + 1]!); t++) {
        want.push([`item ${t}`, history.times[t]!])
        if (fusion === 'interleave' && history.series[t] === 0) want.push([`actions ${t}`, history.times[t]!])
      }
      for (let m = Number(candidates.offsets[b]!); m < Number(candidates.offsets[b + 1]!); m++)
        want.push([`candidate ${m}`, batch.times[b]!])
      offsets.push(want.length)
    }
    const shown = (token: bigint) => rows[Number(layout.source[Number(token)]!)]
    expect(Array.from(layout.source, (row, n) => [rows[Number(row)], layout.times[n]])).toEqual(want)
    expect(Array.from(layout.seqOffsets, Number)).toEqual(offsets)
    expect(Array.from(layout.numTargets)).toEqual([2, 1, 4])
    expect(layout.maxSeqLen).toBe(Math.max(...offsets.slice(1).map((end, b) => end - offsets[b]!)))
    expect(Array.from(layout.historyTokens, shown)).toEqual(Array.from({ length: T }, (_, t) => `item ${t}`))
    expect(Array.from(layout.candidateTokens, shown)).toEqual(Array.from({ length: 7 }, (_, m) => `candidate ${m}`))
    expect(tokenLayout(batch, fusion).contextual).toBe(2)
  })
})
