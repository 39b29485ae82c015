import { reshape, valueAndGrad } from '../autograd.js'
import { toDevice } from '../data/inputs.js'
import { truncateHistory } from '../data/ranking/batches.js'
import type { RequestReader } from '../data/ranking/reader.js'
import type { RequestBatch } from '../data/ranking/schema.js'
import { type RankingTask, taskTargets } from '../data/ranking/tasks.js'
import { breathe } from '../eval/evaluate.js'
import type { BaselineReport } from '../eval/ranking_baselines.js'
import { binaryMetrics } from '../eval/ranking_metrics.js'
import { candidatePairs } from '../layers/target_attention.js'
import { Din, type DinInputs } from '../models/din.js'
import { bceWithLogitsLoss } from '../ops/bce_with_logits_loss.js'
import { linear } from '../ops/linear.js'
import { AdamW } from '../optim/adamw.js'
import { Philox } from '../philox.js'
import { scope, Tensor, type TensorOptions } from '../tensor.js'

export interface DinBaselineOptions {
  /** Number of the first request that counts; those before it are the training part. */
  from: number
  /** One past the last request; default all. */
  end?: number
  /** Over the training part. Default 1. */
  passes?: number
  gaucBy?: 'request' | 'user'
  /** Of weights and dropouts. */
  seed?: number
  /** Requests a step. Default 16. */
  batchSize?: number
  /** Rows of a history. Default 100. */
  maxHistory?: number
  /** Width. Default 32. */
  dim?: number
  dropout?: number
  lr?: number
  tensors?: TensorOptions
  signal?: AbortSignal
}

/**
 * Trains a {@link Din} as the ranker is: `passes` over the training part, then once over the rest, each step's requests predicted before
 * they are learnt from.
 */
export async function evaluateDin(
  reader: RequestReader,
  tasks: readonly RankingTask[],
  options: DinBaselineOptions,
): Promise<BaselineReport[]> {
  const { from, end = reader.manifest.requests, passes = 1, gaucBy = 'request', seed = 0, batchSize = 16 } = options
  const { maxHistory = 100, dim = 32, dropout = 0.3, lr = 3e-3, tensors = {}, signal } = options
  const binary = tasks.filter(task => task.kind === 'binary')
  const { schema, sizes } = reader.manifest
  const K = binary.length
  const shape = { users: sizes.users, items: sizes.items, actions: schema.actions.length, tasks: K }
  const model = new Din({ ...shape, dim, dropout, scale: 1 / maxHistory }, seed, tensors)
  const optimizer = new AdamW(model.parameters, { lr })
  const philox = new Philox(BigInt(seed))
  const runs = binary.map(() => ({ logits: [] as number[], labels: [] as number[], groups: [] as bigint[] }))
  try {
    for (let pass = 0; pass <= passes; pass++) {
      const range = pass < passes ? { first: 0, end: from } : { first: from, end }
      for await (const read of reader.batches({ batchSize, ...range, ...(signal ? { signal } : {}) })) {
        const batch = truncateHistory(read, maxHistory)
        const { labels, weights } = taskTargets(batch, binary)
        if (pass === passes) {
          const logits = await scope(() => ({ data: model.forward(dinInputs(batch, tensors)).data() })).data
          for (let m = 0; m < labels.length / K; m++)
            runs.forEach((run, k) => {
              if (weights[m * K + k] === 0) return
              const b = Number(batch.candidates.requestIndex[m]!)
              run.logits.push(Number(logits[m * K + k]!))
              run.labels.push(labels[m * K + k]!)
              run.groups.push(gaucBy === 'user' ? batch.users[b]! : BigInt(batch.requests[b]!))
            })
        }
        scope(() => {
          const inputs = dinInputs(batch, tensors)
          const [y, w] = [labels, weights].map(data => Tensor.from(data, [data.length / K, K], tensors))
          const { grads } = valueAndGrad(model.parameters, () => {
            const each = bceWithLogitsLoss(model.forward(inputs, philox), y!, { weights: w! })
            return linear(reshape(each, [1, K]), Tensor.from(new Float32Array(K).fill(1), [K, 1], tensors))
          })
          optimizer.step(grads)
        })
        await breathe()
      }
    }
  } finally {
    model.dispose()
    optimizer.dispose()
  }
  return runs.map(({ logits, labels, groups }, k) => ({
    task: binary[k]!.name,
    baseline: `DIN, ${passes === 1 ? 'one pass' : `${passes} passes`}`,
    metrics: binaryMetrics(logits, labels, new Float32Array(logits.length).fill(1), groups),
  }))
}

function dinInputs(batch: RequestBatch, tensors: TensorOptions): DinInputs {
  const { history, candidates, users } = batch
  return {
    candidates: toDevice(candidates.items, tensors),
    users: toDevice(
      candidates.requestIndex.map(b => users[Number(b)]!),
      tensors,
    ),
    history: toDevice(
      history.items.map((item, t) => (history.series[t] === 0 ? item : 0n)),
      tensors,
    ),
    actions: toDevice(BigInt64Array.from(history.actions, BigInt), tensors),
    pairs: candidatePairs(history.offsets, candidates.offsets, tensors),
  }
}
