import { valueAndGrad } from '#lib/autograd.js'
import { expandBatch } from '#lib/data/ranking/batches.js'
import { rankerBatch } from '#lib/data/ranking/ranker_inputs.js'
import { parseTasks, taskTargets } from '#lib/data/ranking/tasks.js'
import { GenerativeRanker, type GenerativeRankerConfig } from '#lib/models/generative_ranker.js'
import { AdamW } from '#lib/optim/adamw.js'
import { Random } from '#lib/random.js'
import { scope, type Tensor } from '#lib/tensor.js'
import { randomRequests } from '../test/models/requests.js'
import { benchCase, labelOf, type Row, type Run, round } from './harness.js'
import { secondsOf } from './timing.js'

const K = 10
const ITEMS = 2000

/** Impressions a second of a whole training step (forward, backward, AdamW; losses on the candidates) on request batches, and on the same expanded. */
function rowsOf({ device, dtype }: Run): Row[] {
  const small = device === 'cpu'
  const sizes = small ? { B: 4, dim: 32, layers: 2, heads: 2 } : { B: 32, dim: 256, layers: 3, heads: 4 }
  return (small ? [64, 256] : [256, 1024]).map(history => {
    const { B, dim, layers, heads } = sizes
    const requests = randomRequests(new Random(1), {
      histories: Array<number>(B).fill(history),
      candidates: Array<number>(B).fill(K),
      ...{ items: ITEMS, users: 1000, seriesEvery: 0 },
    })
    const config: GenerativeRankerConfig = {
      vocabulary: { users: 1000, items: ITEMS, contextual: [4], series: [3] },
      actions: 2,
      tasks: [
        { name: 'like', kind: 'binary' },
        { name: 'share', kind: 'binary' },
      ],
      ...{ dim, layers, heads, qkDim: dim / heads, vDim: dim / heads, scalingSeqLen: 2 * history + K },
      ...{ inputDropout: 0, linearDropout: 0 },
    }
    const tasks = parseTasks(['like = LIKE', 'share = SHARE'], requests.schema)
    const precision = dtype === 'bfloat16' ? 'bf16' : 'float32'
    const model = new GenerativeRanker(config, 0, { device, precision })
    const optimizer = new AdamW(model.parameters)
    const seconds = [requests, expandBatch(requests).batch].map(batch =>
      scope(() => {
        const { inputs, labels, weights } = rankerBatch(batch, taskTargets(batch, tasks), config, model.options)
        const loss = (): Tensor => model.loss(model.forward(inputs), labels, weights).total
        const step = () =>
          scope(() => void optimizer.step(valueAndGrad(model.parameters, loss).grads as Record<string, Tensor>))
        return secondsOf(`roo ${history}`, step, device)
      }),
    )
    model.dispose()
    optimizer.dispose()
    const [ours, expanded] = seconds.map(s => round((B * K) / s)) as [number, number]
    const tokens = 2 + 2 * history
    return {
      ...{ case: 'request_batch', B, K, history, d: dim, layers, heads, dtype: labelOf(dtype), unit: 'impressions/s' },
      ...{ ms: round(1e3 * seconds[0]!), hstu: ours, expanded, speedup: round(ours / expanded) },
      ...{ dedup: K, ideal: round((K * (tokens + 1)) / (tokens + K)) },
    }
  })
}

benchCase('roo', { dtypes: ['bfloat16', 'float32'], run: rowsOf })
