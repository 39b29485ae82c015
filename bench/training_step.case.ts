import { trainBatch } from '#lib/data/batch.js'
import type { SequenceDataset } from '#lib/data/dataset.js'
import { Random } from '#lib/random.js'
import { preset } from '#lib/train/presets.js'
import { Trainer } from '#lib/train/trainer.js'
import { benchCase, benchDevice, round, timed } from './harness.js'

/** One batch of users at the ML-1M shape: 3,952 items; every length 200, or lognormal(4.55, 1.0) clipped to 20..200, seed 0. */
function mlShape(lengths: 'full' | 'lognormal', users = 128): SequenceDataset {
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

benchCase('training_step', () =>
  (['hstu', 'hstu-large', 'sasrec'] as const).flatMap(name =>
    (['full', 'lognormal'] as const).map(lengths => {
      const dataset = mlShape(lengths)
      const trainer = new Trainer(dataset, {
        ...{ model: preset(`ml-1m/${name}`).model(3952), options: { part: 'all' } },
        tensors: { device: benchDevice() },
      })
      const users = Int32Array.from({ length: dataset.numUsers }, (_, u) => u)
      const { ids } = trainBatch(dataset, users, { maxLength: 200, protocol: 'all' })
      const seconds = timed(`${name} ${lengths}`, () => void trainer.step(users))
      trainer.dispose()
      const shape = { B: 128, N: 211, d: 50, R: 128, T: ids.length, lengths }
      return {
        case: name,
        ...shape,
        dtype: 'float32',
        unit: 'ms',
        hstu: round(seconds * 1e3),
        ms: round(seconds * 1e3),
      }
    }),
  ),
)
