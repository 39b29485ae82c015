// Loss and gradient norms of the first steps of a training run: what golden.json holds and golden.test.ts compares.
import { createHash } from 'node:crypto'
import { readFileSync } from 'node:fs'
import { trainBatch } from '#lib/data/batch.js'
import type { SequenceDataset } from '#lib/data/dataset.js'
import { loadDataset } from '#lib/data/load.js'
import { epochBatches, trainableUsers } from '#lib/data/split.js'
import { createModel } from '#lib/models/create.js'
import { Random } from '#lib/random.js'
import type { TensorOptions } from '#lib/tensor.js'
import { trainOptions } from '#lib/train/options.js'
import { preset } from '#lib/train/presets.js'
import { Trainer } from '#lib/train/trainer.js'
import { decoded } from '../harness.js'

/** One optimiser step: the loss, the L2 norm of each parameter's gradient, and of all of them together. */
export interface Step {
  loss: number
  norm: number
  norms: Record<string, number>
}

function normOf(values: Float64Array): number {
  return Math.sqrt(values.reduce((sum, x) => sum + x * x, 0))
}

/**
 * The first `count` steps of the preset ml-100k/hstu with seed 0, by the Trainer itself: on CUDA as graphs, unless `cudaGraphs` is false.
 * Norms are summed on the host in float64.
 */
export async function traceOf(
  dataset: SequenceDataset,
  tensors: TensorOptions,
  count: number,
  cudaGraphs = true,
): Promise<Step[]> {
  const { model, train } = preset('ml-100k/hstu')
  const options = { ...train, seed: 0, evaluateEvery: 0, cudaGraphs }
  const trainer = new Trainer(dataset, { model: model(dataset.numItems), options, tensors })
  const norms: Step['norms'][] = []
  const { optimizer } = trainer
  const update = optimizer.step.bind(optimizer)
  optimizer.step = (gradients, lr) => {
    norms.push(Object.fromEntries(Object.entries(gradients).map(([name, grad]) => [name, normOf(decoded(grad))])))
    return update(gradients, lr)
  }
  const steps: Step[] = []
  try {
    for await (const event of trainer.run()) {
      if (event.type !== 'step') continue
      const each = norms[steps.length]!
      steps.push({ loss: event.loss, norm: normOf(Float64Array.from(Object.values(each))), norms: each })
      if (steps.length === count) return steps
    }
  } finally {
    trainer.dispose()
  }
  throw new Error(`the run ended after ${steps.length} of ${count} steps`)
}

/** The dataset as `loadDataset` gives it; where DuckDB is not installed it is read here. The trace's hash holds both to the same bits. */
export async function ml100k(path: string): Promise<SequenceDataset> {
  try {
    await import('@duckdb/node-api')
  } catch {
    return readInter(path)
  }
  return loadDataset(path)
}

/** Users and items are numbered as they appear, actions ordered by user, time and line. */
function readInter(path: string): SequenceDataset {
  const rows = readFileSync(path, 'utf8').trimEnd().split('\n').slice(1)
  const itemIds = ['']
  const numbers = new Map<string, number>()
  const users = new Map<string, { item: number; time: bigint }[]>()
  for (const row of rows) {
    const [user, id, , time] = row.split('\t') as [string, string, string, string]
    if (!numbers.has(id)) numbers.set(id, itemIds.push(id) - 1)
    if (!users.has(user)) users.set(user, [])
    users.get(user)!.push({ item: numbers.get(id)!, time: BigInt(time) })
  }
  const actions = [...users.values()].map(list => list.sort((a, b) => Number(a.time - b.time)))
  const offsets = new Int32Array(actions.length + 1)
  for (const [u, { length }] of actions.entries()) offsets[u + 1] = offsets[u]! + length
  return {
    ...{ name: 'ml-100k', numUsers: users.size, numItems: numbers.size, userIds: [...users.keys()], itemIds, offsets },
    items: Int32Array.from(actions.flat(), ({ item }) => item),
    times: BigInt64Array.from(actions.flat(), ({ time }) => time),
    ratings: null,
    stats: { rows: rows.length, skippedUsers: 0, skippedActions: 0, outOfOrder: 0, minActions: 3, warnings: [] },
  }
}

/** Hash of who did what when: a trace belongs to one dataset. */
export function hashOf({ offsets, items, times }: SequenceDataset): string {
  const hash = createHash('sha256').update(offsets).update(items)
  return (times ? hash.update(times) : hash).digest('hex')
}

/** Initial weights and batches of the first steps, as JSON can hold them: what golden.py begins from. */
export function traceInputs(dataset: SequenceDataset, count: number) {
  const { model: specOf, train } = preset('ml-100k/hstu')
  const spec = specOf(dataset.numItems)
  const model = createModel(spec, 0, { dtype: 'float64' })
  const weights = Object.entries(model.parameters).map(([name, tensor]) => {
    return [name, { shape: tensor.shape, data: Array.from(decoded(tensor)) }] as const
  })
  model.dispose()
  const { batchSize, part } = trainOptions(train)
  const batches: Record<string, number[]>[] = []
  for (let epoch = 0; batches.length < count; epoch++) {
    const random = new Random(0).fork(`epoch ${epoch}`)
    for (const users of epochBatches(trainableUsers(dataset, part), batchSize, () => random.float())) {
      const { ids, targets, offsets, times, queryTimes } = trainBatch(dataset, users, {
        ...{ maxLength: spec.config.maxLength, protocol: part },
      })
      const arrays = Object.entries({ ids, targets, offsets, times: times!, queryTimes: queryTimes! })
      batches.push(Object.fromEntries(arrays.map(([name, values]) => [name, Array.from(values, Number)])))
    }
  }
  return { config: spec.config, parameters: Object.fromEntries(weights), batches: batches.slice(0, count) }
}
