import type { RequestBatch } from '#lib/data/ranking/schema.js'
import type { Random } from '#lib/random.js'

export interface RandomRequests {
  /** History rows of each request. */
  histories: readonly number[]
  /** Candidates of each request. */
  candidates: readonly number[]
  items: number
  users: number
  /** Rows of an auxiliary series among the history's: one in so many; 0 for none. */
  seriesEvery?: number
}

/** Requests out of nowhere, as the reader would give them: two actions, a value, a contextual feature, an auxiliary series. */
export function randomRequests(random: Random, options: RandomRequests): RequestBatch {
  const { histories, candidates, items, users, seriesEvery = 5 } = options
  const B = histories.length
  const offsetsOf = (lengths: readonly number[]) => {
    let total = 0
    return BigInt64Array.from([0n, ...lengths.map(length => BigInt((total += length)))])
  }
  const [offsets, candidateOffsets] = [offsetsOf(histories), offsetsOf(candidates)]
  const [T, M] = [Number(offsets[B]), Number(candidateOffsets[B])]
  const now = Array.from({ length: B }, (_, b) => 1_000_000 + 10_000 * b)
  const series = Uint8Array.from({ length: T }, (_, t) => Number(seriesEvery > 0 && t % seriesEvery === 1))
  const times = new BigInt64Array(T)
  for (let b = 0; b < B; b++) {
    let time = now[b]!
    for (let t = Number(offsets[b + 1]) - 1; t >= Number(offsets[b]); t--) times[t] = BigInt((time -= random.int(900)))
  }
  const main = (t: number, value: number) => (series[t] === 0 ? value : 0)
  const bits = (length: number) => Int32Array.from({ length }, () => random.int(4))
  const values = (length: number) => Float32Array.from({ length }, () => 3 * random.float())
  return {
    schema: { actions: ['LIKE', 'SHARE'], values: ['watch'], contextual: ['country'], series: ['language'] },
    requests: Int32Array.from({ length: B }, (_, b) => 100 + b),
    requestIds: Array.from({ length: B }, (_, b) => `r${b}`),
    users: BigInt64Array.from({ length: B }, () => BigInt(1 + random.int(users))),
    times: BigInt64Array.from(now, BigInt),
    contextual: BigInt64Array.from({ length: B }, () => BigInt(random.int(4))),
    history: {
      ...{ offsets, series, times, values: { watch: values(T).map((x, t) => (series[t] === 0 ? x : NaN)) } },
      items: BigInt64Array.from({ length: T }, (_, t) => BigInt(1 + random.int(series[t] === 0 ? items : 3))),
      actions: bits(T).map((x, t) => main(t, x)),
      taken: new Int32Array(T),
      pending: Int32Array.from({ length: T }, (_, t) => main(t, Number(random.float() < 0.1))),
      requests: Int32Array.from({ length: T }, (_, t) => (series[t] === 0 ? random.int(100) : -1)),
    },
    historyStart: new Int32Array(B),
    supervisedFrom: Int32Array.from(histories, length => Math.floor(length / 3)),
    candidates: {
      offsets: candidateOffsets,
      items: BigInt64Array.from({ length: M }, () => BigInt(1 + random.int(items))),
      requestIndex: BigInt64Array.from(candidates.flatMap((K, b) => Array<bigint>(K).fill(BigInt(b)))),
      actions: bits(M),
      taken: bits(M),
      values: { watch: values(M) },
    },
  }
}
