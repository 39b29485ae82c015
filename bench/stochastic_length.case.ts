import type { RequestBatch } from '#lib/data/ranking/schema.js'
import { parseTasks } from '#lib/data/ranking/tasks.js'
import { GenerativeRanker, type GenerativeRankerConfig } from '#lib/models/generative_ranker.js'
import { AdamW } from '#lib/optim/adamw.js'
import { Philox } from '#lib/philox.js'
import { Random } from '#lib/random.js'
import type { Device } from '#lib/tensor.js'
import { RankFeed } from '#lib/train/rank_feed.js'
import { rankOptions } from '#lib/train/rank_options.js'
import { enqueueRankStep } from '#lib/train/rank_step.js'
import { randomRequests } from '../test/models/requests.js'
import { benchCase, labelOf, type Row, type Run, round } from './harness.js'
import { median } from './timing.js'

const K = 10
const ALPHA = 1.6
const ITEMS = 2000
/** Tokens of a history at N = 4096, by share: fitted to the paper's table of sparsity, which does not say its lengths. */
const fitted = [
  [0, 0.019],
  [384, 0.034],
  [1024, 0.059],
  [2048, 0.37],
  [4032, 0.51],
  [4096, 0.01],
] as const

function lengthsOf(random: Random, B: number, N: number): number[] {
  const total = fitted.reduce((sum, [, share]) => sum + share, 0)
  return Array.from({ length: B }, () => {
    let left = random.float() * total
    const [tokens] = fitted.find(([, share]) => (left -= share) < 0) ?? fitted.at(-1)!
    return Math.round((tokens * N) / 4096 / 2) // an item and its actions are a row
  })
}

/**
 * Seconds of a training step as the trainer makes it: histories shortened, batch copied, forward, backward, AdamW; on CUDA the host
 * prepares a step while the device runs the two before it. Median of the rounds over all batches, after those that warm up: of three at
 * least, of more while they are done within three seconds.
 */
async function secondsOf(feed: RankFeed, step: (pass: number, batch: RequestBatch) => Promise<unknown>, run: Batches) {
  const { batches, warmUp, rounds, lag } = run
  const seconds: number[] = []
  const enough = () => seconds.length >= 3 && seconds.reduce((a, b) => a + b, 0) * batches.length > 3
  for (let pass = 0; pass < warmUp + rounds && !enough(); pass++) {
    const start = performance.now()
    const inFlight: Promise<unknown>[] = []
    for (const batch of batches) {
      inFlight.push(step(pass, batch))
      while (inFlight.length > lag) await inFlight.shift()
    }
    await Promise.all(inFlight)
    if (pass >= warmUp) seconds.push((performance.now() - start) / 1e3 / batches.length)
  }
  return { seconds: median(seconds), sparsity: feed.sparsity }
}

interface Batches {
  batches: RequestBatch[]
  warmUp: number
  rounds: number
  lag: number
}

function batchesOf(device: Device, B: number, N: number): Batches {
  const random = new Random(1)
  const [count, warmUp, rounds] = device === 'cpu' ? [3, 1, 3] : [6, 4, 10]
  const batches = Array.from({ length: count }, (_, i) => {
    const candidates = Array<number>(B).fill(K)
    const histories = lengthsOf(random, B, N)
    const batch = randomRequests(random, { histories, candidates, items: ITEMS, users: 1000, seriesEvery: 0 })
    return { ...batch, requests: batch.requests.map(request => request + i * B) }
  })
  return { batches, warmUp, rounds, lag: device === 'cpu' ? 0 : 2 }
}

async function rowsOf({ device, dtype }: Run): Promise<Row[]> {
  const small = device === 'cpu'
  const { B, N, dim, layers, heads } = small
    ? { B: 4, N: 4096, dim: 32, layers: 2, heads: 2 }
    : { B: 16, N: 4096, dim: 512, layers: 3, heads: 4 }
  const run = batchesOf(device, B, N)
  const { schema } = run.batches[0]!
  const tasks = parseTasks(['like = LIKE', 'share = SHARE'], schema)
  const config: GenerativeRankerConfig = {
    ...{ vocabulary: { users: 1000, items: ITEMS, contextual: [4], series: [3] }, actions: schema.actions.length },
    tasks: tasks.map(({ name, kind }) => ({ name, kind })),
    ...{ dim, layers, heads, qkDim: dim / heads, vDim: dim / heads, scalingSeqLen: N + K },
    ...{ inputDropout: 0.1, linearDropout: 0.1 },
  }
  const rows: Row[] = []
  for (const supervise of ['candidates', 'history'] as const) {
    const timed = []
    for (const stochasticLength of [0, ALPHA]) {
      const model = new GenerativeRanker(config, 0, { device, precision: dtype === 'bfloat16' ? 'bf16' : 'float32' })
      const optimizer = new AdamW(model.parameters)
      const parts = { model, optimizer, table: null, philox: new Philox(1n) }
      const feed = new RankFeed(rankOptions({ stochasticLength, supervise, maxHistory: N / 2 }), tasks, 'interleave', {
        users: 1000,
        items: ITEMS,
      })
      const step = (pass: number, batch: RequestBatch) => {
        const work = feed.work(batch, pass)
        work.commit()
        return enqueueRankStep(parts, work, false, 1, { lr: 1e-3, tableLr: 1e-3 }).loss!
      }
      timed.push(await secondsOf(feed, step, run))
      model.dispose()
      optimizer.dispose()
    }
    const [full, short] = timed as [(typeof timed)[0], (typeof timed)[0]]
    const { meanLength, meanKept, sparsity, bound } = short.sparsity!
    rows.push({
      ...{ case: 'stochastic_length', alpha: ALPHA, N, bound, B, K, d: dim, layers, heads, loss: supervise },
      ...{ meanLength: Math.round(meanLength), meanKept: Math.round(meanKept), sparsity: round(sparsity) },
      ...{ dtype: labelOf(dtype), unit: 'ms', ms: round(1e3 * short.seconds), hstu: round(1e3 * short.seconds) },
      ...{ full: round(1e3 * full.seconds), speedup: round(full.seconds / short.seconds) },
    })
  }
  return rows
}

benchCase('stochastic_length', { dtypes: ['bfloat16', 'float32'], run: rowsOf })
