import type { SequenceDataset } from '#lib/data/dataset.js'
import { Random } from '#lib/random.js'
import { trainOptions } from '#lib/train/options.js'
import { preset } from '#lib/train/presets.js'
import { Trainer } from '#lib/train/trainer.js'
import { benchCase, type Row, type Run, round, withPeers } from './harness.js'

/** Users at the ML-1M shape: 3,952 items; every length 200, or lognormal(4.55, 1.0) clipped to 20..200, seed 0. */
export function mlShape(lengths: 'full' | 'lognormal', users = 128): SequenceDataset {
  const random = new Random(0)
  const offsets = [0]
  for (let u = 0; u < users; u++) {
    const length = lengths === 'full' ? 200 : Math.min(200, Math.max(20, Math.round(Math.exp(4.55 + random.normal()))))
    offsets.push(offsets.at(-1)! + length + 1) // and the target of the last row
  }
  const total = offsets.at(-1)!
  let time = 0n
  return {
    name: `ml-1m shape, ${lengths}`,
    numUsers: users,
    numItems: 3952,
    userIds: [],
    itemIds: [],
    offsets: Int32Array.from(offsets),
    items: Int32Array.from({ length: total }, () => 1 + random.int(3952)),
    times: BigInt64Array.from({ length: total }, () => (time += BigInt(1 + random.int(3600)))),
    ratings: null,
    stats: { rows: total, skippedUsers: 0, skippedActions: 0, outOfOrder: 0, minActions: 3, warnings: [] },
  }
}

/** The precisions that the trainer has on a device. */
export function precisions(device: string): readonly ('float32' | 'bf16')[] {
  if (device === 'cpu') return ['float32']
  try {
    trainOptions({ precision: 'bf16' } as object)
    return ['float32', 'bf16']
  } catch {
    return ['float32']
  }
}

/**
 * Seconds a step of the training loop as it is run: batches prepared, copied and enqueued while the device works, events told. The
 * clock starts when the warm-up steps are known to be done and stops when the last one is, so the loop is timed in its steady state.
 */
async function secondsAStep(trainer: Trainer, warmUp: number, steps: number): Promise<number> {
  let start = 0
  for await (const event of trainer.run()) {
    if (event.type === 'step' && event.step === warmUp) start = performance.now()
    if (event.type === 'done') return (performance.now() - start) / 1e3 / steps
  }
  throw new Error('the run did not end')
}

/** Whether steps are CUDA graphs: both ways where they can be. */
const graphsOf = (device: string, model: string): { graphs?: boolean }[] => {
  if (device === 'cpu') return [{}]
  return model === 'sasrec' ? [{ graphs: false }] : [{ graphs: true }, { graphs: false }]
}

async function rowsOf(run: Run): Promise<Row[]> {
  const { device, options } = run
  const [warmUp, steps] = device === 'cpu' ? [2, 8] : [20, 200]
  const rows: Row[] = []
  for (const model of ['hstu', 'hstu-large', 'sasrec'] as const)
    for (const lengths of ['full', 'lognormal'] as const)
      for (const precision of precisions(device))
        for (const graphs of graphsOf(device, model)) {
          if (!options.only.test(`${model} ${lengths} ${precision}`)) continue
          const dataset = mlShape(lengths)
          const count = 128 * (warmUp + steps)
          const trainer = new Trainer(dataset, {
            model: preset(`ml-1m/${model}`).model(dataset.numItems),
            // Every batch is the same 128 users.
            users: Int32Array.from({ length: count }, (_, i) => i % 128),
            options: {
              ...{ part: 'all', shuffle: false, epochs: 1, evaluateEvery: 0 },
              ...{ precision, cudaGraphs: graphs.graphs ?? false },
            },
            tensors: { device },
          })
          const ms = round(1e3 * (await secondsAStep(trainer, warmUp, steps)))
          trainer.dispose()
          const tokens = dataset.items.length - dataset.numUsers
          const shape = { case: 'train_step.ml1m', model, B: 128, N: 211, d: 50, negatives: 128, tokens, lengths }
          const row: Row = { ...shape, ...graphs, dtype: precision, unit: 'ms', ms, hstu: ms }
          rows.push(withPeers(row, {}, run, lengths === 'lognormal' ? { case: shape.case, model } : undefined))
        }
  return rows
}

benchCase('training_step', { dtypes: ['float32'], run: rowsOf })
